"""Our files are the library's, theirs are ours; damaged ones are refused with a reason."""

from __future__ import annotations

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from core.export.safetensors_file import File, Writer, to_bits, to_float
from core.tensor_header import Entry

RNG = np.random.default_rng(0)
ARRAYS: dict[str, tuple[str, np.ndarray]] = {
  "codes": ("U8", RNG.integers(0, 256, (3, 5)).astype(np.uint8)),
  "eight": ("F8_E4M3", RNG.integers(0, 127, (2, 7)).astype(np.uint8)),
  "half": ("F16", RNG.normal(size=(5,)).astype(np.float16)),
  "brain": ("BF16", RNG.normal(size=(4, 3)).astype(ml_dtypes.bfloat16).view(np.uint16)),
  "scale": ("F32", np.float32(0.5).reshape(())),
  "words": ("I32", RNG.integers(-9, 9, (2, 3)).astype(np.int32)),
  "shape": ("I64", np.asarray([4, 3])),
  "none": ("F32", np.zeros((0, 4), np.float32)),
}


def written(path: Path) -> Path:
  entries = {name: Entry(kind, array.shape) for name, (kind, array) in ARRAYS.items()}
  with Writer(path, entries, {"format": "pt", "note": "ä"}) as writer:
    for name in reversed(list(ARRAYS)):  # in any order
      writer.write(name, ARRAYS[name][1])
  return path


def test_the_library_reads_ours(tmp_path: Path) -> None:
  found = safetensors.torch.load_file(written(tmp_path / "a.safetensors"))
  assert set(found) == set(ARRAYS)
  for name, (kind, array) in ARRAYS.items():
    assert tuple(found[name].shape) == array.shape
    assert found[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes(), (name, kind)
  assert found["eight"].dtype == torch.float8_e4m3fn and found["brain"].dtype == torch.bfloat16


def test_ours_reads_the_library(tmp_path: Path) -> None:
  safetensors.torch.save_file(
    {"a": torch.arange(6.0).reshape(2, 3).bfloat16(), "b": torch.arange(5)}, tmp_path / "b.safetensors", {"k": "v"}
  )
  file = File(tmp_path / "b.safetensors")
  assert file.metadata == {"k": "v"} and file.entries["a"] == Entry("BF16", (2, 3))
  assert to_float(file.read("a"), "BF16").tolist() == [[0, 1, 2], [3, 4, 5]] and file.read("b").tolist() == [0, 1, 2, 3, 4]


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
  file = File(written(tmp_path / "a.safetensors"))
  for name, (kind, array) in ARRAYS.items():
    got = file.read(name)
    assert file.entries[name].dtype == kind and got.dtype == array.dtype and np.array_equal(got, array)


def test_bfloat16_rounds_to_nearest_even() -> None:
  values = np.concatenate([RNG.normal(size=2000).astype(np.float32), RNG.integers(0, 2**32, 5000, dtype=np.uint32).view(np.float32)])
  with np.errstate(all="ignore"):
    wanted = values.astype(ml_dtypes.bfloat16)
  finite = ~np.isnan(values)
  assert np.array_equal(to_bits(values, "BF16")[finite], wanted.view(np.uint16)[finite])
  assert np.isnan(to_float(to_bits(values, "BF16"), "BF16")[~finite]).all()


def test_announced_and_not_written(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="'b' is float32"), Writer(tmp_path / "x", {"b": Entry("F16", (2,))}, {}) as writer:
    writer.write("b", np.zeros(2, np.float32))
  with pytest.raises(ValueError, match="tensors b were announced"), Writer(tmp_path / "x", {"b": Entry("F16", (2,))}, {}):
    pass


def headed(path: Path, header: object, data: bytes = b"") -> Path:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)
  return path


def tensor(**changes: object) -> dict[str, object]:
  return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}


@pytest.mark.parametrize(
  ("header", "reason"),
  [
    (b"{", "no JSON"), (b"\xff\xfe", "no JSON"), ([], "not an object"), ({"a": 3}, "are needed"),
    ({"a": tensor(dtype="F7")}, "has dtype 'F7'"),
    ({"a": tensor(dtype=["U8"])}, "has dtype"),
    ({"a": tensor(shape=[-4])}, "has shape"), ({"a": tensor(shape=[2.0, 2])}, "has shape"), ({"a": tensor(shape=4)}, "has shape"),
    ({"a": tensor(shape=[2**40, 2**40])}, "takes"), ({"a": tensor(data_offsets=[0, 8])}, "takes 4 bytes"),
    ({"a": tensor(data_offsets=[2, 6])}, "a hole or an overlap"), ({"a": tensor(), "b": tensor()}, "a hole or an overlap"),
    ({"a": tensor(data_offsets=[0])}, "data_offsets"), ({"__metadata__": {"a": 1}}, "__metadata__"), ({}, "holds 4 bytes of data"),
    (b"[" * 100_000, "no JSON"),
  ],
)  # fmt: skip
def test_damaged_headers(tmp_path: Path, header: object, reason: str) -> None:
  with pytest.raises(ValueError, match=reason):
    File(headed(tmp_path / "a.safetensors", header, b"1234"))


@pytest.mark.parametrize("content", [b"", b"123", (2**63).to_bytes(8, "little"), (99).to_bytes(8, "little") + b"{}"])
def test_no_file_at_all(tmp_path: Path, content: bytes) -> None:
  (tmp_path / "a.safetensors").write_bytes(content)
  with pytest.raises(ValueError, match="no safetensors file, or is cut off"):
    File(tmp_path / "a.safetensors")


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
  """Whatever is flipped, cut or inserted: a ValueError, or a file whose tensors have the sizes that its header says."""
  good = written(tmp_path / "a.safetensors").read_bytes()
  length = 8 + int.from_bytes(good[:8], "little")
  rng, refused = random.Random(0), 0
  for _ in range(400):
    content = bytearray(good)
    kind, place = rng.randrange(3), rng.randrange(length)
    if kind == 0:
      content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del content[rng.randrange(len(content)) :]
    else:
      content[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    (tmp_path / "b.safetensors").write_bytes(bytes(content))
    try:
      file = File(tmp_path / "b.safetensors")
      for name, entry in file.entries.items():
        assert file.read(name).nbytes == entry.nbytes
    except ValueError:
      refused += 1
  assert refused > 300
