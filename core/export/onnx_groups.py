"""Which elements of an input share a scale, and that scale: a constant after calibration, or computed from the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from core import scaling
from core.export.onnx_builder import Builder
from core.export.onnx_piece import OnnxOptions, Piece
from core.export.onnx_scales import dynamic_steps
from core.export.onnx_types import as_type, integer_type
from core.formats import IntFormat
from core.spec import QuantSpec

Shape = tuple[int | None, ...]


class Tiles(NamedTuple):
  """How an input of possibly unknown lengths is cut into groups (`core.blocks.Tiling` with unknown lengths).

  Attributes:
    sizes: axis of the input -> (blocks, block size), for axes that are cut.
    tiled: target of the Reshape into the tiled view; 0 keeps a length, one -1 stands for an unknown one.
    whole: target of the Reshape back.
    reduce: axes of the tiled view that share a scale; None is all of them.
    pad: (axis, missing elements) of last blocks that are not full.
  """

  sizes: dict[int, tuple[int, int]]
  tiled: tuple[int, ...]
  whole: tuple[int, ...]
  reduce: tuple[int, ...] | None
  pad: tuple[tuple[int, int], ...]


class Groups(NamedTuple):
  """Scales of the groups of an input.

  Attributes:
    step, inverse: float32, broadcast against the tiled view.
    linear: the step as QuantizeLinear and DequantizeLinear take it, or None where they cannot.
    axis, size: attributes of those.
    zero_point: in the type of the codes, of the shape of `linear`; or None.
    zero_shape: that shape.
    zero_spread: float32 zero point that broadcasts against the input.
  """

  step: Any
  inverse: Any
  linear: Any = None
  axis: int | None = None
  size: int | None = None
  zero_point: Any = None
  zero_shape: tuple[int, ...] = ()
  zero_spread: Any = None


def tiles_of(shape: Shape, piece: Piece) -> Tiles:
  """The tiling of an input.

  Raises:
    ValueError: blocks along an axis of unknown length, or more unknown lengths than a Reshape can carry.
  """
  spec, rank = piece.spec, len(shape)
  if spec.blocks is None:
    kept = {axis % rank for axis in spec.axis or ()}
    return Tiles({}, (), (), None if spec.axis is None else tuple(i for i in range(rank) if i not in kept), ())
  sizes, whole_axes, pad = {}, set(), []
  for axis, size in ((axis % rank, size) for axis, size in spec.blocks):
    length = shape[axis]
    if size is not None and length is None:
      raise ValueError(f"quantizer {piece.name!r} cuts axis {axis} into blocks of {size}; export with a fixed length of that axis")
    if size is None or (length is not None and size >= length):
      whole_axes.add(axis)
    elif length is not None:
      sizes[axis] = (-(-length // size), size)
      if length % size:
        pad.append((axis, -length % size))
  tiled, reduce = _tiled_shape(shape, sizes, whole_axes, piece)
  whole = tuple(0 if i < min(sizes, default=0) else (-1 if n is None else n) for i, n in enumerate(shape))
  whole = tuple(sizes[i][0] * sizes[i][1] if i in sizes else n for i, n in enumerate(whole))
  return Tiles(sizes, tiled, whole, None if len(reduce) == len(tiled) else reduce, tuple(pad))


def _tiled_shape(shape: Shape, sizes: dict[int, tuple[int, int]], whole: set[int], piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
  tiled: list[int] = []
  reduce: list[int] = []
  for i, n in enumerate(shape):
    if i in sizes:
      reduce.append(len(tiled) + 1)
      tiled += sizes[i]
      continue
    if i in whole:
      reduce.append(len(tiled))
    tiled.append(0 if i == len(tiled) else -1 if n is None else n)  # 0 keeps the length of the axis of the same number
  if tiled.count(-1) > 1:
    raise ValueError(f"quantizer {piece.name!r}: several axes behind its blocks have no fixed length; export with fixed ones")
  return tuple(tiled), tuple(reduce)


def groups_of(b: Builder, enter: Callable[[], Any], shape: Shape, tiles: Tiles, piece: Piece, options: OnnxOptions) -> Groups:
  """Scales of an input.

  Args:
    b: builder.
    enter: gives the tiled view.
    shape: of the input.
    tiles: of the input.
    piece: the quantizer.
    options: how to write it.
  """
  dynamic_blocks = piece.spec.two_level and piece.spec.dynamic  # a given amax is the tensor's
  if piece.amax is not None and not dynamic_blocks:
    return _constant(b, len(shape), tiles, piece, options)
  magnitude = b.op("Abs", enter())
  if tiles.reduce is None:
    magnitude = b.op("ReduceMax", magnitude, keepdims=0, name="amax")
  elif tiles.reduce:
    magnitude = b.op("ReduceMax", magnitude, b.integers(*tiles.reduce), keepdims=1, name="amax")
  steps = dynamic_steps(b, magnitude, piece)
  if tiles.reduce is None:
    return Groups(steps.step, steps.inverse, steps.step)
  if len(tiles.reduce) == 1 and not tiles.sizes:
    axis = tiles.reduce[0]
    return Groups(steps.step, steps.inverse, steps.step if shape[axis] else None, axis, shape[axis])
  if len(tiles.reduce) == 1 and not tiles.pad:
    ((axis, (_, size)),) = tiles.sizes.items()
    return Groups(steps.step, steps.inverse, b.op("Squeeze", steps.step, b.integers(axis + 1)), axis, size)
  if len(tiles.reduce) == len(shape) - 1 and not tiles.sizes:
    axis = next(i for i in range(len(shape)) if i not in tiles.reduce)
    return Groups(steps.step, steps.inverse, b.op("Reshape", steps.step, b.integers(-1)), axis)
  return Groups(steps.step, steps.inverse)


def _constant(b: Builder, rank: int, tiles: Tiles, piece: Piece, options: OnnxOptions) -> Groups:
  spec = piece.spec
  if spec.four_over_six:
    raise ValueError(f"quantizer {piece.name!r}: four-over-six chooses scales by each input, which ONNX cannot; use it for weights only")
  tensor_amax = None if piece.tensor_amax is None else np.asarray(piece.tensor_amax, np.float32)
  scales = scaling.scales(np.asarray(piece.amax, np.float32), spec, tensor_amax)
  step, inverse = (_spread(value, rank, tiles) for value in (scales.step, scales.inv_step))
  if step.size == 1:
    place, axis = (), None
  else:
    longer = [i for i, n in enumerate(step.shape) if n > 1]
    place, axis = (-1,), longer[0]
    if len(longer) > 1 or tiles.sizes:
      return Groups(b.constant("scale", step), b.constant("inverse", inverse), zero_point=scales.zero_point)
  linear = b.constant("scale", step.reshape(place))
  spread = linear if axis is None else b.constant("scale_spread", step)
  groups = Groups(spread, b.constant("inverse", inverse.reshape(()) if axis is None else inverse), linear, axis)
  return (
    groups if scales.zero_point is None else _with_zero_point(b, groups, np.asarray(scales.zero_point), place, rank, tiles, spec, options)
  )


def _with_zero_point(
  b: Builder, groups: Groups, zero: np.ndarray, place: tuple[int, ...], rank: int, tiles: Tiles, spec: QuantSpec, options: OnnxOptions
) -> Groups:
  if not isinstance(spec.element, IntFormat):
    raise ValueError(f"a zero point needs an integer format, got {spec.element.name}")
  flat = zero.reshape(place)
  value = b.constant("zero_point", as_type(flat, integer_type(spec.element, options)))
  return groups._replace(zero_point=value, zero_shape=flat.shape, zero_spread=np.asarray(_spread(zero, rank, tiles), np.float32))


def _spread(scale: Any, rank: int, tiles: Tiles) -> np.ndarray:
  """Scales of `core`, which may lack leading axes, in a shape that broadcasts against the tiled view."""
  scale = np.asarray(scale)
  if scale.size == 1:
    return scale.reshape(())
  scale = scale.reshape((1,) * (rank - scale.ndim) + scale.shape)
  for axis in sorted(tiles.sizes, reverse=True):
    scale = np.expand_dims(scale, axis + 1)
  return scale
