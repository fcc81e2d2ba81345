"""Safetensors files, read and written tensor by tensor, with types that numpy has no name for (BF16, FP8).

A file is the length of a header (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets) and the data without
holes. The sizes are known before the data are, so one tensor at a time has to be in memory; the order in which tensors are produced need
not be the order in the file. Arrays of a type without a numpy name are given and returned as their bits: uint8 for FP8, uint16 for BF16.

References: the format's description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

# dtype -> the numpy type of its bits
DTYPES: dict[str, str] = {
  "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1", "F8_E5M2": "|u1",
  "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "|u1",
}  # fmt: skip
MAX_HEADER = 100_000_000  # the library's own limit


class Entry(NamedTuple):
  """A tensor before its data: dtype of `DTYPES`, and shape."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class Writer:
  """Writes one file whose tensors are known beforehand; they may come in any order.

  Args:
    path: file to create.
    entries: name -> dtype and shape.
    metadata: strings for the header.
  """

  def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    # as the library does: wide types first, so that every tensor is aligned, then by name
    order = sorted(entries, key=lambda name: (-np.dtype(DTYPES[entries[name].dtype]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
      entry = entries[name]
      header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.nbytes]}
      offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    self._entries = dict(entries)
    self._start = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in order}
    self._missing = set(order)
    self._file = open(path, "wb")  # noqa: SIM115  # closed by __exit__
    self._file.write(len(text).to_bytes(8, "little") + text)
    self._file.truncate(8 + len(text) + offset)

  def write(self, name: str, array: np.ndarray) -> None:
    """Write one tensor: its values, or its bits where numpy has no such type.

    Raises:
      ValueError: another shape or type than announced, or a tensor that was written before or not announced.
    """
    if name not in self._missing:
      raise ValueError(f"tensor {name!r} was written before, or was not announced")
    entry = self._entries[name]
    bits = np.dtype(DTYPES[entry.dtype])
    if array.shape != entry.shape or array.dtype != bits.newbyteorder("="):
      raise ValueError(f"tensor {name!r} is {array.dtype} {list(array.shape)}; announced was {entry.dtype} {list(entry.shape)}")
    self._file.seek(self._start[name])
    self._file.write(np.ascontiguousarray(array, bits).data.cast("B") if array.size else b"")
    self._missing.discard(name)

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    if kind is None:
      self._file.flush()
      os.fsync(self._file.fileno())
    self._file.close()
    if kind is None and self._missing:
      raise ValueError(f"tensors {', '.join(sorted(self._missing)[:5])} were announced and not written")


class File:
  """A file that is read tensor by tensor. Its header is checked in full before anything is allocated.

  Args:
    path: the file.

  Raises:
    ValueError: it is no safetensors file, or damaged; names the file and what is wrong.
  """

  def __init__(self, path: str | Path) -> None:
    self.path = Path(path)
    size = self.path.stat().st_size
    with self.path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(f"{self.path} is no safetensors file, or is cut off: {size} bytes, header of {length}")
      try:
        header = json.loads(file.read(length).decode("utf-8"))
      except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{self.path}: the header is no JSON ({error})") from error
    self._data = 8 + length
    if not isinstance(header, dict):
      raise ValueError(f"{self.path}: the header is {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
      raise ValueError(f"{self.path}: __metadata__ is not a mapping of strings")
    self.metadata: dict[str, str] = metadata
    self._offsets: dict[str, int] = {}
    self.entries: dict[str, Entry] = {name: self._checked(name, value) for name, value in header.items()}
    self._check_layout(size - self._data)

  def _checked(self, name: str, value: Any) -> Entry:
    where = f"{self.path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
      raise ValueError(f"{where} is described by {str(value)[:80]}; dtype, shape and data_offsets are needed")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
      raise ValueError(f"{where} has dtype {str(value['dtype'])[:40]!r}; known are {', '.join(DTYPES)}")
    numbers = [*value["shape"], *value["data_offsets"]] if all(isinstance(value[k], list) for k in ("shape", "data_offsets")) else [None]
    if any(type(n) is not int or n < 0 for n in numbers) or len(value["data_offsets"]) != 2:
      raise ValueError(f"{where} has shape {str(value['shape'])[:80]} and data_offsets {str(value['data_offsets'])[:80]}")
    entry = Entry(value["dtype"], tuple(value["shape"]))
    start, end = value["data_offsets"]
    if end - start != entry.nbytes:
      raise ValueError(f"{where}: {entry.dtype} {list(entry.shape)} takes {entry.nbytes} bytes, the header gives it {end - start}")
    self._offsets[name] = start
    return entry

  def _check_layout(self, size: int) -> None:
    end = 0
    for name, start in sorted(self._offsets.items(), key=lambda item: (item[1], self.entries[item[0]].nbytes)):
      if start != end:
        raise ValueError(f"{self.path}: tensor {name!r} starts at byte {start} of the data, {end} was expected (a hole or an overlap)")
      end += self.entries[name].nbytes
    if end != size:
      raise ValueError(f"{self.path} holds {size} bytes of data, its header describes {end}")

  def read(self, name: str) -> np.ndarray:
    """One tensor: its values, or its bits where numpy has no such type.

    Raises:
      ValueError: no such tensor.
    """
    if name not in self.entries:
      raise ValueError(f"{self.path} has no tensor {name!r}")
    entry = self.entries[name]
    with self.path.open("rb") as file:
      file.seek(self._data + self._offsets[name])
      data = file.read(entry.nbytes)
    if len(data) != entry.nbytes:
      raise ValueError(f"{self.path} is cut off in tensor {name!r}")
    bits = np.dtype(DTYPES[entry.dtype])
    return np.frombuffer(data, bits).astype(bits.newbyteorder("="), copy=False).reshape(entry.shape)


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
  """Floating point values as a tensor of that dtype, rounded to nearest even once; float64 may stay what it is.

  Raises:
    ValueError: no dtype of floating point weights.
  """
  if dtype == "BF16":
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
  if dtype not in ("F64", "F32", "F16"):
    raise ValueError(f"dtype {dtype!r} is no type of unquantized weights; allowed are F64, F32, F16, BF16")
  return np.asarray(values).astype(np.dtype(DTYPES[dtype]).newbyteorder("="), copy=False)


def to_float(bits: np.ndarray, dtype: str) -> np.ndarray:
  """The values of a tensor that was read: float64 where it is, else float32.

  Raises:
    ValueError: no floating point dtype of weights.
  """
  if dtype == "BF16":
    return (bits.astype(np.uint32) << 16).view(np.float32)
  if dtype not in ("F64", "F32", "F16"):
    raise ValueError(f"dtype {dtype!r} holds no unquantized weights; allowed are F64, F32, F16, BF16")
  return bits if dtype == "F64" else bits.astype(np.float32, copy=False)
