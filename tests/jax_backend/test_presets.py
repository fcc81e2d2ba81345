"""Every whole preset converts, calibrates and runs; zeros and dead channels give no NaN."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

import jax_backend as jb
from core.config import KV_PRESETS
from tests.jax_backend import nets

WHOLE = [name for name in sorted(jb.choices) if name not in KV_PRESETS]

_ran: set = set()


@functools.partial(jax.jit, static_argnums=0)
def run(qmodule, qvariables, x):
  """One jit for all presets: those that come to the same formats share a compilation."""
  return qmodule.apply(qvariables, x)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """XLA without most of its optimizations: this file asks whether every preset runs, and compiling is all its time. Bits are for
  `test_bits`, which must not find these programs in the caches."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
  jax.clear_caches()


@pytest.fixture(scope="module")
def llama():
  module, tokens = nets.Llama(layers=1), nets.tokens()
  return module, jax.jit(module.init)(jax.random.key(1), tokens), tokens


def dead(variables):
  """The variables with the first output channel of every kernel zero."""

  def kill(path, leaf):
    return leaf.at[..., 0].set(0.0) if path[-1].key == "kernel" else leaf

  return jax.tree_util.tree_map_with_path(kill, variables)


def test_there_are_34_whole_presets():
  assert len(WHOLE) == 34


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("which", ["llama", "cnn"])
def test_preset_runs(which, name, request):
  module, variables, x = request.getfixturevalue(which)
  variables = dead(variables)
  zeros = jnp.zeros_like(x)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", jb.ConfigWarning)  # alternatives for other architectures
    try:
      qmodule, qvariables = jb.quantize(module, variables, jb.preset(name), lambda model: model(x))
    except ValueError as error:
      without_layers = ("MLP", "EXPERTS") if which == "cnn" else ("EXPERTS",)
      assert any(kind in name for kind in without_layers) and "quantizes nothing" in str(error)
      return
    structure = jax.tree.structure(qvariables)
    if (which, structure) in _ran:  # the same formats as a preset before it: the forward passes below are the same programs
      return
    _ran.add((which, structure))
    _, silent = jb.quantize(module, jax.tree.map(jnp.zeros_like, variables), jb.preset(name), lambda model: model(zeros))
  assert any(q.is_enabled for q in jb.quantizers(qvariables).values())
  y = run(qmodule, qvariables, x)
  assert bool(jnp.isfinite(y).all()) and float(jnp.abs(y).max()) > 0
  assert bool(jnp.isfinite(run(qmodule, qvariables, zeros)).all())
  if jax.tree.structure(silent) == structure:
    assert bool(jnp.isfinite(run(qmodule, silent, x)).all())
