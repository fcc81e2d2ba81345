"""The same kinds of faults in the initializers of a copy of an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.verify.job import package
from core.verify.onnx_client import INPUT, WEIGHT, load


class OnnxFault(NamedTuple):
  """One fault; fields as `faults.Fault`."""

  name: str
  text: str
  inject: Callable[[Any], int]
  needs: str


def _held(model: Any, role: str, part: str) -> list[Any]:
  return [t for t in model.graph.initializer if t.name.endswith(f".{part}") and f".{role}." in t.name]


def _array(tensor: Any) -> np.ndarray:
  return package("onnx.numpy_helper", "an ONNX file").to_array(tensor)


def _change(tensor: Any, array: np.ndarray) -> int:
  """Replace an initializer's values; 1 where that changes something."""
  old = _array(tensor)
  array = np.ascontiguousarray(array.astype(old.dtype)).reshape(old.shape)
  if array.tobytes() == old.tobytes():
    return 0
  tensor.CopyFrom(package("onnx.numpy_helper", "an ONNX file").from_array(array, tensor.name))
  return 1


def _nibbles(model: Any) -> int:
  changed = 0
  for tensor in _held(model, WEIGHT, "codes"):
    codes = _array(tensor)
    if "4" in codes.dtype.name and codes.shape[-1] % 2 == 0 and codes.dtype.itemsize == 1 and codes.dtype.name[-1] in "4n":
      pairs = codes.reshape(-1, 2)[:, ::-1]
      changed += _change(tensor, pairs.reshape(codes.shape))
  return changed


def _inverted(model: Any) -> int:
  return sum(_change(tensor, np.float32(1) / _array(tensor)) for tensor in _held(model, WEIGHT, "tensor_scale"))


def _dropped(model: Any) -> int:
  return sum(_change(tensor, np.ones(_array(tensor).shape, np.float32)) for tensor in _held(model, WEIGHT, "scale"))


def _transposed(model: Any) -> int:
  found = [tensor for tensor in _held(model, WEIGHT, "scale") if len(tensor.dims) == 2 and min(tensor.dims) > 1]
  return sum(_change(tensor, np.ascontiguousarray(_array(tensor).T)) for tensor in found)


def _one_scale(model: Any) -> int:
  for tensor in _held(model, WEIGHT, "scale"):
    held = _array(tensor)
    values = held.astype(np.float32).reshape(-1)
    if values.size > 1:
      values[0] = np.nextafter(values[0], np.float32(np.inf)) if held.dtype == np.float32 else values[0] * np.float32(2)
      return _change(tensor, values.reshape(held.shape))
  return 0


def _shifted(model: Any) -> int:
  zeros = _held(model, WEIGHT, "zero_point")
  changed = 0
  for tensor in zeros or _held(model, WEIGHT, "codes"):
    held = _array(tensor)
    top = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15, "int2": 1, "uint2": 3}.get(held.dtype.name)
    if top is not None and (zeros or held.dtype.name.startswith("int")):
      changed += _change(tensor, np.minimum(held.astype(np.int32) + 1, top))
  return changed


def _input_scale(model: Any) -> int:
  return sum(_change(tensor, _array(tensor) * np.float32(127 / 127.5)) for tensor in _held(model, INPUT, "scale"))


def _input_tensor_scale(model: Any) -> int:
  return sum(_change(tensor, _array(tensor) * np.float32(2)) for tensor in _held(model, INPUT, "tensor_scale"))


def _unquantized(model: Any) -> int:
  for tensor in model.graph.initializer:
    owned = f".{WEIGHT}." in tensor.name or f".{INPUT}." in tensor.name or tensor.name.startswith("constant.")
    if not owned and tensor.data_type == 1 and len(tensor.dims) == 1 and tensor.dims[0] > 8:
      return _change(tensor, _array(tensor) * np.float32(1.01))
  return 0


FAULTS = (
  OnnxFault("nibble order", "the two codes of every byte swapped", _nibbles, "4-bit codes"),
  OnnxFault("inverted tensor scale", "the reciprocal of the tensor scale", _inverted, "two-level scales"),
  OnnxFault("dropped scales", "all weight scales one", _dropped, "weight scales"),
  OnnxFault("transposed scales", "scales in column order", _transposed, "scales with several rows and columns"),
  OnnxFault("one scale", "one of all weight scales a step off", _one_scale, "several weight scales"),
  OnnxFault("shifted codes", "zero point, or symmetric codes, off by one", _shifted, "integer codes"),
  OnnxFault("input scale", "static input scales times 127 / 127.5", _input_scale, "static input scales of one level"),
  OnnxFault("input tensor scale", "tensor scales of inputs doubled", _input_tensor_scale, "two-level inputs"),
  OnnxFault("norm", "one unquantized vector 1 % too large", _unquantized, "an unquantized vector"),
)


def write_faulty(path: Path, fault: OnnxFault, target: Path) -> bool:
  """Write a copy of a file with one fault; whether it applies."""
  model = load(path)
  if not fault.inject(model):
    return False
  target.parent.mkdir(parents=True)
  package("onnx", "an ONNX file").save(model, str(target))
  return True
