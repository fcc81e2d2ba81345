"""Float32 bits as int32: exact division, exponents, random bits.

Integer operations give the same result in every framework; float division, log2 and exp2 do not. See SPEC.md, "Arithmetic".
"""

from __future__ import annotations

from core.arrays import Array, namespace

MAGNITUDE = 0x7FFFFFFF
EXPONENT = 0x7F800000
INFINITY = 0x7F800000
SMALLEST_NORMAL = 0x00800000
SIGN = -0x80000000
ONE = 0x3F800000


def power_of_two_bits(exponent: int) -> int:
  """Bits of 2^exponent, for a normal float32."""
  return (exponent + 127) << 23


def of_constant(value: float) -> int:
  """Bits of a positive Python float that is a normal float32 (arithmetic on Python numbers only, so that compilers see a constant)."""
  exponent = 0
  while value >= 2:
    value, exponent = value / 2, exponent + 1
  while value < 1:
    value, exponent = value * 2, exponent - 1
  return power_of_two_bits(exponent) + int((value - 1) * 8388608)


def divide(a: Array, b: Array) -> Array:
  """a / b, correctly rounded, the same in every framework and on every device.

  A namespace that divides correctly does so (numpy, torch and XLA on a CPU). GPU compilers approximate; there a float guess of the
  quotient's significand, good to two units, is corrected by its exact integer remainder. The remainder is computed in wrapping int32; it
  is below 2^27 in magnitude, so the wrapped value is the true one. A tie cannot occur: the quotient of two 24-bit integers never lies
  midway between two 24-bit ones.

  Args:
    a: [...] float32, positive and normal.
    b: [...] float32 of a broadcastable shape, positive and normal; the quotient must be normal too.

  Returns:
    [...] float32.
  """
  xp = namespace(a)
  quotient = xp.exact_quotient(a, b)
  return _divide(xp, a, b) if quotient is None else quotient


def _divide(xp, a: Array, b: Array) -> Array:
  a_bits, b_bits = xp.bits(a), xp.bits(b)
  a_int, b_int = (a_bits & 0x7FFFFF) | 0x800000, (b_bits & 0x7FFFFF) | 0x800000
  below = a_int < b_int  # quotient of the significands below one: one more bit is needed
  ratio = xp.float32(a_int) / xp.float32(b_int)
  quotient = xp.int32(xp.where(below, ratio * 16777216.0, ratio * 8388608.0))
  remainder = xp.where(below, a_int << 24, a_int << 23) - quotient * b_int
  for _ in range(2):
    up, down = remainder * 2 > b_int, remainder * 2 < -b_int
    step = xp.int32(up) - xp.int32(down)
    quotient, remainder = quotient + step, remainder - step * b_int
  exponent = (a_bits >> 23) - (b_bits >> 23) + 127 - xp.int32(below)
  return xp.from_bits((exponent << 23) + (quotient - 0x800000))


def threefry2x32(key: tuple[Array, Array], count: Array) -> Array:
  """32 random bits per counter: Threefry-2x32, 20 rounds, counter (0, count), the two output words xored.

  Equals `jax.random.bits(jax.random.wrap_key_data(key), shape, uint32)` in jax's default (partitionable) mode.

  Args:
    key: two int32 (Python ints or arrays).
    count: [...] int32.

  Returns:
    [...] int32.

  References: Salmon et al., 2011, doi:10.1145/2063384.2063405.
  """
  xp = namespace(count)
  k0, k1 = (xp.int32(xp.constant([_signed(k)], count, "int32")) if isinstance(k, int) else xp.int32(k).reshape(1) for k in key)
  schedule = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
  x0, x1 = count * 0 + schedule[0], count + schedule[1]
  for group in range(5):
    x0, x1 = xp.materialize(x0, x1)
    for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
      x0 = x0 + x1
      x1 = x0 ^ ((x1 << rotation) | ((x1 >> (32 - rotation)) & ((1 << rotation) - 1)))
    x0 = x0 + schedule[(group + 1) % 3]
    x1 = x1 + (schedule[(group + 2) % 3] + (group + 1))
  return x0 ^ x1


def _signed(value: int) -> int:
  return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def tree_sum(x: Array, axis: int) -> Array:
  """Sum over one axis in a fixed binary tree ([0, n/2) + [n/2, n), n padded to a power of two), keeping the axis.

  A framework's own sum adds in an order of its choice; this one gives the same float32 everywhere. Terms must not be bare products: a
  compiler may fuse a product into the addition.
  """
  xp, n = namespace(x), x.shape[axis]
  axis %= x.ndim
  size = 1 << max(n - 1, 0).bit_length()
  if size != n:
    x = xp.pad(x, [(0, size - n if i == axis else 0) for i in range(x.ndim)])
  while size > 1:
    size //= 2
    before = (slice(None),) * axis
    x = x[(*before, slice(0, size))] + x[(*before, slice(size, 2 * size))]
  return x
