"""Fixtures: models are initialised once per session."""

from __future__ import annotations

import jax
import pytest

from tests.jax_backend import nets


@pytest.fixture(scope="session")
def mlp():
  """(module, variables, inputs [8, 16])."""
  module = nets.MLP()
  x = jax.random.normal(jax.random.key(0), (8, 16))
  return module, module.init(jax.random.key(1), x), x


@pytest.fixture(scope="session")
def llama():
  """(module, variables, tokens [2, 8])."""
  module = nets.Llama()
  tokens = nets.tokens()
  return module, jax.jit(module.init)(jax.random.key(1), tokens), tokens


@pytest.fixture(scope="session")
def cnn():
  """(module, variables, images [2, 8, 8, 3])."""
  module = nets.CNN()
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  return module, jax.jit(module.init)(jax.random.key(1), x), x
