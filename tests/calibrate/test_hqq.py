"""HQQ: never worse than max in its own error, the shrinkage by its optimality, and what core makes of the range."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import QuantSpec, blocks, formats
from core.calibrate.hqq import hqq_search, shrink
from tests.calibrate.test_weight_search import FORMATS, weight_of

UINT = {
  "uint4": QuantSpec(formats.int_format(4, signed=False), blocks=((-1, 32),), zero_point=True),
  "uint2 ragged": QuantSpec(formats.int_format(2, signed=False), blocks=((-1, 48),), zero_point=True, pad=True),
  "uint3 rows": QuantSpec(formats.int_format(3, signed=False), axis=(0,), zero_point=True),
  "nf4 double": QuantSpec.named("nf4_double", blocks=((-1, 16),), scale_block=3),
}
ALL = {**FORMATS, **UINT}


def p_error(weight: np.ndarray, spec: QuantSpec, amax, tensor_amax=None) -> np.ndarray:
  """Sum of |W - Q(W)|^.7 of each group, straight from the public verbs."""
  tiling = blocks.tiling(weight.shape, spec)
  value = core.fake_quantize(weight, spec, amax, tensor_amax=tensor_amax).astype(np.float64)
  return np.sum(np.abs(blocks.to_blocks(value - weight, tiling)) ** 0.7, axis=tiling.reduce).reshape(tiling.scales)


@pytest.mark.parametrize("name", ALL)
def test_no_group_is_worse_than_with_max(name: str):
  spec, weight = ALL[name], weight_of(n=48)
  found = hqq_search(weight, spec)
  assert found.amax is not None and found.error is not None
  assert found.amax.shape == core.amax(weight, spec).shape and found.amax.dtype == np.float32
  before, after = (p_error(weight, spec, a, found.tensor_amax) for a in (core.amax(weight, spec), found.amax))
  np.testing.assert_allclose(found.error, after, rtol=1e-6)  # differences are float64 here, float32 there
  np.testing.assert_allclose(found.error_before, before, rtol=1e-6)
  if name == "nf4 double":
    assert after.sum() <= before.sum()  # groups depend on each other
  else:
    assert np.all(after <= before * (1 + 1e-9))
  assert after.sum() < before.sum() or name in ("mxfp4 static", "nf4 double", "int8 tensor")
  assert np.all(core.fake_quantize(weight, spec, found.amax, tensor_amax=found.tensor_amax)[2] == 0)  # the zero row


@pytest.mark.parametrize("name", ["uint4", "int4 zero point"])
def test_the_step_moves_and_a_misplaced_zero_point_comes_back(name: str):
  spec, weight = ALL[name], np.random.default_rng(0).normal(size=(48, 128)).astype(np.float32)
  amax = core.amax(weight, spec)
  plain = core.scales(amax, spec)
  found = hqq_search(weight, spec)
  assert np.mean(core.scales(found.amax, spec).step != plain.step) > 0.9
  assert found.error.sum() < 0.97 * found.error_before.sum()
  far = np.clip(plain.zero_point + 6, spec.element.min_code, spec.element.max_code)
  start = np.stack([(spec.element.min_code - far) * plain.step, (spec.element.max_code - far) * plain.step])
  found = hqq_search(weight, spec, amax=start, beta=0.1)  # with little shrinkage z is the mean of what is left: clipping pulls at it
  back = core.scales(found.amax, spec).zero_point
  assert np.mean(back < far) > 0.5 and np.all(back <= far)
  assert found.error.sum() < 0.8 * found.error_before.sum()


def test_two_bits_gain_squared_error_too():
  weight, spec = weight_of(n=48), UINT["uint2 ragged"]
  found = hqq_search(weight, spec)
  assert found.error.sum() < 0.9 * found.error_before.sum()
  errors = []
  for amax in (core.amax(weight, spec), found.amax):
    value = core.fake_quantize(weight, spec, amax).astype(np.float64)
    errors.append(np.sum((value - weight)[5:] ** 2))  # without the loud row
  assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", ["uint4", "int4 block", "nf4"])
def test_the_unit_of_the_weights_does_not_matter(name: str):
  weight, spec = weight_of(n=48), ALL[name]
  small = hqq_search(weight * np.float32(2.0**-12), spec)
  # step**p is no power of two, so that near ties between iterations may fall differently
  np.testing.assert_allclose(small.amax * np.float32(2.0**12), hqq_search(weight, spec).amax, rtol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_shrink(beta: float):
  d = np.linspace(-3, 3, 61)
  got = shrink(d, 0.7, beta)
  size = np.abs(d[d != 0])
  np.testing.assert_allclose(np.abs(got[d != 0]), np.maximum(size - size ** (0.7 - 1) / beta, 0))
  assert np.all(got * d >= 0) and np.all(np.abs(got) <= np.abs(d))
  np.testing.assert_allclose(shrink(d, 1.0, beta), np.sign(d) * np.maximum(np.abs(d) - 1 / beta, 0))  # p = 1: soft threshold


def test_an_exact_weight_stays_exact():
  weight = np.tile(np.arange(-7, 8, dtype=np.float32), 5)[None, :64]
  spec = QuantSpec(formats.INT4, blocks=((-1, 32),))
  found = hqq_search(weight, spec)
  assert np.all(found.error == 0) and np.all(found.amax == core.amax(weight, spec))


def test_what_cannot_be_searched():
  assert "dynamic" in hqq_search(weight_of(), QuantSpec.named("mxfp4")).note
  assert "dynamic two-level" in hqq_search(weight_of(), QuantSpec.named("nvfp4")).note
  for options in ({"p": 0.0}, {"p": 1.1}, {"beta": 0.0}, {"kappa": 0.9}):
    with pytest.raises(ValueError, match="are not allowed; use 0 < p <= 1"):
      hqq_search(weight_of(), FORMATS["int4 block"], **options)
