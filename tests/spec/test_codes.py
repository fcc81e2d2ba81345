"""Exhaustive: every code of every format, and every bfloat16 value through every float format against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import core
from core import encoding, formats
from core.arrays import to_numpy

EXAMPLE = formats.FloatFormat("E2M2", 2, 2, 7.0)
ELEMENTS = {
  **{f.name: f for f in (formats.E4M3, formats.E5M2, formats.E3M2, formats.E2M3, formats.E2M1, formats.NF4, EXAMPLE)},
  **{f"INT{b}": formats.int_format(b) for b in range(2, 9)},
  **{f"UINT{b}": formats.int_format(b, signed=False) for b in range(2, 9)},
}
TWINS = {
  "E4M3": ml_dtypes.float8_e4m3fn,
  "E5M2": ml_dtypes.float8_e5m2,
  "E3M2": ml_dtypes.float6_e3m2fn,
  "E2M3": ml_dtypes.float6_e2m3fn,
  "E2M1": ml_dtypes.float4_e2m1fn,
}


def all_codes(fmt) -> np.ndarray:
  """Every stored pattern, as `quantize` would hand it out."""
  if isinstance(fmt, formats.IntFormat):
    return np.arange(fmt.min_code, fmt.max_code + 1).astype(np.int8 if fmt.signed else np.uint8)
  return np.arange(2**fmt.bits).astype(np.uint8)


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_decodes_and_encodes_to_itself(runtime, name, compared):
  if runtime.compiled:
    pytest.skip("test_every_bfloat16_value_against_ml_dtypes compiles the same functions")
  fmt = ELEMENTS[name]
  codes = all_codes(fmt)
  level = to_numpy(encoding.decode(runtime.array(codes), fmt))
  finite = np.isfinite(level)
  again = to_numpy(encoding.encode(runtime.array(level), fmt))
  spec = core.QuantSpec(fmt)
  amax = runtime.array(np.float32(fmt.bound))
  quantized = to_numpy(core.quantize(runtime.array(level[finite]), spec, amax).codes)
  compared(2 * codes.size)
  assert np.array_equal(again[finite], codes[finite])
  assert np.array_equal(quantized, codes[finite])
  if name in TWINS:
    twin = codes.view(TWINS[name]).astype(np.float32)
    assert np.array_equal(level.view(np.int32)[finite], twin.view(np.int32)[finite])
    assert np.array_equal(np.isnan(level), np.isnan(twin))
    assert np.array_equal(np.isinf(level), np.isinf(twin))


@pytest.mark.parametrize("name", TWINS)
def test_every_bfloat16_value_against_ml_dtypes(runtime, name, compared):
  """All 2^16 patterns with scale 1. Clipped first: ml_dtypes has other rules beyond the bound (NaN, infinity)."""
  if runtime.name == "torch.compile" and name not in ("E4M3", "E2M1"):
    pytest.skip("the same graph with other constants")
  fmt = formats.FLOAT_FORMATS[ELEMENTS[name].exponent_bits, ELEMENTS[name].mantissa_bits]
  x = np.arange(2**16, dtype=np.uint32) << 16
  x = x.view(np.float32)
  x = x[np.isfinite(x)]
  spec = core.QuantSpec(fmt)
  arrays = runtime.array(x), runtime.array(np.float32(fmt.bound))
  out = runtime.evaluator(spec, ("amax",), False)(*arrays)
  codes, values = to_numpy(out[1]), to_numpy(out[5])
  twin = np.clip(x, -fmt.bound, fmt.bound).astype(TWINS[name])
  compared(2 * x.size)
  assert np.array_equal(codes, twin.view(np.uint8))
  assert np.array_equal(values.view(np.int32), twin.astype(np.float32).view(np.int32))


def test_every_packing_width_round_trips(runtime, compared):
  if runtime.compiled:
    pytest.skip("packing is compiled by the vectors")
  rng = np.random.default_rng(0)
  for width in range(1, 9):
    for length in (1, 7, 8, 16, 33):
      codes = rng.integers(0, 2**width, (3, length)).astype(np.uint8)
      packed = core.pack(runtime.array(codes), width)
      assert packed.shape == (3, -(-length * width // 8))
      assert np.array_equal(to_numpy(encoding.unpack_codes(packed, width, length)), codes)
      compared(codes.size)
