"""The bias of affine quantization, y = Q(x - b) + b: a mean or the middle of a range, the same bits in every framework.

A framework's own mean adds in an order of its choice; here the order is fixed (`bits.tree_sum`).
"""

from __future__ import annotations

from core import bits
from core.arrays import Array, Namespace, namespace


def bias(x: Array, axes: tuple[int, ...], method: str = "mean") -> Array:
  """Bias over `axes`, kept as length 1.

  Args:
    x: [...] floating point, finite.
    axes: reduced axes, in the order in which sums are taken.
    method: "mean", or "max_min" for (max + min) / 2.

  Returns:
    float32.

  Raises:
    ValueError: unknown method.
  """
  xp = namespace(x)
  x = xp.float32(x)
  if method == "max_min":
    return middle(xp.min(x, axes), xp.max(x, axes))
  if method != "mean":
    raise ValueError(f"bias method {method!r} is unknown; allowed are 'mean' and 'max_min'")
  count = 1
  for axis in axes:
    count *= x.shape[axis]
    x = bits.tree_sum(x, axis)
  return _rounded(xp, x * (1.0 / max(count, 1)))


def middle(low: Array, high: Array) -> Array:
  """(low + high) / 2. float32."""
  return (low + high) * 0.5


def running_mean(total: Array, count: Array) -> Array:
  """The mean of `count` values that add up to `total`.

  Args:
    total: [...] float32.
    count: [...] float32 of a broadcastable shape, at least 1.

  Returns:
    [...] float32.
  """
  return _rounded(namespace(total), total * bits.divide(count * 0.0 + 1.0, count))


def _rounded(xp: Namespace, product: Array) -> Array:
  """A product that no compiler fuses into the next addition: a select stands in between."""
  return xp.where(product == product, product, float("nan"))
