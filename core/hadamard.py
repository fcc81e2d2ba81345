"""The orthonormal Hadamard transform along the last axis, by butterflies.

Only additions, subtractions and one multiplication by a constant, in a fixed order, so every framework gives the same bits.
"""

from __future__ import annotations

from core import rounding
from core.arrays import Array, namespace


def block_size(length: int, size: int | None = None) -> int:
  """Length of the transformed blocks of an axis: `size`, or the largest power of two that divides the axis.

  Raises:
    ValueError: size is no power of two or does not divide the axis; or the axis is odd and longer than 1.
  """
  if size is None:
    size = length & -length
    if size < 2 and length != 1:
      raise ValueError(f"a Hadamard rotation needs a last axis with an even length, got {length}; turn rotate off for this quantizer")
    return size
  if size < 1 or size & (size - 1):
    raise ValueError(f"the block size of a Hadamard rotation must be a power of two, got {size}")
  if length % size:
    raise ValueError(
      f"Hadamard block size {size} does not divide the last axis of length {length}; use a divisor such as {length & -length}"
    )
  return size


def rotate(x: Array, size: int | None = None, seed: int | None = None) -> Array:
  """Multiply blocks of the last axis by the orthonormal Hadamard matrix in Sylvester's order, after random signs if a seed is given.

  Args:
    x: [..., K].
    size: power of two dividing K; None is the largest one.
    seed: key of the signs (counter-based, the same in every framework); None for none.

  Returns:
    [..., K] float32.

  References: Sylvester, 1867; used on activations by Ashkboos et al., 2024, arXiv:2404.00456 (QuaRot).
  """
  x = namespace(x).float32(x)
  return _butterflies(x if seed is None else x * _signs(x, seed), size)


def unrotate(x: Array, size: int | None = None, seed: int | None = None) -> Array:
  """The inverse of `rotate` (up to rounding): the matrix is its own inverse, the signs follow it."""
  x = _butterflies(namespace(x).float32(x), size)
  return x if seed is None else x * _signs(x, seed)


def _signs(x: Array, seed: int) -> Array:
  xp = namespace(x)
  key = xp.int32(xp.constant([seed, 0], x, "int32"))
  return xp.where(rounding.random_uniform((key[0], key[1]), (x.shape[-1],), x) < 0.5, 1.0, -1.0)


def _butterflies(x: Array, size: int | None) -> Array:
  xp, shape = namespace(x), tuple(x.shape)
  size = block_size(shape[-1], size)
  half = 1
  while half < size:
    pairs = x.reshape((*shape[:-1], shape[-1] // (2 * half), 2, half))
    a, b = pairs[..., 0, :], pairs[..., 1, :]
    x = xp.stack([a + b, a - b], -2)
    half *= 2
  return x.reshape(shape) * size**-0.5
