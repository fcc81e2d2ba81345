"""Equalization between two layers, and bias correction: closed forms."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import QuantSpec, formats
from core.calibrate.bias_correction import corrected_bias, output_shift
from core.calibrate.equalize import equalize, equalizing_scale


def layers(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  w1 = rng.normal(size=(24, 16)) * np.exp(2 * rng.normal(size=(24, 1)))
  w2 = rng.normal(size=(10, 24)) * np.exp(2 * rng.normal(size=24))
  return tuple(a.astype(np.float32) for a in (w1, rng.normal(size=24), w2, rng.normal(size=(100, 16))))


def forward(x: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, slope: float) -> np.ndarray:
  hidden = x.astype(np.float64) @ w1.T + b1
  return np.where(hidden > 0, hidden, slope * hidden) @ w2.T.astype(np.float64)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_the_function_stays_and_the_ranges_meet(slope: float):
  w1, b1, w2, x = layers()
  found = equalize(w1, b1, w2)
  y, z = forward(x, w1, b1, w2, slope), forward(x, found.w1, found.b1, found.w2, slope)
  assert np.abs(z - y).max() < 1e-6 * np.abs(y).max()  # float32 rounding of the weights
  first, second = np.abs(found.w1).max(axis=1), np.abs(found.w2).max(axis=0)
  np.testing.assert_allclose(first, second, rtol=1e-6)
  np.testing.assert_allclose(first, np.sqrt(np.abs(w1).max(axis=1) * np.abs(w2).max(axis=0)), rtol=1e-6)
  np.testing.assert_allclose(equalize(found.w1, found.b1, found.w2).scale, 1, rtol=1e-6)  # nothing is left to do


def test_dead_channels_are_left_alone():
  w1, b1, w2, _ = layers()
  w1[3], w2[:, 5] = 0, 0
  found = equalize(w1, b1, w2)
  assert list(found.scale[[3, 5]]) == [1, 1]
  np.testing.assert_array_equal(found.w1[[3, 5]], w1[[3, 5]])
  assert np.isfinite(found.w1).all() and np.isfinite(found.w2).all()
  assert equalize(w1, None, w2).b1 is None


def test_equal_ranges_make_per_tensor_int8_better():
  w1, b1, w2, x = layers()
  found = equalize(w1, b1, w2)
  spec, y = QuantSpec(formats.INT8), forward(x, w1, b1, w2, 0.0)
  errors = [
    np.sum((forward(x, core.fake_quantize(a, spec), bias, core.fake_quantize(b, spec), 0.0) - y) ** 2)
    for a, bias, b in ((w1, b1, w2), found[1:])
  ]
  assert errors[1] < 0.3 * errors[0]


def test_convolutions_equalize_by_channel():
  rng = np.random.default_rng(0)
  w1, w2 = rng.normal(size=(6, 4, 3, 3)).astype(np.float32), 20 * rng.normal(size=(5, 6, 1, 1)).astype(np.float32)
  found = equalize(w1, None, w2)
  np.testing.assert_allclose(np.abs(found.w1).max(axis=(1, 2, 3)), np.abs(found.w2).max(axis=(0, 2, 3)), rtol=1e-6)


def test_bias_correction_restores_the_mean_output():
  rng = np.random.default_rng(0)
  weight, x = rng.normal(size=(20, 32)).astype(np.float32), (rng.normal(size=(500, 32)) + rng.normal(size=32)).astype(np.float64)
  bias = rng.normal(size=20).astype(np.float32)
  wq = core.fake_quantize(weight, QuantSpec(formats.int_format(3), axis=(0,)))
  xq = np.maximum(np.round(x * 4) / 4, -1.0)  # clipping on one side: a mean of its own
  mean = x @ weight.T.astype(np.float64)
  mean = mean.mean(axis=0) + bias
  for inputs, quantized_mean in ((x, None), (xq, xq.mean(axis=0))):
    q = (inputs @ wq.T.astype(np.float64)).mean(axis=0)
    fixed = q + corrected_bias(bias, weight, wq, x.mean(axis=0), quantized_mean)
    assert np.abs(q + bias - mean).max() > 1e-2
    assert np.abs(fixed - mean).max() < 1e-6 * np.abs(mean).max()  # the bias is float32
    np.testing.assert_allclose(output_shift(weight, wq, x.mean(axis=0), quantized_mean), q + bias - mean, atol=1e-12)
  np.testing.assert_array_equal(corrected_bias(None, weight, weight, x.mean(axis=0)), np.zeros(20))


def test_errors():
  w1, b1, w2, _ = layers()
  with pytest.raises(ValueError, match="are not consecutive"):
    equalizing_scale(w1, w2[:, :-1])
  with pytest.raises(ValueError, match=r"need \[24\]"):
    equalize(w1, b1[:-1], w2)
  with pytest.raises(ValueError, match="do not fit"):
    output_shift(w1, w1, np.ones(3))
  with pytest.raises(ValueError, match="do not fit"):
    output_shift(w1, w2, np.ones(16))
