"""Number formats as values.

A format is data: the arithmetic in `rounding` and `encoding` reads these fields and branches on nothing else, so a new grid is a new
value, not new code. `IntFormat`, `FloatFormat` and `CodebookFormat` are frozen and hashable, hence usable as static arguments of
`jax.jit` and as constants under `torch.compile`.
"""

from __future__ import annotations

import dataclasses
import functools
import struct


@dataclasses.dataclass(frozen=True)
class IntFormat:
  """Two's complement or unsigned integers.

  Attributes:
    name: display name, for example "INT8".
    bits: storage width, 2 to 8.
    signed: codes in [-2^(bits-1), 2^(bits-1) - 1]; otherwise [0, 2^bits - 1].
    narrow_range: drop -2^(bits-1), so that the codes are symmetric.
  """

  name: str
  bits: int
  signed: bool = True
  narrow_range: bool = False

  def __post_init__(self) -> None:
    if not 2 <= self.bits <= 8:
      raise ValueError(f"integer format {self.name!r}: bits is {self.bits}; allowed are 2 to 8")
    if self.narrow_range and not self.signed:
      raise ValueError(f"integer format {self.name!r}: narrow_range drops the most negative code; an unsigned format has none")

  @property
  def max_code(self) -> int:
    return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

  @property
  def min_code(self) -> int:
    if not self.signed:
      return 0
    return -self.max_code if self.narrow_range else -self.max_code - 1

  @property
  def bound(self) -> float:
    """Level that amax maps to."""
    return float(self.max_code)


@dataclasses.dataclass(frozen=True)
class FloatFormat:
  """Sign, exponent and mantissa with gradual underflow; no rounding mode or overflow rule but the saturating one of `rounding`.

  Attributes:
    name: display name, for example "E4M3".
    exponent_bits: width of the exponent field, at least 1.
    mantissa_bits: width of the fraction field.
    bound: largest finite magnitude. It may lie below what the fields could hold (E4M3 gives its last code to NaN).
    bias: exponent bias; None means 2^(exponent_bits-1) - 1.
    nan_code: code that stores NaN (sign bit clear); None where the format has no NaN.
    inf_code: code that stores infinity (decoded, never produced); None where there is none.
    signed: whether a sign bit is stored.

  References: OCP 8-bit Floating Point Specification (OFP8) v1.0, 5; OCP Microscaling Formats v1.0, 5.3.
  """

  name: str
  exponent_bits: int
  mantissa_bits: int
  bound: float
  bias: int | None = None
  nan_code: int | None = None
  inf_code: int | None = None
  signed: bool = True

  def __post_init__(self) -> None:
    if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.bits > 16:
      raise ValueError(
        f"float format {self.name!r}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits; "
        "at least 1 exponent bit, no negative mantissa and at most 16 bits in all are allowed"
      )
    if self.bias is None:
      object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1)
    if self.min_exponent < -100 or not 0 < self.bound < 2.0**100:
      raise ValueError(f"float format {self.name!r}: levels must lie within 2^-100 and 2^100 (bias {self.bias}, bound {self.bound})")

  @property
  def bits(self) -> int:
    return self.exponent_bits + self.mantissa_bits + int(self.signed)

  @property
  def min_exponent(self) -> int:
    """Exponent of the smallest normal level; subnormals share its quantum."""
    assert self.bias is not None
    return 1 - self.bias

  @property
  def max_exponent(self) -> int:
    """Exponent of the largest level: 8 for E4M3, 2 for E2M1."""
    exponent, value = -101, 2.0**-101
    while value * 2 <= self.bound:
      exponent, value = exponent + 1, value * 2
    return exponent

  @property
  def max_code(self) -> int:
    """Code of the largest finite level (sign bit clear)."""
    assert self.bias is not None
    fraction = self.bound / 2.0**self.max_exponent - 1
    return ((self.max_exponent + self.bias) << self.mantissa_bits) + int(fraction * 2**self.mantissa_bits)


@dataclasses.dataclass(frozen=True)
class CodebookFormat:
  """An arbitrary ascending list of levels; the code is the index.

  Attributes:
    name: display name, for example "NF4".
    levels: ascending float32 levels, 2^bits of them.
    midpoints: between neighbouring levels, rounded to float32; a value is coded by how many lie strictly below it.

  References: Dettmers et al., 2023, arXiv:2305.14314, appendix E (NF4).
  """

  name: str
  levels: tuple[float, ...]
  midpoints: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    if len(self.levels) not in (2, 4, 8, 16, 32, 64, 128, 256) or list(self.levels) != sorted(set(self.levels)):
      raise ValueError(f"codebook format {self.name!r}: {len(self.levels)} levels; a power of two up to 256, strictly ascending, is needed")
    middles = [(low + high) / 2 for low, high in zip(self.levels, self.levels[1:], strict=False)]
    object.__setattr__(self, "midpoints", tuple(struct.unpack("f", struct.pack("f", m))[0] for m in middles))

  @property
  def bits(self) -> int:
    return (len(self.levels) - 1).bit_length()

  @property
  def bound(self) -> float:
    return max(abs(self.levels[0]), abs(self.levels[-1]))


@dataclasses.dataclass(frozen=True)
class PowerOfTwoFormat:
  """E8M0: a biased exponent and nothing else. Codes 0 to 254 stand for 2^(code - 127); 255 is NaN. Scales only.

  References: OCP Microscaling Formats v1.0, 5.4.1.
  """

  name: str = "E8M0"
  bits: int = 8


Format = IntFormat | FloatFormat | CodebookFormat
ScaleFormat = FloatFormat | PowerOfTwoFormat | IntFormat

E4M3 = FloatFormat("E4M3", 4, 3, 448.0, nan_code=0x7F)
E5M2 = FloatFormat("E5M2", 5, 2, 57344.0, nan_code=0x7E, inf_code=0x7C)
E3M2 = FloatFormat("E3M2", 3, 2, 28.0)
E2M3 = FloatFormat("E2M3", 2, 3, 7.5)
E2M1 = FloatFormat("E2M1", 2, 1, 6.0)
FLOAT16 = FloatFormat("FLOAT16", 5, 10, 65504.0, nan_code=0x7E00, inf_code=0x7C00)
E8M0 = PowerOfTwoFormat()
INT8 = IntFormat("INT8", 8)
INT4 = IntFormat("INT4", 4)
UINT8 = IntFormat("UINT8", 8, signed=False)

# Copies for use inside traced functions. Dynamo knows an object by the first name it meets it under and does not guard that a second,
# non-global name still means the same object; were the global E4M3 compared before `spec.element` is read, a graph traced for E4M3 elements
# would silently be run for any other specification. These objects are never part of a specification, so they alias nothing.
TRACED_E4M3, TRACED_E8M0, TRACED_UINT8 = dataclasses.replace(E4M3), dataclasses.replace(E8M0), dataclasses.replace(UINT8)
TRACED_FLOAT16 = dataclasses.replace(FLOAT16)

# The float32 values of bitsandbytes' NF4 table: quantiles of N(0,1), normalised to [-1, 1], with an exact zero.
NF4 = CodebookFormat(
  "NF4",
  (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
  ),
)  # fmt: skip

FLOAT_FORMATS = {(f.exponent_bits, f.mantissa_bits): f for f in (E4M3, E5M2, E3M2, E2M3, E2M1)}


@functools.cache
def int_format(bits: int, signed: bool = True, narrow_range: bool = False) -> IntFormat:
  """The integer format of that width, one object per choice."""
  return IntFormat(f"{'' if signed else 'U'}INT{bits}", bits, signed, narrow_range)
