"""Learned rounding: never worse, on the grid, near the exhaustive optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import core
from core import QuantSpec, formats
from core.calibrate.adaround import adaround

FORMATS = {
  "int4": QuantSpec(formats.INT4, blocks=((-1, 32),)),
  "int3 channel": QuantSpec(formats.int_format(3), axis=(0,)),
  "int4 ragged": QuantSpec(formats.INT4, blocks=((-1, 40),), pad=True),
  "int4 zero point": QuantSpec(formats.int_format(4, signed=False), axis=(0,), zero_point=True),
  "nf4": QuantSpec.named("nf4"),
  "nf4 double": QuantSpec.named("nf4_double", blocks=((-1, 16),), scale_block=4),
  "nvfp4": QuantSpec.named("nvfp4", dynamic=False),
  "nvfp4 tiles": QuantSpec.named("nvfp4", blocks=((-2, 16), (-1, 16)), dynamic=False),
  "nvfp4 dynamic": QuantSpec.named("nvfp4"),
  "nvfp4 four over six": QuantSpec.named("nvfp4_four_over_six"),
  "mxfp4": QuantSpec.named("mxfp4"),
  "mxfp4 floor": QuantSpec.named("mxfp4", e8m0_rule="floor"),
  "mxint8": QuantSpec.named("mxint8"),
  "fp8": QuantSpec(formats.E4M3, axis=(0,)),
}


def layer(n: int = 32, k: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """A weight and the Hessian of correlated inputs."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(4 * k, k)) @ (np.eye(k) + rng.normal(size=(k, k)) / np.sqrt(k))
  return rng.normal(size=(n, k)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def row_error(weight: np.ndarray, value: np.ndarray, hessian: np.ndarray) -> np.ndarray:
  d = (value.astype(np.float64) - weight).reshape(len(weight), -1)
  return np.einsum("nj,jk,nk->n", d, hessian.astype(np.float64), d)


@pytest.mark.parametrize("name", FORMATS)
def test_no_row_is_worse_than_rounding_to_nearest_and_the_weight_quantizes_to_itself(name: str):
  spec = FORMATS[name]
  weight, hessian = layer()
  weight[3] = 0
  result = adaround(weight, spec, hessian, steps=30)
  value = core.fake_quantize(result.weight, spec, result.amax, tensor_amax=result.tensor_amax)
  if spec.four_over_six:  # nearest rounding itself does not always survive there: such groups stay float
    assert np.mean(value == result.weight) > 0.9
  else:
    np.testing.assert_array_equal(value, result.weight)
  nearest = core.fake_quantize(weight, spec, result.amax, tensor_amax=result.tensor_amax)
  before, after = row_error(weight, nearest, hessian), row_error(weight, value, hessian)
  np.testing.assert_allclose(result.error_before, before, rtol=1e-6)  # float64 sums in another order
  np.testing.assert_allclose(result.error, after, rtol=1e-6)
  assert np.all(after <= before)
  assert after.sum() < 0.9 * before.sum()


def test_static_formats_need_no_repair():
  weight, hessian = layer()
  for name, spec in FORMATS.items():
    if not spec.dynamic:
      assert adaround(weight, spec, hessian, steps=5).repaired == 0, name


def test_close_to_the_exhaustive_optimum():
  spec = QuantSpec(formats.int_format(2), axis=(0,))
  weight, hessian = layer(n=60, k=6, seed=3)
  amax = core.amax(weight, spec) * np.float32(0.6)
  step = core.scales(amax, spec).step
  best = np.full(len(weight), np.inf)
  for codes in itertools.product(range(-2, 2), repeat=6):
    best = np.minimum(best, row_error(weight, np.array(codes, np.float32) * step, hessian))
  result = adaround(weight, spec, hessian, amax=amax)
  assert np.all(result.error >= best * (1 - 1e-6))
  before, after = result.error_before.sum() / best.sum(), result.error.sum() / best.sum()
  assert after < 1.05 < before  # local minima of single changes are left: here 2 % of the error
  assert np.mean(result.error <= best * (1 + 1e-5)) > 0.8


def test_both_parts_lower_the_error():
  weight, hessian = layer(seed=1)
  spec = FORMATS["int4"]
  total = {
    key: adaround(weight, spec, hessian, **options).error.sum()
    for key, options in {"none": {"steps": 0, "sweeps": 0}, "relaxed": {"sweeps": 0}, "sweeps": {"steps": 0}, "both": {}}.items()
  }
  assert total["relaxed"] < 0.6 * total["none"] and total["sweeps"] < 0.6 * total["none"]
  assert total["both"] < 0.98 * min(total["relaxed"], total["sweeps"])


def test_starts_from_given_codes():
  weight, hessian = layer()
  spec = FORMATS["int4"]
  amax = core.amax(weight, spec)
  step = np.repeat(core.scales(amax, spec).step, 32, axis=1)
  start = core.fake_quantize(weight + step * np.random.default_rng(1).normal(size=weight.shape).astype(np.float32), spec, amax)
  unchanged = adaround(weight, spec, hessian, amax=amax, start=start, steps=0, sweeps=0)
  np.testing.assert_array_equal(unchanged.weight, start)
  assert unchanged.changed == 0
  improved = adaround(weight, spec, hessian, amax=amax, start=start)
  np.testing.assert_allclose(improved.error_before, row_error(weight, start, hessian), rtol=1e-6)
  assert np.all(improved.error <= improved.error_before)
  again = adaround(weight, spec, hessian, amax=amax, start=adaround(weight, spec, hessian, amax=amax).weight)
  assert again.error.sum() <= adaround(weight, spec, hessian, amax=amax).error.sum()


def test_equal_seeds_give_equal_results():
  weight, hessian = layer()
  first, second, other = (adaround(weight, FORMATS["nvfp4"], hessian, steps=20, seed=seed).weight for seed in (5, 5, 6))
  np.testing.assert_array_equal(first, second)
  assert np.any(first != other)


def test_negative_scales_are_the_mirror_image():
  weight, hessian = layer()
  amax = core.amax(weight, FORMATS["int4"])
  mirrored = adaround(weight, FORMATS["int4"], hessian, amax=-amax, steps=20)
  np.testing.assert_array_equal(mirrored.weight, -adaround(-weight, FORMATS["int4"], hessian, amax=amax, steps=20).weight)


def test_convolutions_are_flattened():
  weight, hessian = layer(n=8, k=4 * 3 * 3)
  spec = QuantSpec(formats.int_format(3), axis=(0,))
  flat = adaround(weight, spec, hessian)
  shaped = adaround(weight.reshape(8, 4, 3, 3), spec, hessian)
  np.testing.assert_array_equal(shaped.weight.reshape(8, -1), flat.weight)


def test_errors_say_what_does_not_fit():
  weight, hessian = layer()
  with pytest.raises(ValueError, match=r"Hessian of shape \[64, 64\] does not fit a weight of shape \[32, 128\]"):
    adaround(weight, FORMATS["int4"], hessian[:64, :64])
  with pytest.raises(ValueError, match="start has shape"):
    adaround(weight, FORMATS["int4"], hessian, start=weight[:3])
