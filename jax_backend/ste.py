"""Fake quantization with a straight-through gradient.

The forward values are `core.fake_quantize`, bit for bit. The derivative is that of the identity (Bengio et al., 2013, arXiv:1308.3432), or
of a clip to [-amax, amax] with `pass_through=False`. It is a `custom_jvp` rule that is linear in the tangent, so `grad`, `jvp`, `linearize`
and rematerialisation all work and no residual is kept. Scales get no gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

import core
from core import QuantSpec, blocks


@functools.partial(jax.jit, static_argnums=0)
def _fake_quantize(spec: QuantSpec, x: Any, amax: Any, tensor_amax: Any, scales: Any, key: Any) -> Any:
  # A jit of its own: one trace per (specification, shape) in the whole process, however many layers a model has.
  return core.fake_quantize(x, spec, amax, tensor_amax=tensor_amax, scales=scales, key=key)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def fake_quantize(
  spec: QuantSpec, pass_through: bool, x: Any, amax: Any = None, tensor_amax: Any = None, scales: Any = None, key: Any = None
) -> Any:
  """`core.fake_quantize(x, spec, ...)` with a straight-through gradient to x.

  Args:
    spec: specification, in the axes of x.
    pass_through: gradient of the identity; False zeroes it where |x| > amax (needs amax).
    x: [...] floating point.
    amax: calibrated amax, or None (taken from x).
    tensor_amax: tensor amax of a two-level specification with a given block amax.
    scales: scales kept from calibration.
    key: two int32, for stochastic rounding.

  Returns:
    The shape and dtype of x.
  """
  return _fake_quantize(spec, x, amax, tensor_amax, scales, key)


@fake_quantize.defjvp
def _jvp(spec: QuantSpec, pass_through: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
  x, amax = primals[0], primals[1]
  y = fake_quantize(spec, pass_through, *primals)
  if pass_through or amax is None:
    return y, tangents[0]
  return y, jnp.where(inside(x, spec, amax), tangents[0], jnp.zeros_like(tangents[0]))


def inside(x: Any, spec: QuantSpec, amax: Any) -> Any:
  """Whether each element lies within its group's amax (or range, for a zero point). bool, x's shape."""
  tiling = blocks.tiling(x.shape, spec)
  tiles = blocks.to_blocks(x.astype(jnp.float32), tiling)
  if spec.two_level and spec.dynamic:
    limit = amax.reshape((1,) * tiles.ndim)  # only the tensor amax is given
  elif spec.zero_point:
    low, high = (blocks.expand(a, tiling) for a in amax)
    return blocks.from_blocks((tiles >= low) & (tiles <= high), tiling)
  else:
    limit = blocks.expand(jnp.abs(amax), tiling)  # a signed amax is the sign of a scale
  return blocks.from_blocks(jnp.abs(tiles) <= limit, tiling)
