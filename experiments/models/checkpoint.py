"""Tensors of a Hugging Face folder in safetensors, as numpy arrays and without torch.

A safetensors file is an 8-byte little-endian length, a JSON header of that length (name -> dtype, shape, byte range) and the bytes.
References: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the limit of the format itself
_NATIVE = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_NARROW = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def _dtype(kind: object, what: str) -> np.dtype:
  if kind in _NATIVE:
    return np.dtype(_NATIVE[kind])
  if kind not in _NARROW:
    raise ValueError(f"{what} has type {kind!r}; supported are {', '.join([*_NATIVE, *_NARROW])}")
  try:
    import ml_dtypes
  except ImportError as error:
    raise ImportError(f"{what} has type {kind!r}, which numpy knows through ml_dtypes only; run pip install ml_dtypes") from error
  return np.dtype(getattr(ml_dtypes, _NARROW[kind]))


def read_file(path: str | Path) -> dict[str, np.ndarray]:
  """Every tensor of one safetensors file, read-only and mapped from the disk: nothing is read before it is used.

  Raises:
    FileNotFoundError: no such file.
    ImportError: bfloat16 or float8 tensors, and ml_dtypes is not installed.
    ValueError: the file is damaged, or holds an unknown type.
  """
  path = Path(path)
  size = path.stat().st_size
  with path.open("rb") as file:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(size - 8, _MAX_HEADER):
      raise ValueError(f"{path} is no safetensors file: {size} bytes, a header of {length} bytes announced")
    try:
      header = json.loads(file.read(length))
    except ValueError as error:
      raise ValueError(f"{path} is no safetensors file: its header is not JSON ({error})") from error
  begin = 8 + length
  data = np.memmap(path, np.uint8, "r") if size > begin else np.zeros(size, np.uint8)
  return {name: _tensor(path, name, entry, data[begin:]) for name, entry in header.items() if name != "__metadata__"}


def _tensor(path: Path, name: str, entry: Mapping[str, object], data: np.ndarray) -> np.ndarray:
  try:
    kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[misc]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: the header entry of tensor {name!r} is damaged: {entry}") from error
  dtype = _dtype(kind, f"{path}: tensor {name!r}")
  needed = math.prod(shape) * dtype.itemsize
  if not 0 <= first <= last <= data.size or last - first != needed:
    raise ValueError(f"{path}: tensor {name!r} of shape {list(shape)} needs {needed} bytes, its range is {first}..{last} of {data.size}")
  # The format does not align tensors; numpy reads an unaligned view correctly, if slower.
  return data[first:last].view(dtype).reshape(shape)


def read_folder(folder: str | Path) -> dict[str, np.ndarray]:
  """Every tensor of a model folder: `model.safetensors`, or the files that `model.safetensors.index.json` names.

  Raises:
    FileNotFoundError: neither is there, or a file that the index names is missing.
    ValueError: the index leads out of the folder or names tensors that its files do not hold.
  """
  folder = Path(folder)
  if (folder / _SINGLE).is_file():
    return read_file(folder / _SINGLE)
  index = folder / _INDEX
  if not index.is_file():
    raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}; convert the model with transformers' save_pretrained")
  weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
  files = {name: read_file(_inside(folder, name, index)) for name in sorted(set(weight_map.values()))}
  absent = [tensor for tensor, name in weight_map.items() if tensor not in files[name]]
  if absent:
    raise ValueError(f"{index} places {_some(absent)} in files that do not hold them")
  return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


def _inside(folder: Path, name: str, index: Path) -> Path:
  # An index is somebody else's data: it must not make us open files elsewhere. Links are allowed, hub caches consist of them.
  if name != Path(name).name or name in ("", ".", ".."):
    raise ValueError(f"{index} names the file {name!r}, which is not a plain file name inside the folder")
  if not (folder / name).is_file():
    raise FileNotFoundError(f"{folder / name} does not exist, but {index.name} names it")
  return folder / name


def check(
  tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], folder: str | Path, ignored: Callable[[str], bool]
) -> None:
  """Compare what a folder holds with what the model built from its `config.json` needs.

  Args:
    tensors: what the folder holds.
    shapes: what the model needs.
    folder: for the message.
    ignored: tensors that may be there without being used.

  Raises:
    ValueError: tensors are missing, have another shape, or would go unused.
  """
  missing = [name for name in shapes if name not in tensors]
  wrong = [f"{n} is {list(tensors[n].shape)}, needed {list(s)}" for n, s in shapes.items() if n in tensors and tensors[n].shape != s]
  unused = [name for name in tensors if name not in shapes and not ignored(name)]
  problems = [
    f"{len(found)} {what}: {_some(found)}"
    for what, found in (("missing", missing), ("of the wrong shape", wrong), ("unused", unused))
    if found
  ]
  if problems:
    raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}")


def _some(names: Iterable[str], most: int = 6) -> str:
  names = list(names)
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
