"""Stored axes <-> torch axes. Axes in a config mean the torch layout ([out, in], OIHW, NCHW); Flax stores [in, out], HWIO, NHWC.

A `Layout` names, for each torch axis, the stored axes that make it up. Quantizing maps the *specification* onto the stored axes, so that
no tensor is transposed; only where the order of the elements itself matters (double quantized scales, stochastic rounding, two-dimensional
four-over-six) is the tensor brought into torch order first. Either way the codes are those of the torch tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core import QuantSpec

Dims = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where torch's axes are in a stored tensor.

  Attributes:
    kind: "fixed" (`dims` says it), "same" (the torch order itself), "channels_last" ([batch..., spatial..., C] for torch's [batch..., C,
      spatial...]), "heads" ([batch..., T, heads, D] for torch's [batch..., heads, T, D]) or "flatten" (the axes `axes` are one last axis in
      torch).
    dims: for "fixed": entry t holds the stored axes of torch axis t.
    spatial: for "channels_last": number of spatial axes; None takes every axis but the first and the last.
    axes: for "flatten": the axes that torch sees as its last one.
  """

  kind: str = "same"
  dims: Dims = ()
  spatial: int | None = None
  axes: tuple[int, ...] = ()

  def of(self, ndim: int) -> Dims:
    """Stored axes of every torch axis, for a stored tensor of that rank."""
    if self.kind == "fixed":
      return self.dims
    if self.kind == "channels_last":
      spatial = max(ndim - 2, 0) if self.spatial is None else min(self.spatial, ndim - 1)
      batch = ndim - 1 - spatial
      return tuple((i,) for i in (*range(batch), ndim - 1, *range(batch, ndim - 1)))
    if self.kind == "heads" and ndim > 2:
      return tuple((i,) for i in (*range(ndim - 3), ndim - 2, ndim - 3, ndim - 1))
    if self.kind == "flatten":
      joined = tuple(a % ndim for a in self.axes)
      return (*((i,) for i in range(ndim) if i not in joined), joined)
    return tuple((i,) for i in range(ndim))


SAME = Layout()
CHANNELS_LAST = Layout("channels_last")
HEADS = Layout("heads")


def fixed(*dims: tuple[int, ...]) -> Layout:
  """The layout with these stored axes per torch axis: `fixed((1,), (0,))` is a Dense kernel, [in, out]."""
  return Layout("fixed", tuple(tuple(d) for d in dims))


def from_letters(letters: str) -> Layout:
  """Layout of a stored weight from one letter per stored axis.

  Args:
    letters: "i" input features, "o" output features, "e" experts or other independent copies (joined with the outputs, one torch row per
      expert and output), "h" "w" "d" spatial. A letter may repeat; its axes count as one: "iioo". Example: "io", "hwio", "eio".

  Raises:
    ValueError: another letter, or no "i" or "o".
  """
  if set(letters) - set("eoidhw") or "o" not in letters or "i" not in letters:
    raise ValueError(
      f"weight axes {letters!r} are not understood; one letter per stored axis: i (inputs), o (outputs), e (experts), d, h, w (spatial); "
      'a Dense kernel is "io", a 2-D convolution "hwio"'
    )
  where = {letter: tuple(i for i, other in enumerate(letters) if other == letter) for letter in letters}
  spatial = [where[s] for s in "dhw" if s in where]
  return fixed(where.get("e", ()) + where["o"], where["i"], *spatial)


class View(NamedTuple):
  """How a stored tensor is looked at while it is quantized.

  Attributes:
    transpose: physical permutation first, or None.
    shape: shape after merging the stored axes that are one torch axis, or None where nothing merges.
    axes: entry t is the axis, in the merged tensor, of torch axis t.
  """

  transpose: tuple[int, ...] | None
  shape: tuple[int, ...] | None
  axes: tuple[int, ...]

  @property
  def is_plain(self) -> bool:
    return self.axes == tuple(range(len(self.axes)))


