"""Rounding onto a format's grid: nearest with ties to even, or stochastic.

Input are values already divided by their scale; output are levels of the format, still float32. See SPEC.md, "Rounding".
"""

from __future__ import annotations

from core import bits
from core.arrays import Array, Namespace, namespace
from core.formats import CodebookFormat, FloatFormat, Format, IntFormat


def to_level(v: Array, fmt: Format, uniform: Array | None = None, overwrite: bool = False, narrow: bool = False) -> Array:
  """The level of `fmt` that each value rounds to; values beyond the format saturate, NaN stays NaN.

  Args:
    v: [...] float32, the scaled values.
    fmt: element format.
    uniform: None for nearest-even; for stochastic rounding [...] float32 in [0, 1), multiples of 2^-24.
    narrow: v was widened from a 16-bit type; it decides nothing but which of several equal computations a compiler gets.
    overwrite: the caller owns v and does not need it afterwards; it may be used as the buffer of the result.

  Returns:
    [...] float32 levels. Integer levels have no negative zero; float levels keep the sign of zero.
  """
  xp = namespace(v)
  if isinstance(fmt, CodebookFormat):
    if uniform is not None:
      raise ValueError(f"stochastic rounding needs an integer or float element format; {fmt.name} is a codebook")
    nearest = xp.take(xp.constant(fmt.levels, v), codebook_index(v, fmt))
    return xp.where(is_nan(v), v, nearest)
  clip = xp.clip_ if overwrite else xp.clip
  if isinstance(fmt, IntFormat):
    v = clip(v, float(fmt.min_code), float(fmt.max_code))
    return xp.positive_zero_(xp.round_(v) if uniform is None else _stochastic(xp, v, uniform))
  v = clip(v, -fmt.bound if fmt.signed else 0.0, fmt.bound)
  quantum_of = _by_bit_quantum
  if xp.slow_bit_views(v):
    quantum_of = _by_selected_quantum if narrow else _by_integer_quantum
  scaled, quantum = quantum_of(xp, v, fmt)
  return xp.multiply_(xp.round_(scaled) if uniform is None else _stochastic(xp, scaled, uniform), quantum)


def _by_bit_quantum(xp: Namespace, v: Array, fmt: FloatFormat) -> tuple[Array, Array]:
  """(v / quantum, quantum), quantum being the distance of neighbouring levels at v: a power of two taken from v's exponent field.

  The quotient is exact, so the only rounding is the one that is asked for afterwards.
  """
  least, shift = bits.power_of_two_bits(fmt.min_exponent), fmt.mantissa_bits << 23
  quantum_bits = xp.quantum_bits(v, bits.EXPONENT, least, shift)
  return xp.divide_by_power_of_two_(v, quantum_bits), xp.from_bits(quantum_bits)


def _by_integer_quantum(xp: Namespace, v: Array, fmt: FloatFormat) -> tuple[Array, Array]:
  """The same two numbers without a bit view: the highest set bit of |v| in units of the smallest normal, smeared down.

  For compilers that spill a vector to memory to view its bits (inductor on CPU), this is three times faster.
  """
  n = xp.int32(xp.abs(v) * 2.0**-fmt.min_exponent)
  reach = 1
  while reach <= fmt.max_exponent - fmt.min_exponent:
    n = n | (n >> reach)
    reach *= 2
  power = xp.float32((n >> 1) + 1)
  finest = 2.0 ** (fmt.mantissa_bits - fmt.min_exponent)
  return (v * finest) / power, power * (1.0 / finest)


def _by_selected_quantum(xp: Namespace, v: Array, fmt: FloatFormat) -> tuple[Array, Array]:
  """The same two numbers without a bit view: the exponent of |v| is found by halving its range, each half a comparison and two selects.

  inductor on CPU converts pairs of vectors, which is what it makes of 16-bit inputs, slowly between float and int32; on float32 inputs
  the integers are faster.
  """
  magnitude = xp.abs(v) * 2.0**-fmt.min_exponent
  inverse, quantum = 2.0 ** (fmt.mantissa_bits - fmt.min_exponent), 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
  span = fmt.max_exponent - fmt.min_exponent
  for step in (16, 8, 4, 2, 1):
    if step <= span:
      above = magnitude >= 2.0**step
      down = xp.where(above, 2.0**-step, 1.0)
      magnitude, inverse, quantum = magnitude * down, down * inverse, xp.where(above, 2.0**step, 1.0) * quantum
  return v * inverse, quantum


def to_integer(v: Array, uniform: Array | None = None) -> Array:
  """Nearest integer (ties to even), or the stochastic one; magnitudes beyond 2^22 are cut. [...] float32."""
  xp = namespace(v)
  v = xp.clip(v, -(2.0**22), 2.0**22)
  return xp.round(v) if uniform is None else _stochastic(xp, v, uniform)


def codebook_index(v: Array, fmt: CodebookFormat) -> Array:
  """Index of the nearest level: the number of midpoints strictly below v; a tie takes the lower level. int32."""
  xp = namespace(v)
  index = xp.int32(v > fmt.midpoints[0])
  for midpoint in fmt.midpoints[1:]:
    index = index + xp.int32(v > midpoint)
  return index


def is_nan(v: Array) -> Array:
  """NaN by its bits: comparisons of floats are not the same everywhere under fast-math."""
  xp = namespace(v)
  return (xp.bits(v) & bits.MAGNITUDE) > bits.INFINITY


def random_uniform(key: tuple[Array, Array], shape: tuple[int, ...], like: Array) -> Array:
  """Counter-based uniform numbers in [0, 1), multiples of 2^-24: element i (row-major) uses Threefry counter i.

  Args:
    key: two int32.
    shape: shape of the result; below 2^31 elements.
    like: array whose namespace and device the result takes.
  """
  xp, n = namespace(like), 1
  for size in shape:
    n *= int(size)
  random = bits.threefry2x32(key, xp.arange(n, like))
  return (xp.float32((random >> 8) & 0xFFFFFF) * 2.0**-24).reshape(tuple(shape))


def _stochastic(xp: Namespace, t: Array, uniform: Array) -> Array:
  """Up in magnitude with probability equal to the fraction. t is clipped or an exact product, so nothing can fuse into the subtraction."""
  magnitude = xp.abs(t)
  below = xp.floor(magnitude)
  rounded = below + xp.float32(magnitude - below > uniform)
  return xp.from_bits(xp.bits(rounded) | (xp.bits(t) & bits.SIGN))
