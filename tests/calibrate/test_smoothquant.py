"""SmoothQuant scales by their formula, dead channels, and the search over alpha."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import QuantSpec, formats
from core.calibrate.scale_search import alpha_grid, compensated, search_alpha_grid
from core.calibrate.smoothquant import search_alpha, smooth_scale, weight_amax

WEIGHT, INPUT = QuantSpec(formats.INT8, axis=(0,)), QuantSpec(formats.INT8)


def loud_layer(channels: int = 4, loudness: float = 50.0, seed: int = 0):
  """Two weights of one input, and samples of it with a few loud channels."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(200, 64)).astype(np.float32)
  x[:, :channels] *= loudness
  return [rng.normal(size=(n, 64)).astype(np.float32) for n in (24, 40)], x


def test_formula_on_powers_of_two():
  x, w = np.float32([4, 16, 1, 2**20]), np.float32([1, 4, 16, 1])
  np.testing.assert_array_equal(smooth_scale(x, w), np.float32([1 / 4, 1 / 16, 1, 1e-4]))  # alpha 1: 1 / x, and the clamp
  np.testing.assert_array_equal(smooth_scale(x, w, 0.5), np.float32([1 / 2, 1 / 2, 4, 2**-10]))  # sqrt(w / x)
  np.testing.assert_array_equal(smooth_scale(x, w, 0.0), w)
  np.testing.assert_array_equal(smooth_scale(np.float32([1e-9]), np.float32([1])), np.float32([1e4]))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_dead_channels_keep_their_scale(alpha: float):
  found = smooth_scale(np.float32([0, 3, 0, 2, np.inf]), np.float32([2, 0, 0, 5, 1]), alpha)
  assert list(found[[0, 1, 2, 4]]) == [1, 1, 1, 1] and found[3] == pytest.approx(5 ** (1 - alpha) / 2**alpha) and found.dtype == np.float32


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_float_function_does_not_change(alpha: float):
  weights, x = loud_layer()
  scale = smooth_scale(np.abs(x).max(axis=0), weight_amax(weights), alpha)
  for weight in weights:
    y = x.astype(np.float64) @ weight.T.astype(np.float64)
    smoothed = (x * scale).astype(np.float64) @ compensated(weight, scale).T.astype(np.float64)
    assert np.abs(smoothed - y).max() < 1e-6 * np.abs(y).max()  # four roundings to float32


def test_alpha_one_makes_every_input_amax_one_and_half_balances():
  weights, x = loud_layer()
  x_amax, w_amax = np.abs(x).max(axis=0), weight_amax(weights)
  np.testing.assert_allclose(x_amax * smooth_scale(x_amax, w_amax, 1.0), 1, rtol=1e-6)
  half = smooth_scale(x_amax, w_amax, 0.5)
  np.testing.assert_allclose(x_amax * half, weight_amax([compensated(w, half) for w in weights]), rtol=1e-6)
  np.testing.assert_array_equal(w_amax, np.abs(np.concatenate(weights)).max(axis=0))


def explicit_loss(weights, x, scale) -> float:
  """Mean squared output error straight from the verbs."""
  amax = np.asarray(np.max(np.abs(x).max(axis=0) * scale), np.float32)
  xq = core.fake_quantize(x * scale, INPUT, amax).astype(np.float64)
  total = 0.0
  for weight in weights:
    wq = core.fake_quantize(compensated(weight, scale), WEIGHT).astype(np.float64)
    total += np.sum((xq @ wq.T - x.astype(np.float64) @ weight.T) ** 2)
  return total / len(x)


def test_the_search_records_the_true_loss_and_takes_its_least():
  weights, x = loud_layer()
  amax = np.abs(x).max(axis=0)
  found = search_alpha(weights, [(WEIGHT,)] * 2, amax, samples=x, input_specs=(INPUT,))
  assert list(found.losses) == alpha_grid(0.05) and len(found.losses) == 21
  for alpha, loss in found.losses.items():
    # the search multiplies in float32: errors of 1e-7 of the outputs beside quantization errors of 1e-2
    assert loss == pytest.approx(explicit_loss(weights, x, smooth_scale(amax, weight_amax(weights), alpha)), rel=1e-4)
  assert found.error == min(found.losses.values()) == found.losses[found.alpha]
  assert found.error_before == pytest.approx(explicit_loss(weights, x, np.ones(64, np.float32)), rel=1e-4)
  assert 0.3 <= found.alpha <= 0.7  # loud channels: near one half
  assert found.error < 0.2 * found.error_before and found.error < 0.7 * found.losses[1.0]


def test_ties_and_what_is_no_better_than_nothing():
  weights, x = loud_layer(channels=0)
  exact = [np.sign(w) for w in weights]
  found = search_alpha(exact, [()] * 2, np.ones(64, np.float32), samples=x)
  assert found.alpha is None and found.error == 0 and np.all(found.pre_quant_scale == 1)  # all alike: no scale
  table = {1.0: 3.0, 0.5: 2.0, 0.25: 1.0, 0.125: 1.0, 0.0: np.nan}  # by scale = alpha; 1 stands for no scale
  found = search_alpha_grid([0.0, 0.125, 0.25, 0.5], lambda alpha: np.float32([alpha]), lambda scale: table[float(scale[0])], 1)
  assert found.alpha == 0.125 and found.error == 1 and found.error_before == 3 and len(found.losses) == 4


def test_a_hessian_does_where_inputs_are_not_quantized():
  weights, x = loud_layer()
  spec, amax = QuantSpec(formats.INT4, axis=(0,)), np.abs(x).max(axis=0)
  by_hessian = search_alpha(weights, [(spec,)] * 2, amax, hessian=x.T @ x / len(x))
  by_sample = search_alpha(weights, [(spec,)] * 2, amax, samples=x)
  np.testing.assert_allclose(list(by_hessian.losses.values()), list(by_sample.losses.values()), rtol=1e-4)  # float32 products
  assert by_hessian.error <= by_hessian.error_before


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_errors(alpha: float):
  with pytest.raises(ValueError, match="allowed is 0"):
    smooth_scale(np.ones(2), np.ones(2), alpha)
  with pytest.raises(ValueError, match=r"both are \[K\]"):
    smooth_scale(np.ones(2), np.ones(3))
  weights, x = loud_layer()
  with pytest.raises(ValueError, match="needs samples"):
    search_alpha(weights, [(WEIGHT,)] * 2, np.ones(64), hessian=x.T @ x, input_specs=(INPUT,))
  with pytest.raises(ValueError, match="allowed is 0"):
    search_alpha(weights, [(WEIGHT,)] * 2, np.ones(64), samples=x, alphas=[alpha])
  with pytest.raises(ValueError, match="its last axis must be 64 long"):
    search_alpha(weights, [(WEIGHT,)] * 2, np.ones(63), samples=x)
  with pytest.raises(ValueError, match="as many lists as weights"):
    search_alpha(weights, [(WEIGHT,)], np.ones(64), samples=x)
