"""What the conformance vectors cover: specifications and inputs, one function per file."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from fractions import Fraction

from tests.golden import exact
from tests.golden.cases_blocks import four_over_six, mx, nvfp4
from tests.golden.exact import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, Codebook, Float, Int, Spec, bits_of, fl
from tests.golden.inputs import NEGATIVE, SPECIAL, Case, float32, grid, normal, special_rows


def element_cases(name: str, fmt: Int | Float | Codebook) -> list[Case]:
  """One element format: every level, midpoint and neighbour at scale 1 and at an awkward scale; the range policy. One scale a row."""
  rows, awkward = Spec(fmt, axis=(0,)), exact.from_bits(0x40490FDB).value
  first, second = grid(fmt), grid(fmt, fl(awkward / fmt.bound))
  if isinstance(fmt, Int) and fmt.narrow:  # differs from the full range at the end of the grid only
    first, second = first[-128:], second[-128:]
  width = -(-len(first) // 128) * 128
  padded = [*first, *[0] * (width - len(first)), *second, *[0] * (width - len(second))]
  edges = [
    bits_of(Fraction(2) ** -90),
    bits_of(Fraction(2) ** -90) - 1,
    bits_of(Fraction(2) ** 126),
    bits_of(Fraction(2) ** 126) + 1,
    0x7F7FFFFF,
    1,
    0,
  ]
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


def signed_scales() -> list[Case]:
  """Negative amax: a negative scale for signed integers of full range under a float32 or float16 scale, a zero group elsewhere."""
  out, awkward = [], exact.from_bits(0x40490FDB).value
  for bits in (2, 3, 4, 8):
    fmt = Int(bits)
    first, second = grid(fmt)[-128:], grid(fmt, fl(awkward / fmt.bound))[-128:]
    out.append(
      Case(f"INT{bits}, grid at scale -1 and at amax = -pi", Spec(fmt, axis=(0,)), (2, len(first)), first + second, [-fmt.bound, -awkward])
    )
  edges = [0x42B8B000, bits_of(Fraction(2) ** -90), bits_of(Fraction(2) ** -90) - 1, bits_of(Fraction(2) ** 126) + 1, 0x7F7FFFFF, 1, 0]
  policy = []
  for a in edges:
    q = exact.from_bits(a).value
    policy += [
      a,
      a | NEGATIVE,
      bits_of(fl(q * Fraction(2, 3))),
      bits_of(fl(q / 5)) | NEGATIVE,
      0x7F800000,
      0xFF800000,
      0x7FC00000,
      NEGATIVE,
    ]
  amax = [-exact.from_bits(a).value for a in edges]
  out.append(Case("INT4, range policy", Spec(Int(4), axis=(0,)), (len(edges), 8), policy, amax))
  mixed = [fl(Fraction(n, 8) * (-1) ** n) for n in range(9, 17)]
  blocks = {"blocks": ((-1, 16),)}
  for label, spec in (
    ("INT4", Spec(Int(4), **blocks)),
    ("INT4 with float16 scales", Spec(Int(4), scale_format="FLOAT16", **blocks)),
    ("INT8 with bound 127.5", Spec(Int(8), bound=Fraction(255, 2), **blocks)),
    ("INT4 stochastic", Spec(Int(4), rounding="stochastic", **blocks)),
    ("INT4 narrow: zero groups", Spec(Int(4, narrow=True), **blocks)),
    ("UINT4: zero groups", Spec(Int(4, signed=False), **blocks)),
    ("E4M3: zero groups", Spec(E4M3, **blocks)),
    ("MXFP4: zero groups", Spec(E2M1, scale_format="E8M0", **blocks)),
    ("NF4 with float16 scales: zero groups", Spec(NF4, scale_format="FLOAT16", **blocks)),
  ):
    key = (7, 8) if spec.rounding == "stochastic" else None
    out.append(Case(f"{label}, block 16, amax of both signs", spec, (4, 32), normal(128, 140), mixed, key=key))
  tiny = [-exact.from_bits(b).value for b in (0x2B000000, 0x33800000, 0x477FE000, 0x4F000000)]
  half = Spec(Int(4), blocks=((-1, 16),), scale_format="FLOAT16")
  out.append(Case("INT4 with float16 scales, amax from -2^-41 to -2^31", half, (4, 16), normal(64, 141), tiny))
  return out


def zero_points() -> list[Case]:
  out = []
  for fmt, label in ((Int(8), "INT8"), (Int(8, signed=False), "UINT8"), (Int(4), "INT4"), (Int(4, signed=False), "UINT4")):
    tensor, rows = Spec(fmt, zero_point=True), Spec(fmt, axis=(0,), zero_point=True)
    shifted = [bits_of(fl(exact.from_bits(b).value + shift)) for shift in (-3, 0, Fraction(1, 2), 5) for b in normal(24, shift.numerator)]
    out.append(Case(f"{label} zero point, rows that straddle and miss zero", rows, (4, 24), shifted))
    out.append(
      Case(
        f"{label} zero point, special values",
        tensor,
        (len(SPECIAL) + 2,),
        [*SPECIAL[:6], *SPECIAL[8:], 0x3F800000, 0xC0000000, 0x40490FDB, 1],
      )
    )
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
  out.append(
    Case(
      "NF4 block 64, groups of 256 scales", Spec(NF4, blocks=((-1, 64),), scale_format="UINT8", scale_block=256), (2, 256), normal(512, 91)
    )
  )
  out.append(Case("all zero", spec, (1, 64), [0] * 64))
  out.append(
    Case("INT4 block 16, tiny", Spec(Int(4), blocks=((-1, 16),), scale_format="UINT8", scale_block=2), (2, 64), normal(128, 92, 1e-26))
  )
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
  out.append(
    Case("padding does not move the counters", Spec(E2M1, rounding="stochastic", pad=True, **block), (3, 45), normal(135, 120), key=(5, 6))
  )
  return out


_FLOATS = (("e4m3", E4M3), ("e5m2", E5M2), ("e3m2", E3M2), ("e2m3", E2M3), ("e2m1", E2M1))
_MX = (*_FLOATS, ("int8", Int(8, narrow=True)))

# (file name, title, cases)
FILES = [
  ("int", "INT2 to INT8, signed, narrow and unsigned", integers),
  ("int_signed_scale", "negative amax: negative scales of signed integers", signed_scales),
  ("int_zero_point", "asymmetric integers", zero_points),
  *[(n, f"{n.upper()}: levels, midpoints, neighbours, range policy", functools.partial(element_cases, n.upper(), f)) for n, f in _FLOATS],
  ("granularity", "per tensor, channel, token, block, tiles, ragged tails", granularity),
  *[(f"mx_{n}", f"MX with {n.upper()} elements, four scale rules", mx(f)) for n, f in _MX],
  ("nvfp4", "E4M3 block scales under a float32 tensor scale", nvfp4),
  ("nvfp4_four_over_six", "NVFP4, four over six", four_over_six),
  ("nf4", "NF4", nf4),
  ("double_scale", "double-quantized and float16 scales", double_quantized),
  ("stochastic", "stochastic rounding from a key", stochastic),
]
