"""Hadamard rotation: a spike becomes flat, in every framework with the same bits; a layer with both sides rotated computes the same."""

from __future__ import annotations

import numpy as np
import pytest

from core import hadamard


def arrays(x: np.ndarray):
  import jax.numpy as jnp
  import torch

  return {"numpy": x, "torch": torch.from_numpy(x), "jax": jnp.asarray(x)}


@pytest.mark.parametrize("size", [16, 64, 576])
@pytest.mark.parametrize("seed", [None, 3])
def test_crest_factor_of_a_spike_is_one(size, seed):
  x = np.zeros((4, size), np.float32)
  x[np.arange(4), [0, 1, size // 2, size - 1]] = 7.0
  block = hadamard.block_size(size)
  turned = {name: np.asarray(hadamard.rotate(a, seed=seed)) for name, a in arrays(x).items()}
  for name, y in turned.items():
    blocks = y.reshape(4, -1, block)
    hit = np.abs(blocks).max(axis=-1) > 0
    assert hit.sum() == 4, name  # one block of each row
    flat = np.abs(blocks[hit])
    np.testing.assert_array_equal(flat, np.broadcast_to(flat[:, :1], flat.shape))  # largest over root mean square: exactly 1
    np.testing.assert_array_equal(y, turned["numpy"])
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), 7.0, rtol=1e-6)


def test_a_layer_rotated_on_both_sides_computes_the_same():
  """Orthonormal: (x R)(W R)^T = x W^T up to float32 rounding of the butterflies, 1e-6 of the largest output."""
  rng = np.random.default_rng(0)
  x, weight = rng.normal(size=(32, 192)).astype(np.float32), rng.normal(size=(48, 192)).astype(np.float32)
  plain = x.astype(np.float64) @ weight.T.astype(np.float64)
  turned = hadamard.rotate(x, seed=1).astype(np.float64) @ hadamard.rotate(weight, seed=1).T.astype(np.float64)
  np.testing.assert_allclose(turned, plain, atol=1e-6 * np.abs(plain).max())
  np.testing.assert_allclose(hadamard.unrotate(hadamard.rotate(x, seed=1), seed=1), x, atol=1e-6)
