"""Which ONNX type holds the codes of a format."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from core import encoding
from core.export.onnx_packages import package
from core.export.onnx_piece import OnnxOptions
from core.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FloatFormat, Format, IntFormat

INT2_OPSET = 25


class Storage(NamedTuple):
  """How codes are stored.

  Attributes:
    dtype: onnx_ir.DataType of the initializer.
    table: float32 level of every code where the type does not say it, else None.
    recode: stored code of every code, uint8, where the two differ (6-bit floats are stored as E4M3), else None.
  """

  dtype: Any
  table: np.ndarray | None = None
  recode: np.ndarray | None = None


def storage(element: Format, options: OnnxOptions) -> Storage:
  """The smallest type of the operator set that holds the codes."""
  types = package("onnx_ir").DataType
  if isinstance(element, IntFormat):
    return Storage(integer_type(element, options))
  if element in (E4M3, E5M2):
    return Storage(types.FLOAT8E4M3FN if element == E4M3 else types.FLOAT8E5M2)
  if element == E2M1 and options.fp4 == "native":
    return Storage(types.FLOAT4E2M1)
  codes = np.arange(1 << element.bits)
  if element in (E2M3, E3M2):  # every level of the 6-bit formats is one of E4M3
    return Storage(types.FLOAT8E4M3FN, None, encoding.encode(encoding.decode(codes, element), E4M3))
  return Storage(types.UINT4 if element.bits <= 4 else types.UINT8, np.asarray(encoding.decode(codes, element), np.float32))


def integer_type(element: IntFormat, options: OnnxOptions) -> Any:
  """The smallest integer type with the codes of `element`."""
  types = package("onnx_ir").DataType
  if element.bits <= 2 and options.opset >= INT2_OPSET:
    return types.INT2 if element.signed else types.UINT2
  if element.bits <= 4:
    return types.INT4 if element.signed else types.UINT4
  return types.INT8 if element.signed else types.UINT8


def rounding_type(element: Format, options: OnnxOptions) -> Any:
  """The type that QuantizeLinear rounds to as `core.rounding` does, or None where arithmetic must do it."""
  if isinstance(element, IntFormat):
    return integer_type(element, options)
  kind = storage(element, options) if isinstance(element, FloatFormat) else None
  return kind.dtype if kind is not None and kind.table is None and kind.recode is None else None


def fills(element: Format, dtype: Any) -> bool:
  """Whether saturation of the type is that of the format: all of its codes are used."""
  return not isinstance(element, IntFormat) or (element.bits == dtype.bitwidth and not element.narrow_range)


def stored_codes(codes: np.ndarray, kind: Storage) -> np.ndarray:
  """Codes (int8 or uint8) as an array of the stored type."""
  codes = np.ascontiguousarray(codes if kind.recode is None else kind.recode[codes])
  return as_type(codes, kind.dtype)


def as_type(codes: np.ndarray, dtype: Any) -> np.ndarray:
  """Integers by value, codes of floats by their bits."""
  return codes.astype(dtype.numpy()) if dtype.is_integer() else codes.view(dtype.numpy())
