"""What the conformance vectors cover: specifications and inputs. Expected numbers come from exact_tensor.py."""

from __future__ import annotations

import dataclasses
import math
import random
import struct
from fractions import Fraction

from tests.golden import exact, exact_tensor
from tests.golden.exact import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, Codebook, Float, Int, Spec, bits_of, fl

RULES = ("rceil", "floor", "ceil", "even")
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
  middles = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
  if isinstance(fmt, Codebook):
    middles = [abs(fl((a + b) / 2)) for a, b in zip(fmt.levels, fmt.levels[1:], strict=False)]
  return with_neighbours([fl(v * scale) for v in (*values[1:], *middles, values[-1] * Fraction(17, 16), values[-1] * 100)]) + SPECIAL


def element_cases(name: str, fmt: Int | Float | Codebook) -> list[Case]:
  """One element format: every level, midpoint and neighbour at scale 1 and at an awkward scale; the range policy. One scale a row."""
  rows, awkward = Spec(fmt, axis=(0,)), exact.from_bits(0x40490FDB).value
  first, second = grid(fmt), grid(fmt, fl(awkward / fmt.bound))
  width = -(-len(first) // 128) * 128
  padded = [*first, *[0] * (width - len(first)), *second, *[0] * (width - len(second))]
  edges = [bits_of(Fraction(2) ** -90), bits_of(Fraction(2) ** -90) - 1, bits_of(Fraction(2) ** 126), bits_of(Fraction(2) ** 126) + 1, 0x7F7FFFFF, 1, 0]
  policy = []
  for a in (*edges, 0x7149F2CA, 0x0DA24260):
    q = exact.from_bits(a).value
    policy += [a, a | NEGATIVE, bits_of(fl(q * Fraction(2, 3))), bits_of(fl(q / 5)) | NEGATIVE, bits_of(fl(q / 300)), 0, NEGATIVE, 1]
  return [
    Case(f"{name}, grid at scale 1 and at amax = pi", rows, (2, width), padded, [fmt.bound, awkward]),
    Case(f"{name}, range policy", rows, (9, 8), policy),
  ]


def integers() -> list[Case]:
  out = []
  for bits in range(2, 9):
    for signed, narrow in ((True, False), (True, True), (False, False)):
      label = f"{'' if signed else 'U'}INT{bits}{' narrow' if narrow else ''}"
      out += element_cases(label, Int(bits, signed, narrow))
  out.append(Case("INT8 with bound 127.5", Spec(Int(8), axis=(0,), bound=Fraction(255, 2)), (2, 40), normal(80, 5)))
  return out


def zero_points() -> list[Case]:
  out = []
  for fmt, label in ((Int(8), "INT8"), (Int(8, signed=False), "UINT8"), (Int(4), "INT4"), (Int(4, signed=False), "UINT4")):
    tensor, rows = Spec(fmt, zero_point=True), Spec(fmt, axis=(0,), zero_point=True)
    shifted = [bits_of(fl(exact.from_bits(b).value + shift)) for shift in (-3, 0, Fraction(1, 2), 5) for b in normal(24, shift.numerator)]
    out.append(Case(f"{label} zero point, rows that straddle and miss zero", rows, (4, 24), shifted))
    out.append(Case(f"{label} zero point, special values", tensor, (len(SPECIAL) + 2,), [*SPECIAL[:6], *SPECIAL[8:], 0x3F800000, 0xC0000000, 0x40490FDB, 1]))
    out.append(Case(f"{label} zero point, largest finite", tensor, (4,), [0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0]))
    out.append(Case(f"{label} zero point, all zero", tensor, (3,), [0, NEGATIVE, 0]))
    out.append(Case(f"{label} zero point, 1e-30", tensor, (4,), [0x0DA24260, 0x8DA24260, 0, 1]))
    given = [(exact.from_bits(0xBF9D70A4).value, exact.from_bits(0x40333333).value)]
    out.append(Case(f"{label} zero point, calibrated range", tensor, (64,), normal(64, 9, 2.0), given))
    ties = [bits_of(Fraction(n, 2)) | (NEGATIVE if n < 0 else 0) for n in range(-32, 34)]
    out.append(Case(f"{label} zero point, ties at scale 1", tensor, (len(ties),), ties, [(Fraction(-5), Fraction(fmt.high - fmt.low - 5))]))
  blocks = Spec(Int(8), blocks=((-1, 16),), zero_point=True, pad=True)
  out.append(Case("INT8 zero point, block 16, ragged", blocks, (2, 37), normal(74, 12)))
  return out


def special_rows(bound: Fraction, width: int, seed: int) -> list[int]:
  """Rows of one block each whose amax lies where scale rules differ, and rows of extreme content."""
  rng, rows = random.Random(seed), []
  edges = []
  for b in (bits_of(bound), bits_of(Fraction(1)), bits_of(Fraction(7, 4)), bits_of(Fraction(3, 2))):
    edges += [b - 1, b, b + 1]
  edges += [bits_of(AMAX_1E30), bits_of(AMAX_1E_30), bits_of(Fraction(2) ** -90), bits_of(Fraction(2) ** -90) - 1, 0x7E800001, 0x7F7FFFFF, 0x00400000, 0]
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


def mx(fmt: Int | Float):
  def make() -> list[Case]:
    out = []
    for rule in RULES:
      spec = Spec(fmt, blocks=((-1, 32),), scale_format="E8M0", dynamic=True, e8m0_rule=rule)
      bits = special_rows(fmt.bound, 32, 7)
      out.append(Case(f"block 32, {rule}", spec, (len(bits) // 32, 32), bits))
    for size in (8, 16, 64, 128):
      spec = Spec(fmt, blocks=((-1, size),), scale_format="E8M0", dynamic=True)
      out.append(Case(f"block {size}", spec, (2, 128), normal(256, size)))
    ragged = Spec(fmt, blocks=((-1, 32),), scale_format="E8M0", dynamic=True, pad=True)
    out.append(Case("block 32, ragged tail", ragged, (3, 45), normal(135, 3, 10.0)))
    out.append(Case("block 32 along the first axis", ragged.__class__(fmt, blocks=((0, 32),), scale_format="E8M0", dynamic=True), (32, 3), normal(96, 4)))
    out.append(Case("32x32 tiles, ragged", Spec(fmt, blocks=((-2, 32), (-1, 32)), scale_format="E8M0", dynamic=True, pad=True), (5, 40), normal(200, 5)))
    return out

  return make


def nvfp4_rows(seed: int) -> list[int]:
  return special_rows(Fraction(6), 16, seed)[: 12 * 16] + normal(16, seed, 1e-3) + [0] * 16 + special_rows(Fraction(6), 16, seed)[-48:]


def nvfp4() -> list[Case]:
  dynamic = Spec(E2M1, blocks=((-1, 16),), scale_format="E4M3", dynamic=True)
  static = dataclasses.replace(dynamic, dynamic=False)
  rows = nvfp4_rows(21)
  out = [Case("special blocks", dynamic, (len(rows) // 16, 16), rows)]
  for sigma in (1.0, 1e-4, 1e4, 1e-28, 1e28):
    out.append(Case(f"normal, sigma {sigma:g}", dynamic, (4, 64), normal(256, 31, sigma)))
  for label, a in (("pi", 0x40490FDB), ("1e-30", 0x0DA24260), ("1e30", 0x7149F2CA), ("0", 0), ("largest float", 0x7F7FFFFF)):
    out.append(Case(f"calibrated tensor amax {label}", dynamic, (2, 32), normal(64, 41), None, exact.from_bits(a).value))
  wide = [float32(v) for v in (1e30, 1.0, 1e-21, 1e-27, 1e20, 1e25, 3e-23, 1e-24)]
  out.append(Case("blocks up to 190 binades below the tensor", dynamic, (8, 16), [b for a in wide for b in (a, *[0] * 14, a - 3)]))
  out.append(Case("all zero", dynamic, (2, 16), [0, NEGATIVE] * 16))
  x = normal(128, 51)
  groups = exact_tensor.group_of((4, 32), static)
  block = exact_tensor.group_amax([exact.from_bits(b) for b in x], groups, 8)
  calibrated = [fl(a * Fraction(9, 10)) for a in block]
  out.append(Case("static, amax of the tensor", static, (4, 32), x))
  out.append(Case("static, calibrated block amax", static, (4, 32), x, calibrated))
  out.append(Case("static, tensor amax of a louder sibling", static, (4, 32), x, calibrated, Fraction(29)))
  out.append(Case("static, tensor amax too small", static, (4, 32), x, calibrated, Fraction(1, 2**20)))
  tiles = Spec(E2M1, blocks=((-2, 16), (-1, 16)), scale_format="E4M3")
  out.append(Case("16x16 tiles", tiles, (32, 32), normal(1024, 61)))
  out.append(Case("16x16 tiles, dynamic, ragged", dataclasses.replace(tiles, dynamic=True, pad=True), (20, 23), normal(460, 62)))
  out.append(Case("ragged tail", dataclasses.replace(dynamic, pad=True), (3, 21), normal(63, 63)))
  for fmt, label in ((Int(4), "INT4"), (E4M3, "E4M3"), (E3M2, "E3M2")):
    out.append(Case(f"{label} elements, block 32", Spec(fmt, blocks=((-1, 32),), scale_format="E4M3"), (3, 64), normal(192, 64)))
  return out


def four_over_six() -> list[Case]:
  dynamic = Spec(E2M1, blocks=((-1, 16),), scale_format="E4M3", dynamic=True, four_over_six=True)
  out = []
  for sigma in (1.0, 1e-3, 1e-12, 1e-24, 1e20):
    out.append(Case(f"normal, sigma {sigma:g}", dynamic, (6, 64), normal(384, 71, sigma)))
  rows = nvfp4_rows(72)
  out.append(Case("special blocks", dynamic, (len(rows) // 16, 16), rows))
  ties = [float32(v) for v in (4, 4, 4, 4, 2, 2, 1, 1, 0, 0, 3, 3, 1.5, 0.5, -4, 1)]
  out.append(Case("equal errors keep six; tiny errors", dynamic, (3, 16), [*ties, *[float32(6)] * 16, float32(6), *[float32(2.0**-66)] * 15]))
  tiles = Spec(E2M1, blocks=((-2, 16), (-1, 16)), scale_format="E4M3", four_over_six=True, pad=True)
  out.append(Case("16x16 tiles, ragged", tiles, (20, 23), normal(460, 73)))
  out.append(Case("block 12, padded sum tree", dataclasses.replace(dynamic, blocks=((-1, 12),)), (2, 24), normal(48, 74)))
  static = dataclasses.replace(dynamic, dynamic=False)
  out.append(Case("static, tensor amax of a louder sibling", static, (4, 32), normal(128, 75), None, Fraction(29)))
  return out


def nf4() -> list[Case]:
  spec = Spec(NF4, blocks=((-1, 64),))
  out = element_cases("NF4", NF4)
  out.append(Case("block 64", spec, (2, 192), normal(384, 81)))
  out.append(Case("block 64, ragged", dataclasses.replace(spec, pad=True), (2, 70), normal(140, 82)))
  rows = special_rows(Fraction(1), 16, 83)
  out.append(Case("block 16, special blocks", Spec(NF4, blocks=((-1, 16),)), (len(rows) // 16, 16), rows))
  return out


def double_quantized() -> list[Case]:
  spec = Spec(NF4, blocks=((-1, 16),), scale_format="UINT8", scale_block=4)
  loud = [float32(random.Random(i).gauss(0, 1) * 4.0 ** ((i // 16) % 7 - 3)) for i in range(3 * 112)]
  loud[16:32] = [0] * 16
  out = [Case("NF4 block 16, groups of 4 scales, ragged group, zero block", spec, (3, 112), loud)]
  out.append(Case("NF4 block 64, groups of 256 scales", Spec(NF4, blocks=((-1, 64),), scale_format="UINT8", scale_block=256), (2, 256), normal(512, 91)))
  out.append(Case("all zero", spec, (1, 64), [0] * 64))
  out.append(Case("INT4 block 16, tiny", Spec(Int(4), blocks=((-1, 16),), scale_format="UINT8", scale_block=2), (2, 64), normal(128, 92, 1e-26)))
  for scale, label in ((1.0, "1"), (1e-9, "1e-9"), (1e-12, "1e-12"), (1e9, "1e9")):
    half = Spec(Int(4), blocks=((-1, 32),), scale_format="FLOAT16")
    out.append(Case(f"INT4 block 32 with float16 scales, sigma {label}", half, (2, 64), normal(128, 93, scale)))
  return out


def granularity() -> list[Case]:
  out = []
  for fmt, label in ((Int(8), "INT8"), (Int(4), "INT4"), (E4M3, "E4M3"), (E2M3, "E2M3")):
    def add(title: str, shape: tuple[int, ...], *, label=label, fmt=fmt, **fields) -> None:
      loud = [float32(random.Random(i).gauss(0, 1) * 2.0 ** (i % 11 - 5)) for i in range(math.prod(shape))]
      out.append(Case(f"{label}, {title}", Spec(fmt, **fields), shape, loud))

    add("per tensor", (5, 9))
    add("0-d", ())
    add("axis 0", (6, 20), axis=(0,))
    add("axis -1", (6, 20), axis=(-1,))
    add("axis 1 of a 4-D tensor", (2, 3, 4, 2), axis=(1,))
    add("axes 0 and 2", (3, 4, 5), axis=(0, 2))
    add("per token", (2, 3, 16), blocks=((-1, None),), dynamic=True)
    add("block 16 on the last axis", (4, 48), blocks=((-1, 16),))
    add("block 4 on axis 0", (8, 6), blocks=((0, 4),))
    add("8x8 tiles", (16, 24), blocks=((-2, 8), (-1, 8)))
    add("block 16, ragged tail", (3, 50), blocks=((-1, 16),), pad=True)
    add("4x4 tiles, ragged both ways", (10, 13), blocks=((-2, 4), (-1, 4)), pad=True)
    add("whole axis 0 of 3-D", (4, 2, 6), blocks=((0, None), (2, 3)))
    zeros = Case(f"{label}, a zero row, a NaN and an infinity", Spec(fmt, axis=(0,)), (4, 8), normal(32, 97))
    zeros.bits[8:16], zeros.bits[17], zeros.bits[26], zeros.bits[27] = [0, NEGATIVE] * 4, 0x7FC00000, 0x7F800000, 0xFF800000
    out.append(zeros)
  return out


def stochastic() -> list[Case]:
  out = []
  block = {"blocks": ((-1, 32),), "scale_format": "E8M0", "dynamic": True}
  specs = {
    "INT8": Spec(Int(8), rounding="stochastic"),
    "INT4 axis 0": Spec(Int(4), axis=(0,), rounding="stochastic"),
    "UINT8 zero point": Spec(Int(8, signed=False), zero_point=True, rounding="stochastic"),
    "E4M3": Spec(E4M3, rounding="stochastic"),
    "E5M2": Spec(E5M2, rounding="stochastic"),
    "MXFP4": Spec(E2M1, rounding="stochastic", **block),
    "MXFP6 E3M2 floor": Spec(E3M2, rounding="stochastic", e8m0_rule="floor", **block),
    "NVFP4": Spec(E2M1, blocks=((-1, 16),), scale_format="E4M3", dynamic=True, rounding="stochastic"),
  }
  for i, (label, spec) in enumerate(specs.items()):
    for key in ((0, 0), (-123456789, 987654321)):
      out.append(Case(f"{label}, key {key}", spec, (3, 64), normal(192, 100 + i), key=key))
  special = [*SPECIAL, 0x40600000, 0xBF000000, 0x3E800000, 0x80000001]
  out.append(Case("E2M1, special values", Spec(E2M1, rounding="stochastic"), (len(special),), special, [Fraction(6)], key=(3, 4)))
  out.append(Case("padding does not move the counters", Spec(E2M1, rounding="stochastic", pad=True, **block), (3, 45), normal(135, 120), key=(5, 6)))
  return out


def _elements(name: str, fmt: Float):
  return name.lower(), f"{name} per tensor: levels, midpoints, neighbours, range policy", lambda: element_cases(name, fmt)


FILES = [
  ("int", "INT2 to INT8, signed, narrow and unsigned, per tensor", integers),
  ("int_zero_point", "asymmetric integers", zero_points),
  *[_elements(n, f) for n, f in (("E4M3", E4M3), ("E5M2", E5M2), ("E3M2", E3M2), ("E2M3", E2M3), ("E2M1", E2M1))],
  ("granularity", "per tensor, channel, token, block, tiles, ragged tails", granularity),
  *[(f"mx_{n}", f"MX with {n.upper()} elements, four scale rules", mx(f)) for n, f in (("e4m3", E4M3), ("e5m2", E5M2), ("e3m2", E3M2))],
  *[(f"mx_{n}", f"MX with {n.upper()} elements, four scale rules", mx(f)) for n, f in (("e2m3", E2M3), ("e2m1", E2M1), ("int8", Int(8, narrow=True)))],
  ("nvfp4", "E4M3 block scales under a float32 tensor scale", nvfp4),
  ("nvfp4_four_over_six", "NVFP4, four over six", four_over_six),
  ("nf4", "NF4", nf4),
  ("double_scale", "double-quantized and float16 scales", double_quantized),
  ("stochastic", "stochastic rounding from a key", stochastic),
]  # fmt: skip
