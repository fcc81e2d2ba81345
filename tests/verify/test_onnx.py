"""ONNX files in numpy, onnxruntime and onnx's own evaluator: weights, inputs of the client's own run, outputs; and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import torch_backend
from core.verify.onnx_faults import FAULTS
from tests.verify.conftest import Made

CLIENTS = ("numpy", "onnxruntime", "onnx.reference")
WEIGHTS = {"nibble order", "inverted tensor scale", "dropped scales", "transposed scales", "one scale", "shifted codes"}


@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_agrees(graph: Made, name: str) -> None:
  made, path = graph("torch", name)
  report = torch_backend.verify(made.model, path, (*CLIENTS, "transformers"))
  assert report.passed and report.layout == "onnx"
  for client in CLIENTS[1:]:
    found = {check.name: check for check in report[client].checks}
    assert found["weights"].status == found["inputs"].status == "equal" and found["inputs"].compared > 10_000
    assert found["log-probabilities"].status in ("equal", "within", "explained")
  assert report["transformers"].status == "not run"


@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_faults(graph: Made, name: str) -> None:
  made, path = graph("torch", name)
  found = torch_backend.verify_controls(made.model, path, CLIENTS)
  assert found.passed
  for row in found.rows:
    if row.applies:
      assert row.cells["onnxruntime"] == row.cells["onnx.reference"] == "caught", row.fault
      assert row.cells["numpy"] == ("missed" if row.fault == "norm" else "caught"), row.fault
      assert row.fault not in WEIGHTS or "weights" in row.by["onnxruntime"]


def test_every_fault_applies_somewhere(graph: Made, tmp_path: Path) -> None:
  from core.verify.onnx_faults import write_faulty

  paths = [graph("torch", name)[1] for name in ("INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")]
  for i, fault in enumerate(FAULTS):
    assert any(write_faulty(path, fault, tmp_path / f"{i}{j}" / path.name) for j, path in enumerate(paths)), fault.name


def test_the_file_of_another_model(graph: Made) -> None:
  made, _ = graph("torch", "INT8_DEFAULT_CFG")
  report = torch_backend.verify(made.model, graph("torch", "NVFP4_DEFAULT_CFG")[1], CLIENTS)
  assert {report[client].status for client in CLIENTS} == {"failed"}


def test_damaged_and_missing(graph: Made, tmp_path: Path) -> None:
  made, path = graph("torch", "INT8_DEFAULT_CFG")
  broken = tmp_path / "broken.onnx"
  broken.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(ValueError, match="is no ONNX file, or is cut off"):
    torch_backend.verify(made.model, broken, CLIENTS)
  (tmp_path / "two").mkdir()
  for name in ("a.onnx", "b.onnx"):
    (tmp_path / "two" / name).write_bytes(b"")
  with pytest.raises(ValueError, match="several ONNX files"):
    torch_backend.verify(made.model, tmp_path / "two", CLIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize(
  "name", ["FP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "MXFP8_DEFAULT_CFG", "INT8_DYNAMIC", "INT4_ASYMMETRIC"]
)
def test_more_formats(graph: Made, backend: str, name: str) -> None:
  made, path = graph(backend, name)
  report: Any = made.verify(path, clients=CLIENTS)
  assert report.passed, str(report)
  controls = made.verify(path, controls=True, clients=CLIENTS)
  assert controls.passed, str(controls)


@pytest.mark.slow
def test_native_fp4(graph: Made) -> None:
  """onnxruntime has no FLOAT4E2M1, which is its failure to load; onnx's evaluator has."""
  made, path = graph("torch", "NVFP4_DEFAULT_CFG", fp4="native")
  report = torch_backend.verify(made.model, path, CLIENTS)
  assert report["onnx.reference"].status == report["numpy"].status == "passed"
  assert report["onnxruntime"].status == "failed" and not report.passed
