"""Flipped bits: in tensors each is found, in headers and configurations nothing but a clear error or a report comes out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import torch_backend
from core.verify.job import Job
from core.verify.numpy_client import run
from tests.verify.conftest import CT, MODELOPT, Made
from torch_backend.verify import Simulation


def header_size(path: Path) -> int:
  with path.open("rb") as file:
    return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize(
  ("name", "layout"), [("INT8_DEFAULT_CFG", CT), ("NVFP4_DEFAULT_CFG", CT), ("INT4_ASYMMETRIC", CT), ("INT4_AWQ_CFG", MODELOPT)]
)
def test_every_flipped_bit_of_a_tensor_is_found(folder: Made, tmp_path: Path, name: str, layout: str) -> None:
  made, out = folder("torch", name, layout)
  copy = tmp_path / "copy"
  shutil.copytree(out, copy)
  weights = copy / "model.safetensors"
  start, size = header_size(weights), weights.stat().st_size
  job = Job(Simulation(made.model), copy, [])
  assert all(check.status != "differs" for check in run(job))
  rng = np.random.default_rng(0)
  # the widest tensors come first: single scales and shapes are near the beginning
  for place in [*rng.integers(start, start + 400, 10), *rng.integers(start, size, 10)]:
    data = bytearray(weights.read_bytes())
    data[int(place)] ^= 1 << int(rng.integers(8))
    weights.write_bytes(data)
    try:
      found = any(check.status == "differs" for check in run(job))
    except ValueError:  # a tensor that contradicts another one does not get as far as a comparison
      found = True
    assert found, f"byte {place}"
    data[int(place)] = out.joinpath("model.safetensors").read_bytes()[int(place)]
    weights.write_bytes(data)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_mutated_text_gives_an_error_or_a_report(folder: Made, tmp_path: Path, file: str) -> None:
  made, out = folder("torch", "NVFP4_DEFAULT_CFG")
  copy = tmp_path / "copy"
  shutil.copytree(out, copy)
  path, good = copy / file, (out / file).read_bytes()
  end = len(good) if file == "config.json" else header_size(out / file)
  rng = np.random.default_rng(1)
  clean = 0
  for _ in range(60):
    data = bytearray(good)
    for place in rng.integers(0, end, int(rng.integers(1, 4))):
      data[int(place)] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    try:
      clean += torch_backend.verify(made.model, copy, ("numpy",)).passed
    except (ValueError, FileNotFoundError) as error:
      assert str(error)
  assert clean < 30  # what does not say how the model is quantized may change
