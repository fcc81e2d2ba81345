"""The safetensors reader: equal bits, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experiments.models import checkpoint


def _bytes(x: torch.Tensor) -> bytes:
  return x.contiguous().view(torch.uint8).numpy().tobytes()


def test_every_type_comes_back_with_its_bits(tmp_path):
  torch.manual_seed(0)
  x = torch.randn(5, 7)
  types = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
  }
  tensors = {name: x.abs().to(getattr(torch, name)) for name in types}
  tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
  save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  found = checkpoint.read_folder(tmp_path)
  assert set(found) == set(tensors)
  for name, value in found.items():
    assert value.shape == tuple(tensors[name].shape)
    assert value.dtype == types.get(name, np.float32)
    assert value.tobytes() == (_bytes(tensors[name].reshape(-1)) if value.size else b"")


def _index(folder, weight_map):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_index_joins_its_files(tmp_path):
  save_file({"a": torch.arange(3.0)}, tmp_path / "one.safetensors")
  save_file({"b": torch.arange(4.0)}, tmp_path / "two.safetensors")
  _index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
  found = checkpoint.read_folder(tmp_path)
  assert found["a"].tolist() == [0, 1, 2] and found["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "inner/../../outside.safetensors", "..", ""])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
  folder = tmp_path / "model"
  folder.mkdir()
  save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
  _index(folder, {"a": name})
  with pytest.raises(ValueError, match="not a plain file name inside the folder"):
    checkpoint.read_folder(folder)


def test_an_index_that_promises_too_much(tmp_path):
  save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
  _index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
  with pytest.raises(ValueError, match="places b in files that do not hold them"):
    checkpoint.read_folder(tmp_path)
  _index(tmp_path, {"a": "gone.safetensors"})
  with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
    checkpoint.read_folder(tmp_path)


def _damaged(path, header, data=b"\0" * 8):
  raw = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, r"shape \[4\] needs 16 bytes, its range is 0\.\.8 of 8"),
    ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, r"its range is 0\.\.16 of 8"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, r"its range is -8\.\.0 of 8"),
    ({"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}, "type 'F7'; supported are"),
    ({"dtype": "F32", "shape": [2]}, "header entry of tensor 'x' is damaged"),
  ],
)
def test_damaged_headers_are_named(tmp_path, entry, message):
  _damaged(tmp_path / "model.safetensors", {"x": entry})
  with pytest.raises(ValueError, match=message):
    checkpoint.read_folder(tmp_path)


def test_files_that_are_no_safetensors(tmp_path):
  path = tmp_path / "model.safetensors"
  for content in (b"", b"abc", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 4) + b"nope"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file"):
      checkpoint.read_folder(tmp_path)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
    checkpoint.read_folder(tmp_path)


def test_narrow_types_without_ml_dtypes(tmp_path, monkeypatch):
  save_file({"x": torch.zeros(2, dtype=torch.bfloat16), "y": torch.zeros(2)}, tmp_path / "model.safetensors")
  monkeypatch.setitem(sys.modules, "ml_dtypes", None)
  with pytest.raises(ImportError, match=r"tensor 'x' has type 'BF16', .*run pip install ml_dtypes"):
    checkpoint.read_folder(tmp_path)
