"""Reading GGUF files of Llamas under the names and in the row order of a checkpoint. Every size and offset is checked against the file.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3; 2 differs in nothing that is read here).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from core.export import gguf_layout
from core.tensor_header import CARRIERS, Entry

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # gguf.GGUFValueType
_STRING, _ARRAY = 8, 9
_FLOATS = {0: "F32", 1: "F16", 30: "BF16", 28: "F64"}  # gguf.GGMLQuantizationType
_BLOCKS = {8: "Q8_0", 39: "MXFP4"}
MAX_TEXT = 50_000_000
MAX_RANK = 4


class GgufFile:
  """A GGUF file, with the surface of `safetensors_file.File`.

  Attributes:
    path: the file.
    facts: key -> value, as the file has them.
    entries: checkpoint name -> how it is stored; a layer in blocks is "U8", [N, bytes of a row].
    blocks: layer -> "Q8_0" or "MXFP4".
    metadata: empty.
  """

  def __init__(self, path: str | Path) -> None:
    """Read the header.

    Raises:
      ValueError: damaged, no Llama, or with a tensor of another type.
    """
    self.path = Path(path)
    self.facts: dict[str, Any] = {}
    self.entries: dict[str, Entry] = {}
    self.blocks: dict[str, str] = {}
    self.metadata: dict[str, str] = {}
    self._places: dict[str, int] = {}
    size = self.path.stat().st_size
    with self.path.open("rb") as file:
      cursor = _Cursor(file, size, self.path)
      magic, version, tensors, keys = cursor.unpack("4sIQQ")
      if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"{self.path} is no GGUF file of version 2 or 3 ({magic!r}, {version})")
      cursor.enough(tensors, 24, "tensors")
      cursor.enough(keys, 13, "keys")
      for _ in range(keys):
        self._fact(cursor)
      offsets = dict(self._tensor(cursor) for _ in range(tensors))
      start = cursor.place
    if len(offsets) != tensors:
      raise ValueError(f"{self.path} names a tensor twice")
    alignment = self._number("general.alignment", 32)
    self._place(offsets, -(-start // alignment) * alignment, alignment, size)
    self._heads = (self._number("llama.attention.head_count"), self._number("llama.attention.head_count_kv"))
    self._check_rows()

  def read(self, name: str) -> np.ndarray:
    """One tensor, its rows in a checkpoint's order: float values, the bits of BF16, or blocks.

    Raises:
      ValueError: no such tensor.
    """
    if name not in self.entries:
      raise ValueError(f"{self.path} has no tensor {name!r}")
    entry = self.entries[name]
    with self.path.open("rb") as file:
      file.seek(self._places[name])
      data = file.read(entry.nbytes)
    if len(data) != entry.nbytes:
      raise ValueError(f"{self.path} is cut off in tensor {name!r}")
    bits = CARRIERS[entry.dtype]
    array = np.frombuffer(data, bits).astype(bits.newbyteorder("="), copy=False).reshape(entry.shape)
    return gguf_layout.halved(array, gguf_layout.heads_of(name, *self._heads))

  def _fact(self, cursor: _Cursor) -> None:
    name = cursor.text()
    if name in self.facts:
      raise ValueError(f"{self.path} has the key {name[:80]!r} twice")
    self.facts[name] = cursor.value(cursor.unpack("I")[0])

  def _tensor(self, cursor: _Cursor) -> tuple[str, int]:
    """(checkpoint name, offset) of the next tensor; its entry is kept."""
    held = cursor.text()
    where = f"{self.path}: tensor {held[:80]!r}"
    name = gguf_layout.checkpoint_name(held)
    if name is None:
      raise ValueError(f"{where} is none of a plain Llama")
    (rank,) = cursor.unpack("I")
    if not 1 <= rank <= MAX_RANK:
      raise ValueError(f"{where} has {rank} axes; 1 to {MAX_RANK} are allowed")
    shape = tuple(reversed(cursor.unpack(f"{rank}Q")))
    kind, offset = cursor.unpack("IQ")
    if kind in _FLOATS:
      self.entries[name] = Entry(_FLOATS[kind], shape)
    elif kind in _BLOCKS and rank == 2 and shape[-1] % gguf_layout.BLOCK == 0:
      block = _BLOCKS[kind]
      self.blocks[name.removesuffix(".weight")] = block
      self.entries[name] = Entry("U8", (shape[0], shape[1] // gguf_layout.BLOCK * gguf_layout.BYTES[block]))
    else:
      raise ValueError(f"{where} is of ggml type {kind} and shape {list(shape)}; read here are floats, and Q8_0 and MXFP4 of [N, 32 n]")
    return name, offset

  def _place(self, offsets: dict[str, int], start: int, alignment: int, size: int) -> None:
    end = 0
    for name, offset in sorted(offsets.items(), key=lambda item: item[1]):
      if offset != -(-end // alignment) * alignment:
        raise ValueError(f"{self.path}: tensor {name!r} starts at byte {offset} of the data; the one before it ends at {end}")
      end = offset + self.entries[name].nbytes
      self._places[name] = start + offset
    if start + end > size:
      raise ValueError(f"{self.path} is cut off: its tensors end at byte {start + end}, the file at {size}")

  def _check_rows(self) -> None:
    for name, entry in self.entries.items():
      heads = gguf_layout.heads_of(name, *self._heads)
      if heads is not None and entry.shape[0] % (2 * heads):
        raise ValueError(f"{self.path}: tensor {name!r} has {entry.shape[0]} rows, which {heads} heads do not share")

  def _number(self, name: str, default: int | None = None) -> int:
    value = self.facts.get(name, default)
    if type(value) is not int or not 1 <= value < 2**31:
      raise ValueError(f"{self.path}: {name} is {str(value)[:40]}; a positive integer is needed")
    return value


class _Cursor:
  """Reads a header front to back, never past the end of the file."""

  def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
    self._file, self._size, self._path = file, size, path
    self.place = 0

  def take(self, count: int) -> bytes:
    if count > min(self._size - self.place, MAX_TEXT):
      raise ValueError(f"{self._path} is damaged: {count} bytes are announced at byte {self.place} of {self._size}")
    self.place += count
    return self._file.read(count)

  def unpack(self, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

  def enough(self, count: int, least: int, what: str) -> None:
    if count > (self._size - self.place) // least:
      raise ValueError(f"{self._path} is damaged: {count} {what} do not fit into its {self._size} bytes")

  def text(self) -> str:
    (count,) = self.unpack("Q")
    try:
      return self.take(count).decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"{self._path} is damaged: a text before byte {self.place} is no UTF-8") from error

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.text()
    if kind in _SCALARS:
      (value,) = self.unpack(_SCALARS[kind])
      return value
    if kind != _ARRAY:
      raise ValueError(f"{self._path} is damaged: a value before byte {self.place} is of type {kind}")
    inner, count = self.unpack("IQ")
    if inner == _STRING:
      self.enough(count, 8, "texts")
      return [self.text() for _ in range(count)]
    if inner not in _SCALARS:
      raise ValueError(f"{self._path}: an array before byte {self.place} holds values of type {inner}")
    self.enough(count, struct.calcsize(f"<{_SCALARS[inner]}"), "values")
    return list(self.unpack(f"{count}{_SCALARS[inner]}"))
