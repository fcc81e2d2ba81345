"""numpy, the reference. Where a buffer may be reused, it is."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


class NumpyNamespace:
  """numpy, the reference."""

  name = "numpy"
  round = staticmethod(np.rint)
  where = staticmethod(np.where)
  floor = staticmethod(np.floor)
  abs = staticmethod(np.abs)
  stack = staticmethod(np.stack)
  minimum = staticmethod(np.minimum)
  maximum = staticmethod(np.maximum)

  def float32(self, x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
      return np.asarray(x).astype(np.float32, copy=False)

  def float16(self, x: Array) -> Array:
    return x.astype(np.float16)

  def int32(self, x: Array) -> Array:
    return np.asarray(x).astype(np.int32, copy=False)

  def uint8(self, x: Array) -> Array:
    return np.asarray(x).astype(np.uint8, copy=False)

  def int8(self, x: Array) -> Array:
    return np.asarray(x).astype(np.int8, copy=False)

  def cast(self, x: Array, dtype: Any) -> Array:
    return np.asarray(x).astype(dtype, copy=False)

  def bits(self, x: Array) -> Array:
    return np.ascontiguousarray(x).view(np.int32).reshape(np.shape(x))

  def from_bits(self, b: Array) -> Array:
    return np.ascontiguousarray(b).view(np.float32).reshape(np.shape(b))

  def clip(self, x: Array, low: float, high: float) -> Array:
    return np.clip(x, np.float32(low), np.float32(high)) if np.asarray(x).dtype == np.float32 else np.clip(x, low, high)

  # The names that end in an underscore may overwrite their first argument, which the caller must own.

  def clip_(self, x: Array, low: float, high: float) -> Array:
    return np.clip(x, np.float32(low), np.float32(high), out=_buffer(x))

  def round_(self, x: Array) -> Array:
    return np.rint(x, out=_buffer(x))

  def multiply_(self, x: Array, y: Array) -> Array:
    return np.multiply(x, y, out=_buffer(x))

  def divide_by_power_of_two_(self, x: Array, divisor_bits: Array) -> Array:
    """x over the float32 with these bits, a normal power of two: exact."""
    return np.divide(x, self.from_bits(divisor_bits), out=_buffer(x))

  def positive_zero_(self, x: Array) -> Array:
    """-0 becomes +0."""
    return np.add(x, np.float32(0), out=_buffer(x))

  def quantum_bits(self, x: Array, mask: int, least: int, shift: int) -> Array:
    """max(bits(x) & mask, least) - shift."""
    b = self.bits(x) & mask
    b = np.maximum(b, least, out=_buffer(b))
    return np.subtract(b, shift, out=_buffer(b))

  def finite_amax(self, x: Array, axes: tuple[int, ...]) -> Array | None:
    """A shortcut to the largest magnitude where all are finite; None where there is no such shortcut."""
    return None

  def max(self, x: Array, axes: tuple[int, ...]) -> Array:
    return np.max(x, axis=axes, keepdims=True)

  def min(self, x: Array, axes: tuple[int, ...]) -> Array:
    return np.min(x, axis=axes, keepdims=True)

  def constant(self, values: Any, like: Array, dtype: str = "float32") -> Array:
    return np.asarray(values, dtype=dtype)

  def full(self, shape: tuple[int, ...], value: float, like: Array) -> Array:
    return np.full(shape, value, np.float32)

  def arange(self, n: int, like: Array) -> Array:
    return np.arange(n, dtype=np.int32)

  def pad(self, x: Array, widths: list[tuple[int, int]]) -> Array:
    return np.pad(x, widths)

  def take(self, table: Array, index: Array) -> Array:
    return table[index]

  def take_last(self, x: Array, index: Array) -> Array:
    return x[..., index]

  def int8_view(self, x: Array) -> Array:
    return np.ascontiguousarray(x).view(np.int8)

  def likes_tables(self, x: Array) -> bool:
    return True

  def take_rows(self, table: np.ndarray, index: Array) -> Array:
    return table[index]

  def concat(self, arrays: list[Array], axis: int) -> Array:
    return np.concatenate(arrays, axis=axis)

  def barrier(self, *arrays: Array) -> tuple[Array, ...]:
    return arrays

  def materialize(self, a: Array, b: Array) -> tuple[Array, Array]:
    return a, b

  def quiet(self) -> Any:
    """A context without floating point warnings."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")

  def exact_quotient(self, a: Array, b: Array) -> Array | None:
    """a / b where the framework's own division is correctly rounded, else None."""
    return a / b

  def slow_bit_views(self, x: Array) -> bool:
    return False

  def is_float(self, x: Array) -> bool:
    # ml_dtypes' bfloat16 registers itself with kind "V" or "f" depending on its version; its name is stable.
    return x.dtype.kind == "f" or x.dtype.name == "bfloat16"


def _buffer(x: Array) -> Array | None:
  """x itself where numpy can write into it; 0-d results of numpy are scalars."""
  return x if isinstance(x, np.ndarray) and x.ndim else None
