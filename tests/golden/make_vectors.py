"""Writes core/conformance/vectors/*.json and the examples of SPEC.md, from the exact rationals of exact.py and exact_tensor.py.

  python -m tests.golden.make_vectors            # writes
  python -m tests.golden.make_vectors --check    # exit status 1 if a written file differs from what would be written

Neither `core` nor numpy is imported. `struct` and `random` are used to pick inputs, never to decide an expected number.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from fractions import Fraction

from tests.golden import cases, exact, exact_tensor, inputs, spec_examples
from tests.golden.exact import E2M1, E2M3, E3M2, E4M3, E5M2, Codebook, Float, Int, Spec

ROOT = pathlib.Path(__file__).parents[2]
VECTORS = ROOT / "core" / "conformance" / "vectors"
FLOAT_NAMES = {E4M3: "E4M3", E5M2: "E5M2", E3M2: "E3M2", E2M3: "E2M3", E2M1: "E2M1"}


def hex_floats(bits: list[int]) -> str:
  return " ".join(f"{b:08x}" for b in bits)


def hex_codes(codes: list[int]) -> str:
  return bytes(c & 0xFF for c in codes).hex()


def element_json(fmt: Int | Float | Codebook) -> dict:
  if isinstance(fmt, Int):
    return {"kind": "int", "bits": fmt.bits, "signed": fmt.signed, "narrow_range": fmt.narrow}
  if isinstance(fmt, Codebook):
    return {"kind": "codebook", "name": "NF4", "levels": hex_floats([exact.bits_of(v) for v in fmt.levels])}
  return {
    "kind": "float",
    "name": FLOAT_NAMES[fmt],
    "exponent_bits": fmt.exponent,
    "mantissa_bits": fmt.mantissa,
    "bias": fmt.bias,
    "bound": hex_floats([exact.bits_of(fmt.bound)]),
    "nan_code": fmt.nan,
    "inf_code": fmt.inf,
  }


def spec_json(spec: Spec) -> dict:
  """Every field that decides a number; fields at their default are left out."""
  out: dict = {"element": element_json(spec.element)}
  for name in ("axis", "blocks", "scale_format", "scale_block", "dynamic", "e8m0_rule", "four_over_six", "rounding", "zero_point", "pad"):
    value = getattr(spec, name)
    if value != getattr(Spec(spec.element), name):
      out[name] = value
  if spec.bound is not None:
    out["bound"] = hex_floats([exact.bits_of(spec.bound)])
  return out


def case_json(case: inputs.Case) -> dict:
  spec, shape, bits = case.spec, case.shape, case.bits
  amax, tensor_amax = case.amax, case.tensor_amax
  r = exact_tensor.quantize(bits, shape, spec, amax, tensor_amax, case.key)
  out: dict = {"name": case.name, "spec": spec_json(spec), "shape": shape, "x": hex_floats(bits)}
  if amax is not None:
    out["amax"] = array_json(*flat_amax(amax, spec, shape))
  if tensor_amax is not None:
    out["tensor_amax"] = hex_floats([exact.bits_of(tensor_amax)])
  if case.key is not None:
    out["key"] = case.key
  float_scale = spec.scale_format in (None, "FLOAT16")
  expected: dict = {"amax": array_json(*own_amax(bits, shape, spec)), "codes": hex_codes(r.codes), "values": hex_floats(r.values)}
  expected["scale"] = {
    "shape": r.scale_shape,
    **(
      {"float32": hex_floats([exact.bits_of(Fraction(s)) for s in r.scale])}
      if float_scale
      else {"uint8": hex_codes([int(s) for s in r.scale])}
    ),
  }
  if r.tensor_scale is not None:
    expected["tensor_scale"] = array_json(r.tensor_scale, r.tensor_scale_shape)
  if r.zero_point is not None:
    expected["zero_point"] = r.zero_point
  if spec.element.bits < 8:
    row = shape[-1] if shape else 1
    rows = [exact.pack_row(r.codes[i : i + row], spec.element.bits) for i in range(0, len(r.codes), row)]
    expected["packed"] = b"".join(rows).hex()
  return out | {"expected": expected}


def flat_amax(amax: list, spec: Spec, shape: tuple[int, ...]) -> tuple[list[Fraction], tuple[int, ...]]:
  scales = exact_tensor.scale_shape(shape, spec)
  if spec.zero_point:
    return [low for low, _ in amax] + [high for _, high in amax], (2, *scales)
  return amax, scales


def own_amax(bits: list[int], shape: tuple[int, ...], spec: Spec) -> tuple[list[Fraction], tuple[int, ...]]:
  """What the tensor itself says, in the shape of `core.amax`."""
  x = [exact.from_bits(b) for b in bits]
  groups, count = exact_tensor.group_of(shape, spec), math.prod(exact_tensor.scale_shape(shape, spec))
  if spec.zero_point:
    return flat_amax(exact_tensor.group_range(x, groups, count), spec, shape)
  amax = exact_tensor.group_amax(x, groups, count)
  return ([max(amax)], ()) if spec.scale_format == "E4M3" and spec.dynamic else (amax, exact_tensor.scale_shape(shape, spec))


def array_json(values: list[Fraction], shape: tuple[int, ...]) -> dict:
  return {"shape": shape, "float32": hex_floats([exact.bits_of(v) for v in values])}


def threefry_json() -> dict:
  """Random bits alone: keys, counters and words."""
  rows = []
  for key in ((0, 0), (1, 2), (-1, -1), (0x13198A2E, 0x03707344), (42, -2147483648)):
    counters = [0, 1, 2, 3, 7, 255, 65536, 2**31 - 1]
    words = " ".join(f"{exact.threefry(key, c):08x}" for c in counters)
    rows.append({"key": key, "counters": counters, "words": words})
  return {"title": "Threefry-2x32, 20 rounds, counter (0, i), words xored", "random_bits": rows}


def files() -> dict[pathlib.Path, str]:
  """Every file this script is the source of, and its text."""
  out = {}
  for name, title, group in cases.FILES:
    out[VECTORS / f"{name}.json"] = dump({"title": title, "cases": [case_json(c) for c in group()]})
  out[VECTORS / "threefry.json"] = dump(threefry_json())
  spec_md = ROOT / "SPEC.md"
  out[spec_md] = spec_examples.insert(spec_md.read_text())
  return out


def dump(content: dict) -> str:
  """JSON with one case a line, so that a changed rule shows as changed cases in a diff."""
  key = "cases" if "cases" in content else "random_bits"
  lines = ",\n".join(json.dumps(c, separators=(", ", ": ")) for c in content[key])
  return f'{{"title": {json.dumps(content["title"])},\n"source": "tests/golden/make_vectors.py",\n"{key}": [\n{lines}\n]}}\n'


def main(arguments: list[str]) -> int:
  different = {path: text for path, text in files().items() if not path.exists() or path.read_text() != text}
  for path, text in different.items():
    print(f"{'differs' if '--check' in arguments else 'written'}: {path.relative_to(ROOT)} ({len(text) / 1024:.0f} KiB)")
    if "--check" not in arguments:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
  return int("--check" in arguments and bool(different))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