@functools.lru_cache(maxsize=4096)
def view(shape: tuple[int, ...], dims: Dims, torch_order: bool = False) -> View:
  """The view for a stored shape.

  Args:
    shape: stored shape.
    dims: stored axes per torch axis.
    torch_order: bring the elements into torch order, whatever it costs.

  Raises:
    ValueError: the layout does not name every stored axis once.
  """
  order = tuple(a for group in dims for a in group)
  if sorted(order) != list(range(len(shape))):
    raise ValueError(f"the layout {dims} does not fit a tensor of shape {list(shape)}: each stored axis must be named once")
  torch_shape = tuple(math.prod(shape[a] for a in group) for group in dims)
  adjacent = all(group == tuple(range(group[0], group[0] + len(group))) for group in dims if group)
  if adjacent and not torch_order and all(dims):
    ranked = sorted(range(len(dims)), key=lambda t: dims[t][0])
    axes = tuple(ranked.index(t) for t in range(len(dims)))
    merged = tuple(torch_shape[t] for t in ranked)
    return View(None, None if merged == tuple(shape) else merged, axes)
  transpose = None if order == tuple(range(len(shape))) else order
  moved = tuple(shape[a] for a in order)
  return View(transpose, None if moved == torch_shape else torch_shape, tuple(range(len(dims))))


def enter(x: Any, seen: View) -> Any:
  """The stored tensor as the view shows it."""
  x = x if seen.transpose is None else jnp.transpose(x, seen.transpose)
  return x if seen.shape is None else x.reshape(seen.shape)


def leave(y: Any, seen: View, shape: tuple[int, ...]) -> Any:
  """The inverse of `enter`; `shape` is the stored one."""
  if seen.transpose is None:
    return y if seen.shape is None else y.reshape(shape)
  moved = tuple(shape[a] for a in seen.transpose)
  inverse = tuple(seen.transpose.index(i) for i in range(len(shape)))
  return jnp.transpose(y.reshape(moved), inverse)


def needs_torch_order(spec: QuantSpec) -> bool:
  """Whether codes depend on the order of the elements: neighbouring scales, counters, or a summation over a two-dimensional block."""
  two_dimensional = spec.four_over_six and len(spec.blocks or ()) > 1
  return spec.scale_block is not None or spec.rounding == "stochastic" or two_dimensional


@functools.lru_cache(maxsize=4096)
def map_spec(spec: QuantSpec, axes: tuple[int, ...]) -> QuantSpec:
  """The specification with torch axes replaced by axes of the view.

  Raises:
    ValueError: the specification names an axis that the tensor does not have.
  """
  if axes == tuple(range(len(axes))):
    return spec
  if spec.axis is not None:
    return spec.replace(axis=tuple(axes[normalize_axis(a, len(axes))] for a in spec.axis))
  if spec.blocks is not None:
    return spec.replace(blocks=tuple((axes[normalize_axis(a, len(axes))], size) for a, size in spec.blocks))
  return spec


def normalize_axis(axis: int, rank: int) -> int:
  """A non-negative axis.

  Raises:
    ValueError: the axis does not exist.
  """
  if not -rank <= axis < rank:
    raise ValueError(f"axis {axis} does not exist in a tensor of {rank} axes (torch's layout); allowed are {-rank} to {rank - 1}")
  return axis % rank


def amax_to_view(amax: Any, seen: View) -> Any:
  """amax in torch's axes -> in the view's. Scalars stay; a leading axis of 2 (lo, hi) stays in front."""
  return _permute(amax, seen, inverse=True)


def amax_to_torch(amax: Any, seen: View) -> Any:
  """The inverse of `amax_to_view`."""
  return _permute(amax, seen, inverse=False)


def _permute(amax: Any, seen: View, inverse: bool) -> Any:
  if amax is None or seen.is_plain or amax.ndim < len(seen.axes):
    return amax
  extra = amax.ndim - len(seen.axes)
  axes = tuple(seen.axes.index(i) for i in range(len(seen.axes))) if inverse else seen.axes
  return jnp.transpose(amax, (*range(extra), *(a + extra for a in axes)))


def to_torch(x: Any, layout: Layout) -> Any:
  """A stored tensor in torch's layout: a kernel [in, out] as [out, in]; axes that torch joins are joined."""
  return enter(x, view(tuple(x.shape), layout.of(x.ndim), torch_order=True))


def from_torch(x: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
  """The inverse of `to_torch`; `shape` is the stored one."""
  return leave(x, view(tuple(shape), layout.of(len(shape)), torch_order=True), tuple(shape))


def over_stack(fn: Any, stack: int) -> Any:
  """`fn` mapped over that many leading axes of its arguments: the layers of a scanned stack, the experts of a vmapped one."""
  for _ in range(stack):
    fn = jax.vmap(fn)
  return fn
