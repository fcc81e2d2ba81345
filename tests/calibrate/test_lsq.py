"""LSQ: its stationary point, what it guarantees, and dual LSQ's weight."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

import core
from core import QuantSpec, formats, gaussian, limits
from core.calibrate.lsq import dual_lsq, fit_steps, lsq, lsq_amax, lsq_gradient
from core.calibrate.weight_search import mse_search
from tests.calibrate.test_adaround import layer, row_error

FORMATS = {
  "int4": QuantSpec(formats.INT4, blocks=((-1, 32),)),
  "int4 ragged": QuantSpec(formats.INT4, blocks=((-1, 48),), pad=True),
  "int3 channel": QuantSpec(formats.int_format(3), axis=(0,)),
  "int3 columns": QuantSpec(formats.int_format(3), axis=(1,)),
  "int4 tensor": QuantSpec(formats.INT4),
  "nf4": QuantSpec.named("nf4"),
  "nvfp4": QuantSpec.named("nvfp4", dynamic=False),
  "nvfp4 tiles": QuantSpec.named("nvfp4", blocks=((-2, 16), (-1, 16)), dynamic=False),
}


def expected_gradient(step: float, top: int) -> float:
  """E of LSQ's gradient of (Q(w) - w)^2 / 2 by the step, w from N(0,1), codes -top to top: exact integrals over the cells."""
  codes = np.arange(-top, top + 1)
  low, high = (codes - 0.5) * step, (codes + 0.5) * step
  low[0], high[-1] = -top * step, top * step  # beyond lies the clipped part
  mass, first, second = gaussian.moments(low, high)
  inside = np.sum(second - 2 * codes * step * first + (codes * step) ** 2 * mass) / step
  tail, tail_first, _ = gaussian.moments(np.array([top * step]), np.array([np.inf]))
  outside = 2 * top * float((top * step * tail - tail_first)[0])
  return float(inside) + outside


def root(function, low: float, high: float) -> float:
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (low, middle) if function(middle) > 0 else (middle, high)
  return middle


@pytest.mark.parametrize("bits", [3, 4])
def test_settles_where_the_expected_gradient_is_zero_near_the_best_step(bits: int):
  top = 2 ** (bits - 1) - 1
  count = 100_000
  weight = np.array([[statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]], np.float32)
  spec = QuantSpec(formats.int_format(bits, narrow_range=True))
  result = lsq(weight, spec, amax=lsq_amax(weight, spec), keep="last", steps=150)
  step = float(result.amax) / top
  best = limits.optimal_uniform(bits).scale
  expected = root(lambda s: expected_gradient(s, top), 0.3 * best, 1.5 * best)
  # 100,000 quantiles in place of the density, and the schedule's last steps: together below a fifth of the distance to the best step
  assert abs(step / expected - 1) < 0.2 * abs(expected / best - 1)
  assert 0.004 < abs(expected / best - 1) < 0.03  # near, not at, the least error


def test_gradient_is_the_residual_inside_and_the_end_outside():
  u = np.array([0.3, -1.6, 6.9, 7.0, 7.4, -8.2], np.float32)
  level = np.array([0, -2, 7, 7, 7, -8], np.float32)
  np.testing.assert_allclose(lsq_gradient(u, level, -8, 7), [-0.3, -0.4, 0.1, 0, 7, -8], atol=1e-6)


def test_first_step_of_the_paper():
  weight = np.full((4, 64), 2.0, np.float32)
  spec = FORMATS["int4"]
  np.testing.assert_allclose(lsq_amax(weight, spec), np.full((4, 2), 2 * 2.0 / np.sqrt(7) * 7), rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", [{}, {"tied_amax": False}, {"tied_amax": False, "learn": "pre"}, {"tied_amax": False, "learn": "both"}])
def test_never_worse_than_the_start(name: str, options: dict):
  spec = FORMATS[name]
  weight, hessian = layer(seed=2)
  weight[5] = 0
  result = lsq(weight, spec, hessian, steps=20, **options)
  value = core.fake_quantize(weight if result.weight is None else result.weight, spec, result.amax, tensor_amax=result.tensor_amax)
  if result.weight is not None:
    np.testing.assert_array_equal(value, result.weight)  # one stored scale: the same codes come out again
  before = row_error(weight, core.fake_quantize(weight, spec), hessian)
  after = row_error(weight, value, hessian)
  np.testing.assert_allclose(result.error_before, before, rtol=1e-6)  # float64 sums in another order
  np.testing.assert_allclose(result.error, after, rtol=1e-6)
  assert after.sum() < before.sum() or (name == "nvfp4 tiles" and options.get("tied_amax") is False)  # rows share scales: all or nothing
  if name in ("int4", "int4 ragged", "int3 channel", "nf4", "nvfp4"):
    assert np.all(after <= before)


def test_improves_on_the_search_it_starts_from():
  weight, hessian = layer(seed=4)
  spec = FORMATS["int4"]
  amax = mse_search(weight, spec).amax
  tied, dual = lsq(weight, spec, hessian, amax=amax), dual_lsq(weight, spec, hessian, amax=amax, learn="both")
  assert tied.error.sum() < 0.95 * tied.error_before.sum()
  assert dual.error.sum() < 0.95 * dual.error_before.sum()


def test_fitted_steps_of_whole_rows_solve_the_least_squares():
  weight, hessian = layer(n=8)
  spec = FORMATS["int3 channel"]
  step = core.scales(core.amax(weight, spec), spec).step
  levels = np.rint(weight / step).astype(np.float32)
  fitted = fit_steps(weight, levels, step, hessian, spec)
  exact = np.einsum("nj,jk,nk->n", levels, hessian, weight) / np.einsum("nj,jk,nk->n", levels, hessian, levels)
  np.testing.assert_allclose(fitted[:, 0], exact, rtol=1e-4)  # float32 sums of 128 x 128 terms


def test_negative_scales_are_learned_as_the_mirror_image():
  weight, hessian = layer(n=8)
  spec = FORMATS["int4"]
  amax = core.amax(weight, spec)
  for options in ({}, {"tied_amax": False, "learn": "both"}):
    mirrored = lsq(weight, spec, hessian, amax=-amax, steps=10, **options)
    plain = lsq(-weight, spec, hessian, amax=amax, steps=10, **options)
    np.testing.assert_array_equal(mirrored.amax, -plain.amax)
    np.testing.assert_array_equal(mirrored.error, plain.error)


def test_no_hessian_is_the_identity():
  weight, _ = layer(n=8)
  spec = FORMATS["int4"]
  identity = np.eye(weight.shape[1], dtype=np.float32)
  for options in ({}, {"tied_amax": False, "learn": "both"}):
    first, second = (lsq(weight, spec, hessian, steps=5, **options) for hessian in (None, identity))
    np.testing.assert_allclose(first.amax, second.amax, rtol=1e-5)  # a product with the identity may add in another order


@pytest.mark.parametrize(
  ("spec", "options", "message"),
  [
    (QuantSpec.named("mxfp4"), {}, "lsq needs a static symmetric format"),
    (QuantSpec.named("nvfp4"), {}, "lsq needs a static symmetric format"),
    (FORMATS["int4"], {"learn": "neither"}, "learn is 'neither'; allowed are post, pre, both"),
    (FORMATS["int4"], {"keep": "first"}, "keep is 'first'"),
  ],
)
def test_errors_say_what_is_allowed(spec: QuantSpec, options: dict, message: str):
  with pytest.raises(ValueError, match=message):
    lsq(np.ones((4, 64), np.float32), spec, **options)
