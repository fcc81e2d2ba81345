"""Every fault turns a check red, in the clients that can see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import torch_backend
from core.verify import Controls
from core.verify.faults import FAULTS
from tests.export import quantized as q
from tests.verify.conftest import CT, MODELOPT, Made

SEEN_BY_MODELOPT = {
  "nibble order",
  "inverted tensor scale",
  "one tensor scale",
  "dropped scales",
  "transposed scales",
  "one scale",
  "shifted codes",
}


def controls(made: Any, out: Path, *clients: str) -> Controls:
  return torch_backend.verify_controls(made.model, out, clients, q.IDS[:1])


def missed(found: Controls, client: str) -> set[str]:
  return {row.fault for row in found.rows if row.applies and row.cells[client] != "caught"}


@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_DEFAULT_CFG"])
def test_transformers(folder: Made, name: str) -> None:
  made, out = folder("torch", name)
  found = controls(made, out, "numpy", "transformers")
  assert found.passed and found.clean.passed
  assert missed(found, "numpy") == set() and missed(found, "transformers") == set()
  assert sum(row.applies for row in found.rows) >= 6


def test_zero_points(folder: Made) -> None:
  """Loaded dense, a list of unquantized layers is not looked at."""
  made, out = folder("torch", "INT4_ASYMMETRIC")
  found = controls(made, out, "numpy", "transformers")
  assert found.passed and missed(found, "transformers") == {"head not ignored"}
  (row,) = [row for row in found.rows if row.fault == "shifted codes"]
  assert row.by["numpy"] == ("scales",) and "weights" in row.by["transformers"]


@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"])
def test_modelopt(folder: Made, name: str) -> None:
  made, out = folder("torch", name, MODELOPT)
  found = controls(made, out, "numpy", "modelopt", "transformers")
  assert found.passed and missed(found, "numpy") == set()
  seen = {row.fault for row in found.rows if row.applies and row.cells["modelopt"] == "caught"}
  blind = {"one tensor scale"} if name == "W4A8_AWQ_BETA_CFG" else set()  # the second format's, which its packer is not given
  assert seen == ({row.fault for row in found.rows if row.applies} & SEEN_BY_MODELOPT) - blind
  assert all(row.cells["transformers"] == "not run" for row in found.rows if row.applies)


def test_every_fault_applies_somewhere(folder: Made) -> None:
  from core.verify.faults import open_content, write_faulty

  places = [
    folder("torch", name, layout)[1] for name, layout in (("INT8_DEFAULT_CFG", CT), ("NVFP4_DEFAULT_CFG", CT), ("INT4_AWQ_CFG", MODELOPT))
  ]
  contents = [open_content(place) for place in places]
  for fault in FAULTS:
    targets = [place.parent / f"{fault.name} {i}" for i, place in enumerate(places)]
    assert any(write_faulty(p, c, fault, t) for p, c, t in zip(places, contents, targets, strict=True)), fault.name


def test_without_a_client_that_sees_it_controls_fail(folder: Made) -> None:
  made, out = folder("torch", "NVFP4_DEFAULT_CFG", MODELOPT)
  found = controls(made, out, "modelopt")
  assert not found.passed and found.clean.passed
  assert "NOT CAUGHT by any client: norm" in str(found)


def test_nothing_ran_nothing_is_caught(folder: Made) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  found = controls(made, out, "modelopt", "vllm")
  assert not found.passed
  assert {cell for row in found.rows for cell in row.cells.values()} == {"not run"}


def test_the_artefact_is_left_alone(folder: Made, tmp_path: Path) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  found = controls(made, out, "numpy")
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before
  assert found.write(tmp_path / "matrix.json").exists()
  assert "does not apply: it needs 4-bit codes" in "\n".join(found.notes())
