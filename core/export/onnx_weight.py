"""A stored weight as initializers and DequantizeLinear: the products of `core.dequantize`, in its order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import core
from core import blocks
from core.export.onnx_builder import Builder
from core.export.onnx_piece import OnnxOptions, Piece
from core.export.onnx_types import as_type, storage, stored_codes
from core.formats import E8M0, UINT8
from core.quantize import step_of
from core.spec import QuantSpec


class Grouping(NamedTuple):
  """Along which axis scales change: `axis` None is one scale, `size` None one per index of the axis, else blocks of `size`."""

  axis: int | None
  size: int | None


def dequantized(b: Builder, piece: Piece, options: OnnxOptions) -> Any:
  """The float32 value of a stored weight.

  Codes and scales are initializers named after the quantizer: `<name>.codes`, `<name>.scale`, and `<name>.tensor_scale` of two-level
  scales. Blocks over several axes are written as blocks along one, their scales repeated along the others.
  """
  q = piece.weight
  if q is None:
    raise ValueError(f"quantizer {piece.name!r} has no stored weight")
  grouping, repeat = _grouping(q.shape, q.spec)
  kind = storage(q.spec.element, options)
  codes = b.has("codes") or b.constant("codes", stored_codes(np.asarray(q.codes), kind))
  scale = _scale(b, q, grouping, repeat, options)
  if kind.table is None:
    zero = [] if q.zero_point is None else [b.constant("zero_point", as_type(_fit(np.asarray(q.zero_point), grouping, repeat), kind.dtype))]
    return b.op("DequantizeLinear", codes, scale, *zero, name="DequantizeLinear", axis=grouping.axis, block_size=grouping.size)
  index = b.cast(b.op("DequantizeLinear", codes, b.scalar(1.0)) if kind.dtype.bitwidth < 8 else codes, b.ir.DataType.INT32)
  levels = b.op("Gather", b.shared(f"levels.{q.spec.element.name}", kind.table), index, axis=0, name="levels")
  return _times(b, levels, scale, q.shape, grouping)


def _scale(b: Builder, q: core.QuantizedTensor, grouping: Grouping, repeat: dict[int, tuple[int, int]], options: OnnxOptions) -> Any:
  """The float32 step of every group, in the shape that DequantizeLinear takes, from what is stored."""
  fmt, stored = q.spec.scale_format, np.asarray(q.scale)
  if fmt == E8M0 and options.fp4 == "native" and options.opset >= 24 and int(stored.min()) > 0:
    codes = b.constant("scale", as_type(_fit(stored, grouping, repeat), b.ir.DataType.FLOAT8E8M0))
    return b.cast(codes, b.ir.DataType.FLOAT, "scale_value")
  if q.spec.two_level:
    codes = b.constant("scale", as_type(_fit(stored, grouping, repeat), b.ir.DataType.FLOAT8E4M3FN))
    tensor_scale = b.constant("tensor_scale", np.asarray(q.tensor_scale, np.float32).reshape(()))
    return b.op("DequantizeLinear", codes, tensor_scale, name="scale_value")
  if fmt == UINT8 and not repeat and grouping.axis == stored.ndim - 1:
    second = np.asarray(q.tensor_scale, np.float32)
    size = min(q.spec.scale_block or stored.shape[-1], stored.shape[-1])
    return b.op(
      "DequantizeLinear", b.constant("scale", stored), b.constant("second_scale", second), name="scale_value", axis=-1, block_size=size
    )
  return b.constant("scale", _fit(np.asarray(step_of(q), np.float32), grouping, repeat))


def _times(b: Builder, levels: Any, scale: Any, shape: tuple[int, ...], grouping: Grouping) -> Any:
  """levels * scale, the scale spread over its groups."""
  if grouping.axis is None:
    return b.op("Mul", levels, scale, name="weight")
  axis, size, n = grouping.axis, grouping.size, shape[grouping.axis]
  if size is None:
    return b.op("Mul", levels, b.op("Reshape", scale, b.integers(*(n if i == axis else 1 for i in range(len(shape))))), name="weight")
  count = -(-n // size)
  if count * size != n:
    ends = [0] * len(shape) + [count * size - n if i == axis else 0 for i in range(len(shape))]
    levels = b.op("Pad", levels, b.integers(*ends))
  tiles = b.op("Reshape", levels, b.integers(*shape[:axis], count, size, *shape[axis + 1 :]))
  product = b.op("Mul", tiles, b.op("Unsqueeze", scale, b.integers(axis + 1)))
  product = b.op("Reshape", product, b.integers(*shape[:axis], count * size, *shape[axis + 1 :]), name="weight")
  return product if count * size == n else b.op("Slice", product, b.integers(0), b.integers(n), b.integers(axis))


def _grouping(shape: tuple[int, ...], spec: QuantSpec) -> tuple[Grouping, dict[int, tuple[int, int]]]:
  """The grouping, and how scales are repeated along other axes: axis -> (times, length)."""
  tiling = blocks.tiling(shape, spec)
  if not tiling.scales or all(n == 1 for n in tiling.scales):
    return Grouping(None, None), {}
  if spec.blocks is None and sum(n > 1 for n in tiling.scales) == 1:
    return Grouping(next(i for i, n in enumerate(tiling.scales) if n > 1), None), {}
  sizes = {i: -(-padded // count) for i, (padded, count) in enumerate(zip(tiling.padded, tiling.scales, strict=True))}
  axis = max(sizes, key=lambda i: (sizes[i], i))
  return Grouping(axis, sizes[axis]), {i: (size, shape[i]) for i, size in sizes.items() if i != axis and size > 1}


def _fit(scale: np.ndarray, grouping: Grouping, repeat: dict[int, tuple[int, int]]) -> np.ndarray:
  """Scales as DequantizeLinear takes them: [], [n] of one axis, or one per block with the tensor's rank."""
  if grouping.axis is None:
    return scale.reshape(())
  if grouping.size is None:
    return scale.reshape(-1)
  for axis, (times, length) in repeat.items():
    scale = np.repeat(scale, times, axis)
    scale = scale[tuple(slice(0, length) if i == axis else slice(None) for i in range(scale.ndim))]
  return np.ascontiguousarray(scale)
