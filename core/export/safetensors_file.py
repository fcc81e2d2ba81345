"""Safetensors files of an export, written and read tensor by tensor (`core.tensor_header`).

The sizes are known before the data are, so one tensor at a time has to be in memory; the order in which tensors are produced need not be
the order in the file. Arrays of a type without a numpy name are given and returned as their bits: uint8 for FP8, uint16 for BF16.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from core import tensor_header
from core.tensor_header import CARRIERS, Entry


class Writer:
  """Writes one file whose tensors are known beforehand; they may come in any order.

  Args:
    path: file to create.
    entries: name -> dtype and shape.
    metadata: strings for the header.
  """

  def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    first, header = tensor_header.compose(entries, metadata)
    self._entries = header.entries
    self._start = header.starts
    self._missing = set(entries)
    self._file = open(path, "wb")  # noqa: SIM115  # closed by __exit__
    self._file.write(first)
    self._file.truncate(header.size)

  def write(self, name: str, array: np.ndarray) -> None:
    """Write one tensor: its values, or its bits where numpy has no such type.

    Raises:
      ValueError: another shape or type than announced, or a tensor that was written before or not announced.
    """
    if name not in self._missing:
      raise ValueError(f"tensor {name!r} was written before, or was not announced")
    entry = self._entries[name]
    bits = CARRIERS[entry.dtype]
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
    header = tensor_header.read(self.path)
    self.metadata = header.metadata
    self.entries = header.entries
    self._starts = header.starts

  def read(self, name: str) -> np.ndarray:
    """One tensor: its values, or its bits where numpy has no such type.

    Raises:
      ValueError: no such tensor.
    """
    if name not in self.entries:
      raise ValueError(f"{self.path} has no tensor {name!r}")
    entry = self.entries[name]
    with self.path.open("rb") as file:
      file.seek(self._starts[name])
      data = file.read(entry.nbytes)
    if len(data) != entry.nbytes:
      raise ValueError(f"{self.path} is cut off in tensor {name!r}")
    bits = CARRIERS[entry.dtype]
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
  return np.asarray(values).astype(CARRIERS[dtype].newbyteorder("="), copy=False)


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
