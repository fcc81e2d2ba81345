"""Tensor files: safetensors, read with suspicion and written one tensor at a time.

The format is eight bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets) and the data. This
reader takes nothing on trust: lengths are compared with the file's size before anything of that length is read, and tensors must cover
the data without a gap or an overlap. Types that numpy lacks (bfloat16, float8) stay what they are: their bytes travel as unsigned
integers of the same width under the type's name.

References: https://huggingface.co/docs/safetensors (format and its limits).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Type name -> numpy type that carries its bytes.
CARRIERS: dict[str, np.dtype[Any]] = {
  name: np.dtype(carrier)
  for name, carrier in {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
  }.items()
}  # fmt: skip
_FOREIGN = ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL")  # what a carrier alone does not say
MOST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_AXES = 32
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
  entries: dict[str, Any] = {}
  offset = 0
  # The widest types first, so that every tensor is aligned to its own width.
  order = sorted(tensors, key=lambda name: (-CARRIERS[tensors[name].dtype].itemsize, name))
  for name in order:
    tensor = tensors[name]
    entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.bytes]}
    offset += tensor.bytes
  header = json.dumps(entries, separators=(",", ":")).encode()
  header += b" " * (-len(header) % 8)
  digest = hashlib.sha256()
  with path.open("wb") as file:
    for part in (len(header).to_bytes(8, "little"), header):
      file.write(part)
      digest.update(part)
    for name in order:
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
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MOST_HEADER):
      raise ValueError(
        f"{path.name} is truncated or no tensor file: its header claims {length} bytes, the file has {size} in all "
        f"(at most {MOST_HEADER} are allowed)"
      )
    header = parse_json(file.read(length), path.name)
  start, room = 8 + length, size - 8 - length
  found: dict[str, Tensor] = {}
  spans = []
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    try:
      tensor, begin = _entry(entry, path, start, room)
    except ValueError as error:
      raise ValueError(f"{path.name}: tensor {name!r}: {error}") from None
    found[name] = tensor
    spans.append((begin, begin + tensor.bytes, name))
  _check_cover(sorted(spans), room, path.name)
  return found


def _entry(entry: Any, path: Path, start: int, room: int) -> tuple[Tensor, int]:
  if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"its entry is {_short(entry)}; needed are dtype, shape and data_offsets")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in CARRIERS:
    raise ValueError(f"dtype {_short(dtype)} is unknown; allowed are {', '.join(CARRIERS)}")
  if not are_sizes(shape) or len(shape) > MOST_AXES:
    raise ValueError(f"shape {_short(shape)} is not allowed; a list of at most {MOST_AXES} integers from 0 is needed")
  if not are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
    raise ValueError(f"data_offsets {_short(offsets)} do not lie within the {room} bytes of data")
  needed = math.prod(shape) * CARRIERS[dtype].itemsize
  if offsets[1] - offsets[0] != needed:
    raise ValueError(f"{dtype} {_short(shape)} takes {needed} bytes, its data_offsets span {offsets[1] - offsets[0]}")
  at = start + offsets[0]

  def load() -> np.ndarray:
    carrier = CARRIERS[dtype]
    if not needed:
      return np.empty(shape, carrier)
    held = np.memmap(path, np.uint8, "r", at, (needed,))
    return held.view(carrier).reshape(shape) if at % carrier.itemsize == 0 else np.array(held).view(carrier).reshape(shape)

  return Tensor(dtype, tuple(shape), load), offsets[0]


def are_sizes(value: Any) -> bool:
  """Whether it is a list of integers from 0 that an array's axes may have."""
  # Dimensions beyond 2^63 fit no array, even where another dimension is 0.
  return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_cover(spans: list[tuple[int, int, str]], room: int, file: str) -> None:
  """Tensors follow each other without gap or overlap and end with the file: nothing is hidden, nothing is missing."""
  position = 0
  for begin, end, name in spans:
    if begin != position:
      raise ValueError(f"{file}: tensor {name!r} begins at byte {begin} of the data, expected {position}: gap or overlap")
    position = end
  if position != room:
    raise ValueError(f"{file}: the tensors take {position} bytes, the file holds {room} bytes of data: truncated or with something behind")


def sha256(path: Path) -> str:
  """SHA-256 of a file, in hex."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def parse_json(data: bytes, what: str) -> dict[str, Any]:
  """A JSON object, strictly: no key twice, no NaN.

  Raises:
    ValueError: it is not one; names what was read.
  """
  try:
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_twins, parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{what} holds no valid JSON: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(f"{what} holds {type(value).__name__} where an object is needed")
  return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  held = dict(pairs)
  if len(held) != len(pairs):
    raise ValueError(f"a key stands twice among {_short([key for key, _ in pairs])}")
  return held


def _no_constant(word: str) -> Any:
  raise ValueError(f"{word} is not allowed")


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 120 else text[:117] + "..."


def temporary(folder: Path, suffix: str) -> Path:
  """A name in a folder that no file has yet, for one that is renamed when it is complete."""
  return folder / f".{os.urandom(8).hex()}{suffix}"
