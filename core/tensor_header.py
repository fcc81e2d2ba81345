"""Headers of safetensors files, written, and read with suspicion.

A file is eight bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets) and the data. A reader
takes nothing on trust: lengths are compared with the file's size before anything of that length is read, and tensors must cover the data
without a gap or an overlap. Types that numpy lacks (bfloat16, float8) stay what they are: their bytes travel as unsigned integers of the
same width under the type's name.

References: https://huggingface.co/docs/safetensors (format and its limits).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Type name -> numpy type that carries its bytes.
CARRIERS: dict[str, np.dtype[Any]] = {
  name: np.dtype(carrier)
  for name, carrier in {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
  }.items()
}  # fmt: skip
MOST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_AXES = 32
METADATA = "__metadata__"


class Entry(NamedTuple):
  """A tensor without its data: a type of `CARRIERS`, and its shape."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * CARRIERS[self.dtype].itemsize


class Header(NamedTuple):
  """A header.

  Attributes:
    entries: name -> type and shape, in the order of the header.
    starts: name -> where the tensor begins in the file, in bytes.
    metadata: strings by name.
    size: of the whole file, in bytes.
  """

  entries: dict[str, Entry]
  starts: dict[str, int]
  metadata: dict[str, str]
  size: int


def compose(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> tuple[bytes, Header]:
  """(the first bytes of a file, its header). The widest types come first, so that every tensor is aligned to its own width, then names."""
  order = sorted(entries, key=lambda name: (-CARRIERS[entries[name].dtype].itemsize, name))
  described: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
  starts, end = {}, 0
  for name in order:
    starts[name], begin = end, end
    end += entries[name].nbytes
    described[name] = {"dtype": entries[name].dtype, "shape": list(entries[name].shape), "data_offsets": [begin, end]}
  text = json.dumps(described, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  data = 8 + len(text)
  found = Header({n: entries[n] for n in order}, {n: data + s for n, s in starts.items()}, dict(metadata or {}), data + end)
  return len(text).to_bytes(8, "little") + text, found


def read(path: Path, name: str = "") -> Header:
  """The header of a file, checked in full.

  Args:
    path: the file.
    name: what messages call it; "" is the path.

  Raises:
    ValueError: the file is not well formed; names the file, the tensor and what is wrong.
    OSError: the file cannot be read.
  """
  name = name or str(path)
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MOST_HEADER):
      raise ValueError(
        f"{name} is no safetensors file, or is cut off: its header claims {length} bytes, the file has {size} in all "
        f"(at most {MOST_HEADER} are allowed)"
      )
    header = parse_json(file.read(length), name)
  metadata = header.pop(METADATA, None) or {}
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise ValueError(f"{name}: {METADATA} is {_short(metadata)}; a mapping of strings is needed")
  room = size - 8 - length
  entries, spans = {}, []
  for key, value in header.items():
    entries[key], begin = _entry(f"{name}: tensor {key!r}", value, room)
    spans.append((begin, begin + entries[key].nbytes, key))
  _check_cover(sorted(spans), room, name)
  return Header(entries, {key: 8 + length + begin for begin, _, key in spans}, metadata, size)


def _entry(where: str, value: Any, room: int) -> tuple[Entry, int]:
  if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"{where} is described by {_short(value)}; dtype, shape and data_offsets are needed")
  dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
  if not isinstance(dtype, str) or dtype not in CARRIERS:
    raise ValueError(f"{where} has dtype {_short(dtype)}; allowed are {', '.join(CARRIERS)}")
  if not are_sizes(shape) or len(shape) > MOST_AXES:
    raise ValueError(f"{where} has shape {_short(shape)}; a list of at most {MOST_AXES} integers from 0 is needed")
  if not are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
    raise ValueError(f"{where} has data_offsets {_short(offsets)}; two integers from 0, ascending, are needed")
  entry = Entry(dtype, tuple(shape))
  if offsets[1] - offsets[0] != entry.nbytes:
    raise ValueError(f"{where}: {dtype} {_short(shape)} takes {entry.nbytes} bytes, its data_offsets span {offsets[1] - offsets[0]}")
  if offsets[1] > room:
    raise ValueError(f"{where} has data_offsets {_short(offsets)}, which do not lie within the {room} bytes of data (a hole or an overlap)")
  return entry, offsets[0]


def _check_cover(spans: list[tuple[int, int, str]], room: int, file: str) -> None:
  """Tensors follow each other without gap or overlap and end with the file: nothing is hidden, nothing is missing."""
  position = 0
  for begin, end, name in spans:
    if begin != position:
      raise ValueError(f"{file}: tensor {name!r} begins at byte {begin} of the data, {position} was expected (a hole or an overlap)")
    position = end
  if position != room:
    raise ValueError(f"{file} holds {room} bytes of data, its tensors take {position}: it is cut off, or something stands behind them")


def are_sizes(value: Any) -> bool:
  """Whether it is a list of integers from 0 that an array's axes may have."""
  # Dimensions beyond 2^63 fit no array, even where another dimension is 0.
  return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def parse_json(data: bytes, what: str) -> dict[str, Any]:
  """A JSON object, strictly: no key twice, no NaN.

  Raises:
    ValueError: it is not one; names what was read.
  """
  try:
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_twins, parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{what} holds no JSON that is valid: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(f"{what} holds {type(value).__name__}, not an object")
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
