"""A quantizer of values that are not known before the model runs, as QuantizeLinear and DequantizeLinear or as arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from core.export.onnx_builder import Builder
from core.export.onnx_groups import Groups, Tiles, groups_of, tiles_of
from core.export.onnx_piece import OnnxOptions, Piece
from core.export.onnx_types import fills, rounding_type
from core.formats import FloatFormat, IntFormat

Shape = tuple[int | None, ...]


def fake_quantized(b: Builder, x: Any, shape: Shape, piece: Piece, options: OnnxOptions) -> Any:
  """The float32 value of x after quantizing and dequantizing.

  Args:
    b: builder.
    x: float32 value.
    shape: of x, None where a length is not known.
    piece: the quantizer.
    options: how to write it.

  Raises:
    ValueError: standard operators cannot express the quantizer; the message names it and says what can be done.
  """
  element = piece.spec.element
  if not isinstance(element, IntFormat | FloatFormat):
    raise ValueError(f"quantizer {piece.name!r}: rounding inputs to {element.name} cannot be written as ONNX; disable it to export")
  tiles = tiles_of(shape, piece)
  tiled = _Tiled(b, x, shape, tiles)
  groups = groups_of(b, tiled.enter, shape, tiles, piece, options)
  container = rounding_type(element, options)
  if container is None or groups.linear is None:
    scaled = b.op("Mul", tiled.enter(), groups.inverse)
    levels = _to_level(b, scaled, element) if container is None else _through_codes(b, scaled, groups, piece, container)
    return tiled.leave(b.op("Mul", levels, groups.step))
  place = {"axis": groups.axis, "block_size": groups.size}
  zero = [] if groups.zero_point is None else [groups.zero_point]
  if options.form == "standard" and fills(element, container):
    codes = b.op("QuantizeLinear", x, groups.linear, *zero, name="codes", output_dtype=None if zero else int(container), **place)
  else:
    scaled = _saturated(b, tiled.leave(b.op("Mul", tiled.enter(), groups.inverse)), groups, piece, container)
    one = b.scalar(1.0) if not zero else b.constant("ones", np.ones(groups.zero_shape, np.float32))
    at = {"axis": groups.axis} if zero else {}
    codes = b.op("QuantizeLinear", scaled, one, *zero, name="codes", output_dtype=None if zero else int(container), **at)
  return b.op("DequantizeLinear", codes, groups.linear, *zero, name="DequantizeLinear", **place)


class _Tiled:
  """An input and its tiled view."""

  def __init__(self, b: Builder, x: Any, shape: Shape, tiles: Tiles) -> None:
    self._b, self._x, self._shape, self._tiles = b, x, shape, tiles
    self._view: Any = None

  def enter(self) -> Any:
    """The tiled view (`core.blocks.to_blocks`)."""
    b, x = self._b, self._x
    if self._view is not None or not self._tiles.sizes:
      return x if self._view is None else self._view
    if self._tiles.pad:
      ends = dict(self._tiles.pad)
      x = b.op("Pad", x, b.integers(*[0] * len(self._shape), *(ends.get(i, 0) for i in range(len(self._shape)))))
    self._view = b.op("Reshape", x, b.integers(*self._tiles.tiled), name="blocks")
    return self._view

  def leave(self, y: Any) -> Any:
    """The inverse of `enter`."""
    b = self._b
    if not self._tiles.sizes:
      return y
    y = b.op("Reshape", y, b.integers(*self._tiles.whole))
    for axis, _ in self._tiles.pad:
      length = self._shape[axis]
      y = b.op("Slice", y, b.integers(0), b.integers(int(length or 0)), b.integers(axis))
    return y


def _through_codes(b: Builder, scaled: Any, groups: Groups, piece: Piece, container: Any) -> Any:
  """Levels by way of codes, for scales of a shape that DequantizeLinear does not take."""
  if groups.zero_point is not None:
    raise ValueError(f"quantizer {piece.name!r}: zero points of blocks of inputs cannot be written as ONNX; use one per tensor or channel")
  scaled = _saturated(b, scaled, groups, piece, container)
  codes = b.op("QuantizeLinear", scaled, b.scalar(1.0), name="codes", output_dtype=int(container))
  return b.op("DequantizeLinear", codes, b.scalar(1.0), name="levels")


def _saturated(b: Builder, scaled: Any, groups: Groups, piece: Piece, container: Any) -> Any:
  """Scaled values cut to the format's range where the container's is wider."""
  element = piece.spec.element
  if fills(element, container) or not isinstance(element, IntFormat):
    return scaled
  low, high = float(element.min_code), float(element.max_code)
  if groups.zero_point is None:
    return b.op("Clip", scaled, b.scalar(low), b.scalar(high))
  zero = groups.zero_spread
  return b.op("Min", b.op("Max", scaled, b.constant("low", low - zero)), b.constant("high", high - zero))


def _to_level(b: Builder, v: Any, fmt: FloatFormat | IntFormat) -> Any:
  """`core.rounding.to_level` in float arithmetic: every quotient by the distance of neighbouring levels is exact."""
  if isinstance(fmt, IntFormat):
    return b.op("Round", b.op("Clip", v, b.scalar(float(fmt.min_code)), b.scalar(float(fmt.max_code))), name="levels")
  v = b.op("Clip", v, b.scalar(-fmt.bound if fmt.signed else 0.0), b.scalar(fmt.bound))
  magnitude = b.op("Abs", v)
  quantum = b.scalar(2.0 ** (fmt.min_exponent - fmt.mantissa_bits))
  for exponent in range(fmt.min_exponent + 1, fmt.max_exponent + 1):
    above = b.op("GreaterOrEqual", magnitude, b.scalar(2.0**exponent))
    quantum = b.op("Where", above, b.scalar(2.0 ** (exponent - fmt.mantissa_bits)), quantum)
  return b.op("Mul", b.op("Round", b.op("Div", v, quantum)), quantum, name="levels")
