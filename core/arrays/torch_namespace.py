"""torch, eager or under `torch.compile`. The module comes with the first tensor; nothing is imported here."""

from __future__ import annotations

import contextlib
from typing import Any

Array = Any


class TorchNamespace:
  """torch, eager or under `torch.compile`."""

  name = "torch"

  def __init__(self, torch: Any) -> None:
    self.torch = torch
    self.round, self.floor, self.abs, self.stack = torch.round, torch.floor, torch.abs, torch.stack
    self.where = torch.where
    self._tables: dict[Any, tuple[Any, Array]] = {}  # with the numpy table, so that its id is not used twice

  def float32(self, x: Array) -> Array:
    return x.to(self.torch.float32)

  def float16(self, x: Array) -> Array:
    return x.to(self.torch.float16)

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

  def int8_view(self, x: Array) -> Array:
    return x.view(self.torch.int8)

  def likes_tables(self, x: Array) -> bool:
    """Whether one look-up is faster than the arithmetic it stands for: eagerly yes; a compiler fuses arithmetic."""
    return not self.torch.compiler.is_compiling()

  def take_rows(self, table: Any, index: Array) -> Array:
    """[..., C] of a numpy table [R, C] and an index [...] below R."""
    held = self._tables.get((id(table), device := index.device))
    if held is None:
      held = (table, self.torch.from_numpy(table).to(device))
      if type(held[1]) is self.torch.Tensor:  # a fake tensor, of a mode that only follows shapes, is not kept
        self._tables[id(table), device] = held
    return self.torch.nn.functional.embedding(index.to(self.torch.int32), held[1])

  def concat(self, arrays: list[Array], axis: int) -> Array:
    return self.torch.cat(arrays, dim=axis)

  def barrier(self, *arrays: Array) -> tuple[Array, ...]:
    return arrays

  def materialize(self, a: Array, b: Array) -> tuple[Array, Array]:
    """Inductor inlines pointwise chains; values used twice in every round would grow the expression exponentially."""
    return self.torch.stack([a, b]).unbind(0) if self.torch.compiler.is_compiling() else (a, b)

  def quiet(self) -> Any:
    return contextlib.nullcontext()

  def exact_quotient(self, a: Array, b: Array) -> Array | None:
    """a / b where the framework's own division is correctly rounded, else None."""
    return a / b if a.device.type == "cpu" else None

  def slow_bit_views(self, x: Array) -> bool:
    """Whether viewing float bits as int32 costs more than arithmetic: inductor's C++ copies them element by element."""
    return x.device.type == "cpu" and self.torch.compiler.is_compiling()

  def is_float(self, x: Array) -> bool:
    return x.dtype.is_floating_point
