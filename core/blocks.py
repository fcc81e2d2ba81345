"""Blocks: the only reshaping in the project. A tensor is viewed as tiles whose block axes are axes of their own; nothing is transposed.

A blocked axis of length K becomes two axes (K / B, B). Block amax and scales have one entry per block: `[..., K/B]`.
"""

from __future__ import annotations

import dataclasses
import math

from core.arrays import Array, namespace
from core.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How one shape is cut into groups that share a scale.

  Attributes:
    shape: the tensor's shape.
    padded: the shape after padding each blocked axis to a multiple of its block.
    tiles: the shape of the tiled view.
    reduce: axes of the tiled view over which amax is taken.
    scales: shape of block amax and scales (as stored).
    expanded: shape of the same in the tiled view, ready to broadcast.
  """

  shape: tuple[int, ...]
  padded: tuple[int, ...]
  tiles: tuple[int, ...]
  reduce: tuple[int, ...]
  scales: tuple[int, ...]
  expanded: tuple[int, ...]


def tiling(shape: tuple[int, ...], spec: QuantSpec) -> Tiling:
  """The tiling of a shape under a specification.

  Raises:
    ValueError: an axis does not exist, or a block size does not divide its axis and spec.pad is False.
  """
  shape = tuple(int(n) for n in shape)
  if spec.blocks is not None:
    return _blocked(shape, spec)
  if spec.axis is None:
    return Tiling(shape, shape, shape, tuple(range(len(shape))), (), ())
  kept = {normalize_axis(a, shape) for a in spec.axis}
  scales = tuple(n if i in kept else 1 for i, n in enumerate(shape))
  return Tiling(shape, shape, shape, tuple(i for i in range(len(shape)) if i not in kept), scales, scales)


def _blocked(shape: tuple[int, ...], spec: QuantSpec) -> Tiling:
  sizes = {normalize_axis(a, shape): size for a, size in spec.blocks or ()}
  if len(sizes) != len(spec.blocks or ()):
    raise ValueError(f"block sizes {dict(spec.blocks or ())} name one axis of shape {list(shape)} twice")
  padded, tiles, reduce, scales, expanded = [], [], [], [], []
  for i, n in enumerate(shape):
    if i not in sizes:
      for lengths in (padded, tiles, scales, expanded):
        lengths.append(n)
      continue
    size = sizes[i]
    if size is None:  # the whole axis is one block: nothing to split
      reduce.append(len(tiles))
      for lengths, length in ((padded, n), (tiles, n), (scales, 1), (expanded, 1)):
        lengths.append(length)
      continue
    count = -(-n // size)
    if count * size != n and not spec.pad:
      raise ValueError(
        f"block size {size} does not divide axis {i - len(shape)} of length {n} (shape {list(shape)}); use a divisor or pad=True"
      )
    padded.append(count * size)
    reduce.append(len(tiles) + 1)
    tiles += [count, size]
    scales.append(count)
    expanded += [count, 1]
  return Tiling(shape, tuple(padded), tuple(tiles), tuple(reduce), tuple(scales), tuple(expanded))


def normalize_axis(axis: int, shape: tuple[int, ...]) -> int:
  """A non-negative axis.

  Raises:
    ValueError: the axis does not exist.
  """
  if not -len(shape) <= axis < len(shape):
    raise ValueError(f"axis {axis} does not exist in shape {list(shape)}; allowed are {-len(shape)} to {len(shape) - 1}")
  return axis % len(shape)


def to_blocks(x: Array, tiles: Tiling) -> Array:
  """The tiled view of x, zero padded where the tiling says so."""
  if tiles.padded != tiles.shape:
    x = namespace(x).pad(x, [(0, p - n) for p, n in zip(tiles.padded, tiles.shape, strict=True)])
  return x if tiles.tiles == tiles.shape else x.reshape(tiles.tiles)


def from_blocks(x: Array, tiles: Tiling) -> Array:
  """The inverse of `to_blocks`: padding is cut off."""
  if tiles.tiles != tiles.shape:
    x = x.reshape(tiles.padded)
  if tiles.padded != tiles.shape:
    x = x[tuple(slice(0, n) for n in tiles.shape)]
  return x


def expand(scale: Array, tiles: Tiling) -> Array:
  """Scales in the shape that broadcasts against the tiled view.

  Raises:
    ValueError: the scale does not have the tiling's shape.
  """
  if tuple(scale.shape) == tiles.expanded:
    return scale
  if math.prod(scale.shape) != math.prod(tiles.scales):
    raise ValueError(
      f"amax or scale of shape {list(scale.shape)} does not fit a tensor of shape {list(tiles.shape)}; expected {list(tiles.scales)}"
    )
  return scale.reshape(tiles.expanded)
