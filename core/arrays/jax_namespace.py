"""jax.numpy, eager or traced, and what keeps XLA exact and fast. The module comes with the first array; nothing is imported here."""

from __future__ import annotations

import contextlib
from typing import Any

Array = Any


class JaxNamespace:
  """jax.numpy, eager or traced."""

  name = "jax"

  def __init__(self, jax: Any) -> None:
    self.jax, self.jnp = jax, jax.numpy
    jnp = self.jnp
    self.round, self.where, self.floor, self.abs, self.stack = jnp.round, jnp.where, jnp.floor, jnp.abs, jnp.stack
    self.minimum, self.maximum = jnp.minimum, jnp.maximum

  def float32(self, x: Array) -> Array:
    return x.astype(self.jnp.float32)

  def float16(self, x: Array) -> Array:
    return x.astype(self.jnp.float16)

  def int32(self, x: Array) -> Array:
    return x.astype(self.jnp.int32)

  def uint8(self, x: Array) -> Array:
    return x.astype(self.jnp.uint8)

  def int8(self, x: Array) -> Array:
    return x.astype(self.jnp.int8)

  def cast(self, x: Array, dtype: Any) -> Array:
    return x.astype(dtype)

  def bits(self, x: Array) -> Array:
    return self.jax.lax.bitcast_convert_type(x, self.jnp.int32)

  def from_bits(self, b: Array) -> Array:
    return self.jax.lax.bitcast_convert_type(b, self.jnp.float32)

  def clip(self, x: Array, low: float, high: float) -> Array:
    return self.jnp.clip(x, low, high)

  def clip_(self, x: Array, low: float, high: float) -> Array:
    return self.jnp.clip(x, low, high)

  def round_(self, x: Array) -> Array:
    return self.jnp.round(x)

  def multiply_(self, x: Array, y: Array) -> Array:
    return x * y

  def divide_by_power_of_two_(self, x: Array, divisor_bits: Array) -> Array:
    return x * self.from_bits((254 << 23) - divisor_bits)

  def positive_zero_(self, x: Array) -> Array:
    return self.jnp.where(x == 0.0, 0.0, x)  # XLA folds an addition of zero away

  def quantum_bits(self, x: Array, mask: int, least: int, shift: int) -> Array:
    return self.jnp.maximum(self.bits(x) & mask, least) - shift

  def finite_amax(self, x: Array, axes: tuple[int, ...]) -> Array | None:
    return None

  def max(self, x: Array, axes: tuple[int, ...]) -> Array:
    return self.jnp.max(self._halved(x, axes, self.jnp.maximum), axis=axes, keepdims=True)

  def min(self, x: Array, axes: tuple[int, ...]) -> Array:
    return self.jnp.min(self._halved(x, axes, self.jnp.minimum), axis=axes, keepdims=True)

  def _halved(self, x: Array, axes: tuple[int, ...], best: Any) -> Array:
    """x with its last axis folded onto itself up to seven times, where that axis is reduced by `best`.

    XLA's CPU backend reduces integers along a row one by one; the same maximum of two halves is vector code, four times as fast. Halves
    of an odd length overlap.
    """
    if self.jax.default_backend() != "cpu" or x.ndim - 1 not in axes:
      return x
    for _ in range(7):
      n = x.shape[-1]
      if n <= 32:
        break
      half = -(-n // 2)
      x = best(x[..., :half], x[..., n - half :])
    return x

  def constant(self, values: Any, like: Array, dtype: str = "float32") -> Array:
    return self.jnp.asarray(values, dtype=dtype)

  def full(self, shape: tuple[int, ...], value: float, like: Array) -> Array:
    return self.jnp.full(shape, value, self.jnp.float32)

  def arange(self, n: int, like: Array) -> Array:
    return self.jnp.arange(n, dtype=self.jnp.int32)

  def pad(self, x: Array, widths: list[tuple[int, int]]) -> Array:
    return self.jnp.pad(x, widths)

  def take(self, table: Array, index: Array) -> Array:
    return table[index]

  def take_last(self, x: Array, index: Array) -> Array:
    return x[..., index]

  def int8_view(self, x: Array) -> Array:
    return self.jax.lax.bitcast_convert_type(x, self.jnp.int8)

  def likes_tables(self, x: Array) -> bool:
    return False

  def concat(self, arrays: list[Array], axis: int) -> Array:
    return self.jnp.concatenate(arrays, axis=axis)

  def barrier(self, *arrays: Array) -> tuple[Array, ...]:
    """Keep XLA from rewriting arithmetic through the scales, and from recomputing them per element.

    The barrier is gone by the time XLA fuses, and a fused consumer would then recompute every scale for every element; a division is
    never duplicated, so dividing by a one that the barrier hides ends the fusion here.
    """
    ones = self.jax.lax.optimization_barrier(tuple(self.jnp.ones_like(a) for a in arrays))
    return tuple(a / one for a, one in zip(self.jax.lax.optimization_barrier(arrays), ones, strict=True))

  def materialize(self, a: Array, b: Array) -> tuple[Array, Array]:
    return a, b

  def quiet(self) -> Any:
    """A context without floating point warnings."""
    return contextlib.nullcontext()

  def exact_quotient(self, a: Array, b: Array) -> Array | None:
    """a / b where XLA divides correctly: on a CPU, by a divisor of full shape that it cannot see to be a broadcast or a constant.

    Of those it takes the reciprocal. A computation that is lowered for another platform than the default one must not use this.
    """
    if self.jax.default_backend() != "cpu":
      return None
    shape = self.jnp.broadcast_shapes(a.shape, b.shape)
    b = self.where(a == a, b, 1.0)  # under vmap, a divisor that is not mapped itself would become a broadcast behind the barrier
    a, b = self.jax.lax.optimization_barrier((self.jnp.broadcast_to(a, shape), self.jnp.broadcast_to(b, shape)))
    return a / b

  def slow_bit_views(self, x: Array) -> bool:
    return False

  def is_float(self, x: Array) -> bool:
    return bool(self.jnp.issubdtype(x.dtype, self.jnp.floating))
