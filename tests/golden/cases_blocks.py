"""Block formats: MX, NVFP4, four over six."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from tests.golden import exact, exact_tensor
from tests.golden.exact import E2M1, E3M2, E4M3, Float, Int, Spec, fl
from tests.golden.inputs import NEGATIVE, Case, float32, normal, special_rows

RULES = ("rceil", "floor", "ceil", "even")


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
    out.append(
      Case(
        "block 32 along the first axis", ragged.__class__(fmt, blocks=((0, 32),), scale_format="E8M0", dynamic=True), (32, 3), normal(96, 4)
      )
    )
    out.append(
      Case(
        "32x32 tiles, ragged", Spec(fmt, blocks=((-2, 32), (-1, 32)), scale_format="E8M0", dynamic=True, pad=True), (5, 40), normal(200, 5)
      )
    )
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
  wide = [float32(v) for v in (1e30, 1.0, 1e-11, 1e-27, 8e-12, 1.3e-11, 3e-23, 6e-12)]
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
  huge = [exact.from_bits(float32(1e20)).value] * 8
  out.append(Case("static, tensor amax 150 binades below a block's", static, (4, 32), x, huge, exact.from_bits(float32(1e-24)).value))
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
  out.append(
    Case("equal errors keep six; tiny errors", dynamic, (3, 16), [*ties, *[float32(6)] * 16, float32(6), *[float32(2.0**-66)] * 15])
  )
  tiles = Spec(E2M1, blocks=((-2, 16), (-1, 16)), scale_format="E4M3", four_over_six=True, pad=True)
  out.append(Case("16x16 tiles, ragged", tiles, (20, 23), normal(460, 73)))
  out.append(Case("block 12, padded sum tree", dataclasses.replace(dynamic, blocks=((-1, 12),)), (2, 24), normal(48, 74)))
  static = dataclasses.replace(dynamic, dynamic=False)
  out.append(Case("static, tensor amax of a louder sibling", static, (4, 32), normal(128, 75), None, Fraction(29)))
  return out
