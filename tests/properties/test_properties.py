"""Properties that hold for every specification, on arbitrary float32 (hypothesis draws bit patterns, not only round numbers)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import core
from core import encoding, formats
from core.conformance.runner import int32_word
from tests.spec.specs import KEY, SPECS

NEAREST = {label: spec.replace(pad=True) if spec.blocks else spec for label, spec in SPECS.items() if spec.rounding == "nearest"}
# one code step is the same everywhere: integers; and grids that are symmetric about zero
ODD = [label for label, spec in NEAREST.items() if not spec.zero_point and "nf4" not in label]
COMMON = settings(max_examples=40, deadline=None, derandomize=True)
moderate = st.floats(2.0**-20, 2.0**20, width=32)
values = st.one_of(st.just(0.0), moderate, moderate.map(lambda v: -v), st.sampled_from([1.0, -1.0, 0.5, 6.0, -448.0]))
tensors = hnp.arrays(np.float32, st.sampled_from([(4, 32), (3, 40), (16, 16)]), elements=values)


def bits(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).view(np.int32)


@pytest.mark.parametrize("label", NEAREST)
@COMMON
@given(x=tensors)
def test_codes_reproduce_themselves(label, x):
  """Quantizing the quantized tensor under the same scales changes nothing (idempotence)."""
  spec = NEAREST[label]
  if spec.four_over_six:  # its scales depend on the values, not on amax alone
    spec = spec.replace(four_over_six=False)
  scales = core.scales(core.block_amax(x, spec), spec)
  once = core.fake_quantize(x, spec, scales=scales)
  twice = core.fake_quantize(once, spec, scales=scales)
  assert np.array_equal(bits(once), bits(twice))


@pytest.mark.parametrize("label", ODD)
@COMMON
@given(x=tensors)
def test_odd(label, x):
  """Q(-x) == -Q(x), but for full-range integers, whose lowest code has no counterpart and is only reached beyond amax."""
  spec = NEAREST[label]
  assert np.array_equal(core.fake_quantize(-x, spec), -core.fake_quantize(x, spec))


@pytest.mark.parametrize("label", NEAREST)
@COMMON
@given(x=tensors)
def test_monotone_within_a_group(label, x):
  """x <= y under one scale implies Q(x) <= Q(y)."""
  spec = NEAREST[label]
  one = core.QuantSpec(spec.element, axis=(), zero_point=spec.zero_point)
  y = core.fake_quantize(np.sort(x.reshape(1, -1)), one)
  assert (np.diff(y) >= 0).all()


@pytest.mark.parametrize("label", [label for label in NEAREST if not NEAREST[label].scale_block])
@COMMON
@given(x=tensors, k=st.integers(-30, 30))
def test_scale_equivariant_by_powers_of_two(label, x, k):
  """Q(2^k x) == 2^k Q(x), codes unchanged: float formats have no preferred magnitude. (Float16 and double scales do.)"""
  spec, factor = NEAREST[label], np.float32(2.0**k)
  scaled, plain = core.quantize(x * factor, spec), core.quantize(x, spec)
  assert np.array_equal(scaled.codes, plain.codes)
  assert np.array_equal(core.dequantize(scaled), core.dequantize(plain) * factor)


@COMMON
@given(x=tensors, width=st.integers(2, 8))
def test_error_is_at_most_half_a_step(x, width):
  """Integers, own amax: |x - Q(x)| <= scale / 2, up to the rounding of v = fl(x / scale) and of the product (2^-22 of amax)."""
  spec = core.QuantSpec(formats.int_format(width), axis=(0,))
  q = core.quantize(x, spec)
  error = np.abs(core.dequantize(q).astype(np.float64) - x)
  assert (error <= q.scale.astype(np.float64) / 2 + 2.0**-22 * np.abs(x).max(axis=1, keepdims=True)).all()


@COMMON
@given(x=tensors)
def test_rceil_never_clips(x):
  """Under rceil the scaled amax lies within the grid."""
  spec = core.QuantSpec.named("mxfp4", pad=True)
  scales = core.scales(core.block_amax(x, spec), spec)
  assert (core.block_amax(x, spec) <= 6 * scales.step).all()


@COMMON
@given(x=hnp.arrays(np.float32, (8, 16), elements=values), bound=moderate)
def test_four_over_six_never_worse_than_plain(x, bound):
  """Per block, under the same tensor scale; the float32 error sum of the choice is good to 2^-18 of the error."""
  four = core.QuantSpec.named("nvfp4_four_over_six")
  tensor_amax = np.float32(max(np.abs(x).max(), bound))
  adaptive = core.quantize(x, four, tensor_amax)
  # the plain block scale under four-over-six's tensor scale: amax 448/256 times as large gives that tensor scale
  plain_step = adaptive.tensor_scale
  block = np.abs(x).max(axis=1, keepdims=True)
  with np.errstate(divide="ignore"):
    target = np.clip(block / (np.float32(6) * plain_step), 2.0**-9, 448).astype(np.float32)
  level = core.fake_quantize(target, core.QuantSpec(formats.E4M3), np.float32(448))
  scales = core.Scales(level * plain_step, np.where(block == 0, 0, 1 / (level * plain_step)).astype(np.float32), level)
  plain = core.fake_quantize(x, core.QuantSpec(formats.E2M1, axis=(0,)), scales=scales)
  error = [((y.astype(np.float64) - x) ** 2).sum(axis=1) for y in (core.dequantize(adaptive), plain)]
  assert (error[0] <= error[1] * (1 + 2.0**-18) + 1e-300).all()


def test_stochastic_rounding_is_unbiased():
  """Mean over 2^16 counters of a fixed key: within 5 standard errors of x (the sample is fixed, so this cannot flake)."""
  n = 2**16
  for element, amax, x in ((formats.INT8, 127.0, 3.3), (formats.E2M1, 6.0, 1.3), (formats.E2M1, 6.0, -4.4), (formats.E4M3, 448.0, 17.7)):
    spec = core.QuantSpec(element, rounding="stochastic")
    y = core.fake_quantize(np.full(n, x, np.float32), spec, np.float32(amax), key=tuple(int32_word(k) for k in KEY)).astype(np.float64)
    levels = np.unique(y)
    assert len(levels) == 2 and levels[0] < x < levels[1]
    assert abs(y.mean() - x) < 5 * y.std() / np.sqrt(n)


def test_stochastic_rounding_leaves_levels_alone():
  levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -6, -0.5], np.float32)
  spec = core.QuantSpec(formats.E2M1, rounding="stochastic")
  for k in range(50):
    assert np.array_equal(core.fake_quantize(levels, spec, np.float32(6), key=(k, -k)), levels)


@COMMON
@given(codes=hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 40))), width=st.integers(1, 8))
def test_pack_round_trip(codes, width):
  codes = codes & np.uint8(2**width - 1)
  packed = core.pack(codes, width)
  assert packed.shape == (codes.shape[0], -(-codes.shape[1] * width // 8))
  assert np.array_equal(encoding.unpack_codes(packed, width, codes.shape[1]), codes)
