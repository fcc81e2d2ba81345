"""Inputs of the conformance vectors: grids with neighbours, special values, seeded random numbers."""

from __future__ import annotations

import dataclasses
import itertools
import random
import struct
from fractions import Fraction

from tests.golden import exact
from tests.golden.exact import Codebook, Float, Int, Spec, bits_of, fl

NEGATIVE = 1 << 31
# +-0, smallest and largest subnormal, smallest normal, largest float32, infinities, NaN
SPECIAL = [0, NEGATIVE, 1, NEGATIVE | 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFF812345]
AMAX_1E30, AMAX_1E_30 = exact.from_bits(0x7149F2CA).value, exact.from_bits(0x0DA24260).value


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  spec: Spec
  shape: tuple[int, ...]
  bits: list[int]
  amax: list | None = None
  tensor_amax: Fraction | None = None
  key: tuple[int, int] | None = None


def float32(x: float) -> int:
  """Bits of an input: the nearest float32 of a Python float."""
  return struct.unpack("<I", struct.pack("<f", x))[0]


def normal(n: int, seed: int, sigma: float = 1.0) -> list[int]:
  rng = random.Random(seed)
  return [float32(rng.gauss(0, 1) * sigma) for _ in range(n)]


def with_neighbours(magnitudes: list[Fraction]) -> list[int]:
  """Each positive float32 with its two neighbours, in both signs."""
  out = []
  for m in magnitudes:
    b = bits_of(m)
    for c in (b - 1, b, b + 1) if b > 0 else (b,):
      out += [c, c | NEGATIVE]
  return out


def levels(fmt: Int | Float | Codebook) -> list[Fraction]:
  """The magnitudes of the format's levels, ascending."""
  if isinstance(fmt, Int):
    return [Fraction(i) for i in range(max(fmt.high, -fmt.low) + 1)]
  if isinstance(fmt, Codebook):
    return sorted({abs(v) for v in fmt.levels})
  reals = [exact.float_level(c, fmt) for c in range(2 ** (fmt.bits - 1))]
  return [r.value for r in reals if r.finite]


def grid(fmt: Int | Float | Codebook, scale: Fraction = Fraction(1)) -> list[int]:
  """Levels and midpoints times a scale, each with its float32 neighbours, and the special values."""
  values = levels(fmt)
  middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
  if isinstance(fmt, Codebook):
    middles = [abs(fl((a + b) / 2)) for a, b in itertools.pairwise(fmt.levels)]
  return with_neighbours([fl(v * scale) for v in (*values[1:], *middles, values[-1] * Fraction(17, 16), values[-1] * 100)]) + SPECIAL


def special_rows(bound: Fraction, width: int, seed: int) -> list[int]:
  """Rows of one block each whose amax lies where scale rules differ, and rows of extreme content."""
  rng, rows = random.Random(seed), []
  edges = []
  for b in (bits_of(bound), bits_of(Fraction(1)), bits_of(Fraction(7, 4)), bits_of(Fraction(3, 2))):
    edges += [b - 1, b, b + 1]
  edges += [
    bits_of(AMAX_1E30),
    bits_of(AMAX_1E_30),
    bits_of(Fraction(2) ** -90),
    bits_of(Fraction(2) ** -90) - 1,
    0x7E800001,
    0x7F7FFFFF,
    0x00400000,
    0,
  ]
  for a in edges:
    q = exact.from_bits(a).value
    row = [bits_of(fl(q * Fraction(rng.randrange(2**20), 2**20))) | (NEGATIVE if rng.random() < 0.5 else 0) for _ in range(width)]
    row[rng.randrange(width)] = a | (NEGATIVE if rng.random() < 0.5 else 0)
    rows += row
  outlier = normal(width, seed + 1, 1e-3)
  outlier[3] = float32(1e4)
  special = normal(width, seed + 2)
  special[:6] = [0x7F800000, 0xFF800000, 0x7FC00000, 1, NEGATIVE, 0]
  return rows + outlier + special + normal(width, seed + 3)
