"""The tables of SPEC.md that hold numbers: computed from exact.py, put between its markers."""

from __future__ import annotations

import re
from fractions import Fraction

from tests.golden import exact, exact_tensor
from tests.golden.exact import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, Int, Spec, bits_of

FLOATS = {"E4M3": E4M3, "E5M2": E5M2, "E3M2": E3M2, "E2M3": E2M3, "E2M1": E2M1}


def table(head: list[str], rows: list[list[str]]) -> str:
  lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|", *(f"| {' | '.join(row)} |" for row in rows)]
  return "\n".join(lines)


def formats() -> str:
  rows = []
  for name, f in FLOATS.items():
    normal, sub = Fraction(2) ** f.emin, Fraction(2) ** (f.emin - f.mantissa)
    special = ", ".join(s for s in (f"NaN {f.nan:#04x}" if f.nan else "", f"infinity {f.inf:#04x}" if f.inf else "") if s) or "none"
    top = exact.float_code(f.bound, False, f)
    rows.append(
      [
        name,
        f"1/{f.exponent}/{f.mantissa}",
        str(f.bias),
        f"{float(f.bound):g} ({top:#04x})",
        f"2^{f.emin} ({exact.float_code(normal, False, f):#04x})",
        f"2^{f.emin - f.mantissa} ({exact.float_code(sub, False, f):#04x})",
        str(f.emax),
        special,
      ]
    )
  return table(
    ["format", "sign/exponent/fraction bits", "bias", "bound (code)", "smallest normal", "smallest subnormal", "emax", "special codes"],
    rows,
  )


def elements() -> str:
  """Codes at scale 1."""
  inputs = ["0", "-0", "1/4", "3/4", "5/4", "7/4", "5/2", "7/2", "5", "-1/10", "100", "-1000000"]
  fmts = {**FLOATS, "INT8": Int(8), "INT4": Int(4), "UINT4": Int(4, signed=False), "NF4": NF4}
  rows = []
  for text in inputs:
    value = Fraction(text.replace("-0", "0")) if text == "-0" else Fraction(text)
    x = exact.Real(text.startswith("-"), abs(exact.fl(value)))
    cells = [f"{exact.code_and_value(x, Fraction(1), Fraction(1), f, None)[0] & 0xFF:02x}" for f in fmts.values()]
    rows.append([f"`{float(value) if text != '-0' else -0.0:g}`", *cells])
  return table(["x", *fmts], rows)


def scale_rules() -> str:
  rows = []
  for text, a in (
    ("6", Fraction(6)),
    ("6 + 1 ulp", exact.from_bits(bits_of(Fraction(6)) + 1).value),
    ("3", Fraction(3)),
    ("7.5", Fraction(15, 2)),
    ("7", Fraction(7)),
    ("448", Fraction(448)),
    ("449", Fraction(449)),
    ("2^-90", Fraction(2) ** -90),
    ("0", Fraction(0)),
  ):
    cells = []
    for fmt in (E2M1, E4M3):
      for rule in ("rceil", "floor", "ceil", "even"):
        spec = Spec(fmt, blocks=((-1, 32),), scale_format="E8M0", e8m0_rule=rule)
        cells.append(f"{exact_tensor.e8m0_scale(a, spec).stored:02x}")
    rows.append([text, *cells])
  return table(["amax", *(f"{f} {r}" for f in ("E2M1", "E4M3") for r in ("rceil", "floor", "ceil", "even"))], rows)


def nvfp4() -> str:
  block = ["6", "3", "3/2", "3/4", "1/2", "1/4", "-6", "-3", "-3/2", "-3/4", "-1/2", "-1/4", "0", "1", "2", "4"]
  bits = [bits_of(Fraction(b)) for b in block]
  out = []
  for four in (False, True):
    spec = Spec(E2M1, blocks=((-1, 16),), scale_format="E4M3", dynamic=True, four_over_six=four)
    r = exact_tensor.quantize(bits, (1, 16), spec)
    assert r.tensor_scale is not None
    name, packed = "four over six" if four else "plain", exact.pack_row(r.codes, 4).hex()
    scales = f"tensor scale `{bits_of(r.tensor_scale[0]):08x}`, block scale `{r.scale[0]:02x}`"
    out.append(f"- {name}: {scales}, codes `{bytes(r.codes).hex()}`, packed `{packed}`")
  return "Block `" + " ".join(block) + "`:\n\n" + "\n".join(out)


def float_scales() -> str:
  rows = []
  for text, a in (
    ("1", Fraction(1)),
    ("pi (40490fdb)", exact.from_bits(0x40490FDB).value),
    ("2^-90", Fraction(2) ** -90),
    ("just below 2^-90", exact.from_bits(bits_of(Fraction(2) ** -90) - 1).value),
    ("3.4e38 (7f7fffff)", exact.from_bits(0x7F7FFFFF).value),
    ("0", Fraction(0)),
  ):
    cells = []
    for fmt in (Int(8), Int(4), E4M3):
      g = exact_tensor.float32_scale(a, fmt.bound)
      cells.append(f"{bits_of(g.step):08x} / {bits_of(g.inverse):08x}")
    rows.append([text, *cells])
  return table(["amax", "INT8: scale / inverse", "INT4", "E4M3"], rows)


def nf4_levels() -> str:
  return table(["code", "level", "bits"], [[f"{i:x}", f"{float(v):.9g}", f"{bits_of(v):08x}"] for i, v in enumerate(NF4.levels)])


def packing() -> str:
  codes = [1, 2, 3, 4, 5, 6, 7]
  return table(["width", "bytes"], [[str(w), f"`{exact.pack_row(codes, w).hex()}`"] for w in (3, 4, 5, 6, 8)])


def random_bits() -> str:
  rows = [[f"({k[0]}, {k[1]})", *(f"{exact.threefry(k, i):08x}" for i in range(4))] for k in ((0, 0), (1, 2), (-1, -1))]
  return table(["key", "i = 0", "1", "2", "3"], rows)


TABLES = {f.__name__: f for f in (formats, elements, scale_rules, nvfp4, float_scales, nf4_levels, packing, random_bits)}


def insert(text: str) -> str:
  """SPEC.md with every `<!-- generated: name -->` ... `<!-- end -->` filled."""
  return re.sub(
    r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
    lambda m: f"{m.group(1)}\n{TABLES[m.group(2)]()}\n\n{m.group(3)}",
    text,
    flags=re.DOTALL,
  )
