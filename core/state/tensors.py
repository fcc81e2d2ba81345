"""Tensor files of a state: safetensors, written one tensor at a time, read when a tensor is asked for (`core.tensor_header`)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from core import tensor_header
from core.tensor_header import CARRIERS, Entry

_FOREIGN = ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL")  # what a carrier alone does not say
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor, of any backend or in a file.

  Attributes:
    dtype: a key of `CARRIERS`.
    shape: its shape.
    load: its bytes as a numpy array of that shape and of the type's carrier; called when they are needed.
  """

  dtype: str
  shape: tuple[int, ...]
  load: Callable[[], np.ndarray]

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * CARRIERS[self.dtype].itemsize

  def describe(self) -> str:
    return f"{self.dtype} {list(self.shape)}"

  @classmethod
  def of(cls, array: np.ndarray) -> Tensor:
    """A tensor of a plain numpy array.

    Raises:
      ValueError: a type that tensor files do not hold.
    """
    plain = {carrier: name for name, carrier in CARRIERS.items() if name not in _FOREIGN}
    kind = "BOOL" if array.dtype == np.bool_ else plain.get(array.dtype)
    if kind is None:
      raise ValueError(f"an array of type {array.dtype} cannot be kept; allowed are {', '.join(map(str, plain))}")
    return cls(kind, array.shape, lambda: array.view(CARRIERS[kind]))

  def float32(self) -> np.ndarray:
    """The values, of a float32 tensor only.

    Raises:
      ValueError: another type.
    """
    if self.dtype != "F32":
      raise ValueError(f"statistics are F32, got {self.describe()}")
    return np.array(self.load(), np.float32)


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
  """Write a tensor file, one tensor in memory at a time. Not atomic: see `folder.write`.

  Returns:
    The file's SHA-256, in hex.
  """
  first, header = tensor_header.compose({name: Entry(tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
  digest = hashlib.sha256()
  with path.open("wb") as file:
    file.write(first)
    digest.update(first)
    for name in header.entries:
      array = np.ascontiguousarray(tensors[name].load())
      if array.dtype != CARRIERS[tensors[name].dtype] or array.size != math.prod(tensors[name].shape):
        raise ValueError(f"tensor {name!r} is announced as {tensors[name].describe()}, its data are {array.dtype} {list(array.shape)}")
      data = array.reshape(-1).view(np.uint8).data
      file.write(data)
      digest.update(data)
    file.flush()
    os.fsync(file.fileno())
  return digest.hexdigest()


def read(path: Path) -> dict[str, Tensor]:
  """The tensors of a file; data are read when asked for, straight from the file.

  Raises:
    ValueError: the file is not well formed; names the file, the tensor and what is wrong.
    OSError: the file cannot be read.
  """
  header = tensor_header.read(path, path.name)
  return {name: Tensor(entry.dtype, entry.shape, _loader(path, entry, header.starts[name])) for name, entry in header.entries.items()}


def _loader(path: Path, entry: Entry, at: int) -> Callable[[], np.ndarray]:
  carrier = CARRIERS[entry.dtype]

  def load() -> np.ndarray:
    if not entry.nbytes:
      return np.empty(entry.shape, carrier)
    held = np.memmap(path, np.uint8, "r", at, (entry.nbytes,))
    aligned = at % carrier.itemsize == 0
    return held.view(carrier).reshape(entry.shape) if aligned else np.array(held).view(carrier).reshape(entry.shape)

  return load


def sha256(path: Path) -> str:
  """SHA-256 of a file, in hex."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def temporary(folder: Path, suffix: str) -> Path:
  """A name in a folder that no file has yet, for one that is renamed when it is complete."""
  return folder / f".{os.urandom(8).hex()}{suffix}"
