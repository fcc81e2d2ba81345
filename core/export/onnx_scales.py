"""Scales that depend on the input, as standard ONNX operators: the rules of `core.scaling`, operation by operation.

Every function gives the bits of its counterpart in `core.scaling` on finite inputs (tests/onnx/test_graphs.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from core import scaling
from core.export.onnx_builder import Builder
from core.export.onnx_piece import Piece
from core.formats import E4M3, E8M0, FloatFormat
from core.spec import QuantSpec


class Steps(NamedTuple):
  """The float32 that levels are multiplied by, and what values are multiplied by before they are rounded (0 in zero groups)."""

  step: Any
  inverse: Any


def dynamic_steps(b: Builder, amax: Any, piece: Piece) -> Steps:
  """Steps of the groups of an input.

  Args:
    b: builder.
    amax: float32 value, the groups' largest magnitudes.
    piece: the quantizer.

  Raises:
    ValueError: the rule needs more than standard operators; names the quantizer.
  """
  spec = piece.spec
  what = _not_expressible(spec)
  if what is not None:
    raise ValueError(f"quantizer {piece.name!r}: {what} taken from each input cannot be written as ONNX; make it static or disable it")
  if spec.scale_format == E8M0:
    return _power_of_two(b, amax, spec)
  if spec.two_level:
    return _two_level(b, amax, piece)
  return _float32(b, amax, spec)


def _not_expressible(spec: QuantSpec) -> str | None:
  if spec.four_over_six:
    return "four-over-six scales"
  if spec.zero_point:
    return "a zero point"
  if spec.scale_format not in (None, E8M0, E4M3):
    return f"{spec.scale_format.name} scales"
  return None


def _limited(b: Builder, amax: Any) -> tuple[Any, Any]:
  """`scaling.limit_amax`."""
  zero = b.op("Less", amax, b.scalar(scaling.ZERO_BELOW), name="is_zero")
  return b.op("Where", zero, b.scalar(1.0), b.op("Min", amax, b.scalar(scaling.AMAX_LIMIT))), zero


def _inverse(b: Builder, step: Any, zero: Any) -> Any:
  return b.op("Where", zero, b.scalar(0.0), b.op("Div", b.scalar(1.0), step), name="inverse")


def _float32(b: Builder, amax: Any, spec: QuantSpec) -> Steps:
  limited, zero = _limited(b, amax)
  step = b.op("Where", zero, b.scalar(1.0), b.op("Div", limited, b.scalar(spec.element_bound)), name="scale")
  return Steps(step, _inverse(b, step, zero))


def _floor_power(b: Builder, amax: Any) -> Any:
  """The largest power of two that is not above amax, exactly: a table, entered by an approximate logarithm, then compared."""
  table = b.shared("powers_of_two", np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32))
  log = b.op("Mul", b.op("Log", amax), b.scalar(float(np.float32(1 / math.log(2)))))
  index = b.op("Clip", b.op("Floor", log), b.scalar(-125.0), b.scalar(126.0))
  index = b.cast(b.op("Add", index, b.scalar(126.0)), b.ir.DataType.INT64)
  power = b.op("Gather", table, index, axis=0)
  power = b.op("Where", b.op("Greater", power, amax), b.op("Mul", power, b.scalar(0.5)), power)
  twice = b.op("Mul", power, b.scalar(2.0))
  return b.op("Where", b.op("GreaterOrEqual", amax, twice), twice, power)


def _power_of_two(b: Builder, amax: Any, spec: QuantSpec) -> Steps:
  """`scaling.e8m0_code`: all its rules compare amax with a power of two times a constant, which is exact."""
  limited, zero = _limited(b, amax)
  element, rule = spec.element, spec.e8m0_rule
  bound = spec.element_bound
  exponent = element.max_exponent if isinstance(element, FloatFormat) else math.floor(math.log2(bound))
  power = _floor_power(b, limited)
  if rule == "rceil":  # the least p with amax <= bound * p; mantissa is that of bound over its own power of two
    mantissa = bound / 2.0 ** math.floor(math.log2(bound))
    exponent = math.floor(math.log2(bound))
    power = _next_power(b, power, "Greater", limited, mantissa)
  elif rule == "ceil":
    power = _next_power(b, power, "Greater", limited, 1.0)
  elif rule == "even":
    bits = element.mantissa_bits if isinstance(element, FloatFormat) else element.bits - 2
    power = _next_power(b, power, "GreaterOrEqual", limited, 2.0 - 2.0 ** -(bits + 1))
  step = b.op("Mul", power, b.scalar(2.0**-exponent))
  step = b.op("Where", zero, b.scalar(1.0), b.op("Max", step, b.scalar(2.0**-126)), name="scale")
  return Steps(step, _inverse(b, step, zero))


def _next_power(b: Builder, power: Any, compare: str, amax: Any, factor: float) -> Any:
  """Twice the power where amax lies beyond factor times it."""
  above = b.op(compare, amax, power if factor == 1.0 else b.op("Mul", power, b.scalar(factor)))
  return b.op("Where", above, b.op("Mul", power, b.scalar(2.0)), power)


def _two_level(b: Builder, amax: Any, piece: Piece) -> Steps:
  """`scaling._two_level`; the tensor scale is a constant where it was calibrated."""
  spec = piece.spec
  tensor_scale, unit, zero_tensor = _calibrated(b, piece) if piece.amax is not None else _measured(b, amax, spec)
  block, zero = _limited(b, amax)
  zero = zero if zero_tensor is None else b.op("Or", zero, zero_tensor)
  low, high = b.op("Mul", unit, b.scalar(2.0**-10)), b.op("Mul", unit, b.scalar(2.0**9))
  target = b.op("Div", b.op("Min", b.op("Max", block, low), high), unit)
  target = b.op("Clip", target, b.scalar(scaling.BLOCK_SCALE_MIN), b.scalar(E4M3.bound))
  target = b.op("Where", zero, b.scalar(1.0), target)
  codes = b.op("QuantizeLinear", target, b.scalar(1.0), name="block_scale", output_dtype=int(b.ir.DataType.FLOAT8E4M3FN))
  step = b.op("DequantizeLinear", codes, tensor_scale, name="scale")
  return Steps(step, _inverse(b, step, zero))


def _calibrated(b: Builder, piece: Piece) -> tuple[Any, Any, Any]:
  tensor_amax = np.asarray(piece.amax, np.float32).reshape(())
  tensor_scale = core_tensor_scale(tensor_amax, piece.spec)
  zero = b.scalar(True, np.bool_) if tensor_amax < scaling.ZERO_BELOW else None
  unit = tensor_scale * np.float32(piece.spec.element_bound)
  return b.constant("tensor_scale", tensor_scale), b.constant("unit", unit), zero


def _measured(b: Builder, amax: Any, spec: QuantSpec) -> tuple[Any, Any, Any]:
  limited, zero = _limited(b, b.op("ReduceMax", amax, keepdims=0, name="tensor_amax"))
  tensor_scale = b.op("Div", limited, b.scalar(spec.element_bound * E4M3.bound))
  tensor_scale = b.op("Where", zero, b.scalar(1.0), tensor_scale, name="tensor_scale")
  return tensor_scale, b.op("Mul", tensor_scale, b.scalar(spec.element_bound)), zero


def core_tensor_scale(tensor_amax: np.ndarray, spec: QuantSpec) -> np.ndarray:
  """[] float32 tensor scale of a two-level specification, from `core`."""
  scales = scaling.scales(np.ones((1,), np.float32), spec, tensor_amax)
  return np.asarray(scales.tensor_scale, np.float32).reshape(())
