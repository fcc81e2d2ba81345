"""The few array operations that `core` needs, spelled alike for numpy, torch and jax.numpy.

`core` imports numpy only. A torch or jax array brings its own module, which is then already in `sys.modules`; nothing is imported for it.
The namespaces are stateless objects, constant to `torch.compile` and `jax.jit`.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, torch.Tensor, jax.Array or a tracer of one


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

  def concat(self, arrays: list[Array], axis: int) -> Array:
    return np.concatenate(arrays, axis=axis)

  def barrier(self, *arrays: Array) -> tuple[Array, ...]:
    return arrays

  def materialize(self, a: Array, b: Array) -> tuple[Array, Array]:
    return a, b

  def quiet(self) -> Any:
    """A context without floating point warnings."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")

  def exact_division(self, x: Array) -> bool:
    """Whether the framework's own division of two arrays is correctly rounded."""
    return True

  def slow_bit_views(self, x: Array) -> bool:
    return False

  def is_float(self, x: Array) -> bool:
    # ml_dtypes' bfloat16 registers itself with kind "V" or "f" depending on its version; its name is stable.
    return x.dtype.kind == "f" or x.dtype.name == "bfloat16"


class TorchNamespace:
  """torch, eager or under `torch.compile`."""

  name = "torch"

  def __init__(self, torch: Any) -> None:
    self.torch = torch
    self.round, self.floor, self.abs, self.stack = torch.round, torch.floor, torch.abs, torch.stack
    self.where = torch.where

  def float32(self, x: Array) -> Array:
    return x.to(self.torch.float32)

  def int32(self, x: Array) -> Array:
    return x.to(self.torch.int32)

  def uint8(self, x: Array) -> Array:
    return x.to(self.torch.uint8)

  def int8(self, x: Array) -> Array:
    return x.to(self.torch.int8)

  def cast(self, x: Array, dtype: Any) -> Array:
    return x.to(dtype)

  def bits(self, x: Array) -> Array:
    return x.view(self.torch.int32)

  def from_bits(self, b: Array) -> Array:
    return b.view(self.torch.float32)

  def clip(self, x: Array, low: float, high: float) -> Array:
    return self.torch.clamp(x, low, high)

  def clip_(self, x: Array, low: float, high: float) -> Array:
    return x.clamp_(low, high)

  def round_(self, x: Array) -> Array:
    return x.round_()

  def multiply_(self, x: Array, y: Array) -> Array:
    return x.mul_(y)

  def divide_by_power_of_two_(self, x: Array, divisor_bits: Array) -> Array:
    if x.device.type == "cpu":
      return x.div_(divisor_bits.view(self.torch.float32))
    return x.mul_(((254 << 23) - divisor_bits).view(self.torch.float32))  # a GPU's compiled division may be approximate

  def positive_zero_(self, x: Array) -> Array:
    return x.add_(0.0)

  def quantum_bits(self, x: Array, mask: int, least: int, shift: int) -> Array:
    return (x.view(self.torch.int32) & mask).clamp_(min=least).sub_(shift)

  def finite_amax(self, x: Array, axes: tuple[int, ...]) -> Array | None:
    """Two passes instead of five. A device is not asked whether its values are finite: that would wait for it."""
    if not axes or x.device.type != "cpu" or self.torch.compiler.is_compiling():
      return None
    largest = self.torch.amax(self.torch.abs(x), dim=axes, keepdim=True)
    return largest if bool(self.torch.isfinite(largest).all()) else None

  def minimum(self, a: Array, b: Any) -> Array:
    return self.torch.clamp(a, max=b) if isinstance(b, (int, float)) else self.torch.minimum(a, b)

  def maximum(self, a: Array, b: Any) -> Array:
    return self.torch.clamp(a, min=b) if isinstance(b, (int, float)) else self.torch.maximum(a, b)

  def max(self, x: Array, axes: tuple[int, ...]) -> Array:
    return self.torch.amax(x, dim=axes, keepdim=True) if axes else x

  def min(self, x: Array, axes: tuple[int, ...]) -> Array:
    return self.torch.amin(x, dim=axes, keepdim=True) if axes else x

  def constant(self, values: Any, like: Array, dtype: str = "float32") -> Array:
    return self.torch.tensor(values, dtype=getattr(self.torch, dtype), device=like.device)

  def full(self, shape: tuple[int, ...], value: float, like: Array) -> Array:
    return self.torch.full(shape, value, dtype=self.torch.float32, device=like.device)

  def arange(self, n: int, like: Array) -> Array:
    return self.torch.arange(n, dtype=self.torch.int32, device=like.device)

  def pad(self, x: Array, widths: list[tuple[int, int]]) -> Array:
    flat = [w for pair in reversed(widths) for w in pair]
    return self.torch.nn.functional.pad(x, flat)

  def take(self, table: Array, index: Array) -> Array:
    return table[index.long()]

  def take_last(self, x: Array, index: Array) -> Array:
    return x[..., index.long()]

  def concat(self, arrays: list[Array], axis: int) -> Array:
    return self.torch.cat(arrays, dim=axis)

  def barrier(self, *arrays: Array) -> tuple[Array, ...]:
    return arrays

  def materialize(self, a: Array, b: Array) -> tuple[Array, Array]:
    """Inductor inlines pointwise chains; values used twice in every round would grow the expression exponentially."""
    return self.torch.stack([a, b]).unbind(0) if self.torch.compiler.is_compiling() else (a, b)

  def quiet(self) -> Any:
    return contextlib.nullcontext()

  def exact_division(self, x: Array) -> bool:
    return x.device.type == "cpu"

  def slow_bit_views(self, x: Array) -> bool:
    """Whether viewing float bits as int32 costs more than arithmetic: inductor's C++ copies them element by element."""
    return x.device.type == "cpu" and self.torch.compiler.is_compiling()

  def is_float(self, x: Array) -> bool:
    return x.dtype.is_floating_point


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
    """In stages of at most 32 along the last axis: XLA's CPU backend rewrites longer reductions into windows that do not fuse."""
    last = x.ndim - 1
    while last in axes and x.shape[last] > 32 and (chunk := _largest_divisor(x.shape[last], 32)) > 1:
      x = self.jnp.max(x.reshape((*x.shape[:last], x.shape[last] // chunk, chunk)), axis=last + 1)
    return self.jnp.max(x, axis=axes, keepdims=True)

  def min(self, x: Array, axes: tuple[int, ...]) -> Array:
    return self.jnp.min(x, axis=axes, keepdims=True)

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

  def exact_division(self, x: Array) -> bool:
    return False

  def slow_bit_views(self, x: Array) -> bool:
    return False

  def is_float(self, x: Array) -> bool:
    return bool(self.jnp.issubdtype(x.dtype, self.jnp.floating))


def _buffer(x: Array) -> Array | None:
  """x itself where numpy can write into it; 0-d results of numpy are scalars."""
  return x if isinstance(x, np.ndarray) and x.ndim else None


def _largest_divisor(n: int, limit: int) -> int:
  return next(d for d in range(limit, 0, -1) if n % d == 0)


Namespace = Any  # one of the three classes above; alike by their method names, which is all that their callers rely on

NUMPY = NumpyNamespace()
_KNOWN: dict[str, Namespace] = {"numpy": NUMPY}


def namespace(x: Array) -> Namespace:
  """The namespace of an array.

  Raises:
    TypeError: x is no array of numpy, torch or jax.
  """
  if isinstance(x, (np.ndarray, np.generic)):
    return NUMPY
  if hasattr(x, "is_floating_point"):
    return _framework("torch", x)
  if hasattr(x, "aval"):
    return _framework("jax", x)
  raise TypeError(f"expected a numpy, torch or jax array, got {type(x).__name__}; convert it with numpy.asarray first")


def _framework(name: str, x: Array) -> Namespace:
  known = _KNOWN.get(name)
  if known is None:
    module = sys.modules[name]
    known = _KNOWN[name] = TorchNamespace(module) if name == "torch" else JaxNamespace(module)
  return known


def to_numpy(x: Array) -> np.ndarray:
  """A float32 or integer numpy copy of any array, off its device; bfloat16 and float16 become float32."""
  if isinstance(x, (np.ndarray, np.generic)):
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array
  if hasattr(x, "is_floating_point"):
    tensor = x.detach().cpu()
    return tensor.float().numpy() if tensor.element_size() == 2 and tensor.is_floating_point() else tensor.numpy()
  return to_numpy(np.asarray(x))
