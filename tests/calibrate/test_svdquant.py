"""The low-rank part: Eckart-Young in the plain metric and in the outputs', against numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest

from core.calibrate.svdquant import low_rank

SHAPES = [(48, 96), (96, 48), (64, 64)]


def layer(shape: tuple[int, int], seed: int = 0, dead: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """A weight with a decaying spectrum and the Hessian of correlated inputs, `dead` of which are always zero."""
  rng = np.random.default_rng(seed)
  n, k = shape
  weight = rng.normal(size=(n, k)) * np.exp(rng.normal(size=k)) + np.outer(rng.normal(size=n), rng.normal(size=k)) * 5
  x = rng.normal(size=(300, k)) @ rng.normal(size=(k, k)) * np.exp(rng.normal(size=k))
  x[:, :dead] = 0
  return weight.astype(np.float32), x.T @ x / len(x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 47])
def test_residual_energy_is_what_the_other_singular_values_hold(shape: tuple[int, int], rank: int):
  weight, _ = layer(shape)
  residual, a, b = low_rank(weight, rank)
  assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank) and {v.dtype for v in (residual, a, b)} == {np.dtype(np.float32)}
  values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
  # float32 rounding of a, b and residual: 6e-8 of the largest value
  assert np.sum(residual.astype(np.float64) ** 2) == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-5, abs=1e-12 * values[0] ** 2)
  np.testing.assert_allclose(np.linalg.norm(b, axis=0), values[:rank], rtol=1e-6)
  np.testing.assert_allclose(a @ a.T, np.eye(rank), atol=2e-6)
  whole = residual.astype(np.float64) + b.astype(np.float64) @ a.astype(np.float64)
  assert np.abs(whole - weight).max() <= 2**-24 * np.abs(residual).max()  # one rounding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead", [0, 5])
def test_weighted_residual_energy_is_what_the_outputs_leave(shape: tuple[int, int], dead: int):
  weight, hessian = layer(shape, dead=dead)
  values, vectors = np.linalg.eigh(hessian)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  left = np.linalg.svd(weight.astype(np.float64) @ root, compute_uv=False)
  energy = {}
  for weighted in (False, True):
    residual, a, b = low_rank(weight, 8, hessian, weighted=weighted)
    d = residual.astype(np.float64)
    energy[weighted] = np.sum((d @ hessian) * d)
    whole = d + b.astype(np.float64) @ a.astype(np.float64)
    assert np.abs(whole - weight).max() <= 2**-24 * np.abs(d).max()
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-6)
  assert energy[True] == pytest.approx(np.sum(left[8:] ** 2), rel=1e-5)  # float32 rounding, as above
  assert energy[True] < 0.95 * energy[False]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_beyond_the_shape_leaves_nothing(shape: tuple[int, int]):
  weight, hessian = layer(shape)
  for weighted in (False, True):
    residual, a, _ = low_rank(weight, 500, hessian, weighted=weighted)
    assert len(a) == min(shape) and np.abs(residual).max() < 1e-6 * np.abs(weight).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_less_rank(shape: tuple[int, int]):
  rng = np.random.default_rng(1)
  weight = (rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))).astype(np.float32)
  residual, _, _ = low_rank(weight, 8)
  assert np.abs(residual).max() < 1e-6 * np.abs(weight).max()
  residual, a, b = low_rank(np.zeros(shape, np.float32), 4)
  assert not residual.any() and not b.any() and np.isfinite(a).all()


def test_errors():
  weight, hessian = layer((8, 12))
  with pytest.raises(ValueError, match="rank of at least 1"):
    low_rank(weight, 0)
  with pytest.raises(ValueError, match=r"needs a Hessian of shape \[12, 12\]; got None"):
    low_rank(weight, 2, weighted=True)
  with pytest.raises(ValueError, match=r"got \[8, 8\]"):
    low_rank(weight, 2, hessian[:8, :8], weighted=True)
