"""SPEC.md a second time, in exact rationals: the oracle of the conformance vectors.

Pure Python integers and fractions. Neither `core` nor numpy is imported, and no float is ever rounded by the machine: `fl` below is the one
place where a real number becomes a float32. Slow (about 10 us an operation) and meant to be read beside SPEC.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

NAN, INF = "nan", "inf"
SMALLEST_AMAX, LARGEST_AMAX = Fraction(2) ** -90, Fraction(2) ** 126


# ---------------------------------------------------------------- float32 as rationals


@dataclasses.dataclass(frozen=True)
class Real:
  """A float32 value: a sign (zero has one too) and a magnitude, which is a Fraction, INF or NAN."""

  negative: bool
  magnitude: Fraction | str

  @property
  def finite(self) -> bool:
    return isinstance(self.magnitude, Fraction)

  @property
  def value(self) -> Fraction:
    assert isinstance(self.magnitude, Fraction)
    return -self.magnitude if self.negative else self.magnitude


def floor_log2(q: Fraction) -> int:
  """Largest e with 2^e <= q, for q > 0."""
  e = q.numerator.bit_length() - q.denominator.bit_length()
  return e if Fraction(2) ** e <= q else e - 1


def ceil_log2(q: Fraction) -> int:
  """Smallest e with 2^e >= q, for q > 0."""
  e = floor_log2(q)
  return e if Fraction(2) ** e == q else e + 1


def fl(q: Fraction) -> Fraction:
  """The float32 nearest to q, ties to even, gradual underflow. (Python's round(Fraction) rounds half to even, exactly.)

  Raises:
    OverflowError: the result is beyond the largest float32; callers that may get there say what they want instead.
  """
  if q == 0:
    return Fraction(0)
  quantum = Fraction(2) ** (max(floor_log2(abs(q)), -126) - 23)
  rounded = round(q / quantum) * quantum
  if abs(rounded) >= Fraction(2) ** 128:
    raise OverflowError(str(float(q)))
  return rounded


def from_bits(b: int) -> Real:
  negative, exponent, fraction = bool(b >> 31), (b >> 23) & 0xFF, b & 0x7FFFFF
  if exponent == 255:
    return Real(negative, NAN if fraction else INF)
  if exponent == 0:
    return Real(negative, fraction * Fraction(2) ** -149)
  return Real(negative, (fraction + 2**23) * Fraction(2) ** (exponent - 150))


def to_bits(x: Real) -> int:
  """Bits of a value that is a float32 already (anything else is a mistake in this file)."""
  sign = int(x.negative) << 31
  if x.magnitude == NAN:
    return 0x7FC00000
  if x.magnitude == INF:
    return sign | 0x7F800000
  if x.magnitude == 0:
    return sign
  exponent = max(floor_log2(x.magnitude), -126)
  significand = x.magnitude / Fraction(2) ** (exponent - 23)
  assert significand.denominator == 1, "not a float32"
  return sign | (significand.numerator + (((exponent + 126) << 23) if significand >= 2**23 else 0))


def bits_of(q: Fraction) -> int:
  return to_bits(Real(q < 0, abs(q)))


# ---------------------------------------------------------------- formats and specifications


@dataclasses.dataclass(frozen=True)
class Int:
  bits: int
  signed: bool = True
  narrow: bool = False

  @property
  def high(self) -> int:
    return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

  @property
  def low(self) -> int:
    return 0 if not self.signed else -self.high if self.narrow else -self.high - 1

  @property
  def bound(self) -> Fraction:
    return Fraction(self.high)

  @property
  def emax(self) -> int:
    return floor_log2(self.bound)

  @property
  def mantissa(self) -> int:
    return self.bits - 2


@dataclasses.dataclass(frozen=True)
class Float:
  exponent: int
  mantissa: int
  bound: Fraction
  nan: int | None = None
  inf: int | None = None
  bias_override: int | None = None

  @property
  def bits(self) -> int:
    return 1 + self.exponent + self.mantissa

  @property
  def bias(self) -> int:
    return 2 ** (self.exponent - 1) - 1 if self.bias_override is None else self.bias_override

  @property
  def emin(self) -> int:
    return 1 - self.bias

  @property
  def emax(self) -> int:
    return floor_log2(self.bound)


@dataclasses.dataclass(frozen=True)
class Codebook:
  levels: tuple[Fraction, ...]

  @property
  def bits(self) -> int:
    return (len(self.levels) - 1).bit_length()

  @property
  def bound(self) -> Fraction:
    return max(abs(self.levels[0]), abs(self.levels[-1]))


E4M3 = Float(4, 3, Fraction(448), nan=0x7F)
E5M2 = Float(5, 2, Fraction(57344), nan=0x7E, inf=0x7C)
E3M2 = Float(3, 2, Fraction(28))
E2M3 = Float(2, 3, Fraction(15, 2))
E2M1 = Float(2, 1, Fraction(6))
FLOAT16 = Float(5, 10, Fraction(65504))
# bitsandbytes' table, as float32 bits
NF4_BITS = (
  0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
  0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
)  # fmt: skip
NF4 = Codebook(tuple(from_bits(b).value for b in NF4_BITS))


@dataclasses.dataclass(frozen=True)
class Spec:
  """The fields of core.QuantSpec that decide numbers, with this file's formats. `blocks` and `axis` count axes from the end or start."""

  element: Int | Float | Codebook
  axis: tuple[int, ...] | None = None
  blocks: tuple[tuple[int, int | None], ...] | None = None
  scale_format: str | None = None  # None, "E8M0", "E4M3", "UINT8", "FLOAT16"
  scale_block: int | None = None
  dynamic: bool = False
  e8m0_rule: str = "rceil"
  four_over_six: bool = False
  rounding: str = "nearest"
  zero_point: bool = False
  bound: Fraction | None = None
  pad: bool = False

  @property
  def signed_scale(self) -> bool:
    """Whether a negative amax is a negative scale; otherwise it counts as zero."""
    full_range = isinstance(self.element, Int) and self.element.signed and not self.element.narrow
    return full_range and not self.zero_point and self.scale_format in (None, "FLOAT16")

  @property
  def element_bound(self) -> Fraction:
    return self.element.bound if self.bound is None else self.bound


# ---------------------------------------------------------------- codes of one scaled value


def float_code(level: Fraction, negative: bool, fmt: Float) -> int:
  """Code of a magnitude that lies on the grid."""
  if level < Fraction(2) ** fmt.emin:
    code = level / Fraction(2) ** (fmt.emin - fmt.mantissa)
  else:
    e = floor_log2(level)
    code = ((e + fmt.bias) << fmt.mantissa) + (level / Fraction(2) ** e - 1) * 2**fmt.mantissa
  assert Fraction(code).denominator == 1, "not on the grid"
  return int(code) | (int(negative) << (fmt.bits - 1))


def float_level(code: int, fmt: Float) -> Real:
  """Value of a code."""
  negative, code = bool(code >> (fmt.bits - 1)), code & (2 ** (fmt.bits - 1) - 1)
  field, fraction = code >> fmt.mantissa, code & (2**fmt.mantissa - 1)
  if field == 0:
    magnitude = fraction * Fraction(2) ** (fmt.emin - fmt.mantissa)
  else:
    magnitude = (2**fmt.mantissa + fraction) * Fraction(2) ** (field - fmt.bias - fmt.mantissa)
  if magnitude > fmt.bound:
    return Real(negative, INF if code == fmt.inf else NAN)
  return Real(negative, magnitude)


def float_round(magnitude: Fraction, fmt: Float, uniform: Fraction | None = None) -> Fraction:
  """Level nearest to a magnitude (ties to the even code), or rounded up where the fraction exceeds `uniform`."""
  magnitude = min(magnitude, fmt.bound)
  exponent = max(floor_log2(magnitude), fmt.emin) if magnitude else fmt.emin
  quantum = Fraction(2) ** (exponent - fmt.mantissa)
  return integer_round(magnitude / quantum, uniform) * quantum


def integer_round(q: Fraction, uniform: Fraction | None = None) -> int:
  """Nearest integer, half to even; or, for a `uniform` in [0, 1), away from zero where the fraction exceeds it."""
  if uniform is None:
    return round(q)
  whole = abs(q).numerator // abs(q).denominator
  rounded = whole + int(abs(q) - whole > uniform)
  return -rounded if q < 0 else rounded


def codebook_code(v: Fraction, fmt: Codebook) -> int:
  """Index of the nearest level; midpoints are rounded to float32 and a tie takes the lower index."""
  return sum(fl((a + b) / 2) < v for a, b in itertools.pairwise(fmt.levels))


def scaled(x: Real, inverse: Fraction) -> Fraction:
  """v = fl(x * inv_step), with its sign. An infinity, or a product beyond float32, becomes +-2^128: above every bound."""
  huge = -(Fraction(2) ** 128) if x.negative != (inverse < 0) else Fraction(2) ** 128
  if x.magnitude == INF:
    return huge
  try:
    return fl(x.value * inverse)
  except OverflowError:
    return huge


def code_and_value(x: Real, step: Fraction, inverse: Fraction, fmt: Int | Float | Codebook, uniform: Fraction | None) -> tuple[int, Real]:
  """Section "Rounding" of SPEC.md for one element: its code and its dequantized value."""
  if x.magnitude == NAN or (x.magnitude == INF and inverse == 0):
    return (fmt.nan or 0) if isinstance(fmt, Float) else 0, Real(False, NAN)
  v = scaled(x, inverse)
  if isinstance(fmt, Int):
    code = integer_round(max(min(v, Fraction(fmt.high)), Fraction(fmt.low)), uniform)
    value = fl(code * step)
    return code, Real(value < 0 or (code == 0 and step < 0), abs(value))
  if isinstance(fmt, Codebook):
    code = codebook_code(v, fmt)
    value = fl(fmt.levels[code] * step)
    return code, Real(value < 0, abs(value))
  level = float_round(abs(v), fmt, uniform)
  return float_code(level, x.negative, fmt), Real(x.negative, fl(level * step))


# ---------------------------------------------------------------- random bits


def threefry(key: tuple[int, int], counter: int) -> int:
  """Threefry-2x32 with 20 rounds of the counter (0, counter); the two output words xored. All words unsigned."""
  mask = 2**32 - 1
  k = (key[0] & mask, key[1] & mask)
  k = (*k, k[0] ^ k[1] ^ 0x1BD11BDA)
  x0, x1 = k[0], (counter + k[1]) & mask
  for i in range(20):
    x0 = (x0 + x1) & mask
    r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
    x1 = ((x1 << r | x1 >> (32 - r)) & mask) ^ x0
    if i % 4 == 3:
      s = i // 4 + 1
      x0, x1 = (x0 + k[s % 3]) & mask, (x1 + k[(s + 1) % 3] + s) & mask
  return x0 ^ x1


def uniform(key: tuple[int, int], counter: int) -> Fraction:
  """Uniform in [0, 1): the upper 24 of the 32 random bits."""
  return Fraction(threefry(key, counter) >> 8, 2**24)


# ---------------------------------------------------------------- packing


def pack_row(codes: list[int], width: int) -> bytes:
  """Codes of one row as a little-endian bit stream, lowest bits first, zero padded to a full byte."""
  stream = sum((c & (2**width - 1)) << (i * width) for i, c in enumerate(codes))
  return stream.to_bytes(-(-len(codes) * width // 8), "little")
