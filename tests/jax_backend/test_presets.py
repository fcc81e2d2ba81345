"""Every whole preset converts, calibrates and runs; zeros and dead channels give no NaN."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

import jax_backend as jb
from core.config import KV_PRESETS

WHOLE = [name for name in sorted(jb.choices) if name not in KV_PRESETS]


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
    warnings.simplefilter("ignore", jb.ConfigWarning)  # algorithms that are not there yet, alternatives for other architectures
    try:
      qmodule, qvariables = jb.quantize(module, variables, jb.preset(name), lambda model: model(x))
    except ValueError as error:
      only_other_models = which == "cnn" and ("MLP" in name or "EXPERTS" in name) or name == "NVFP4_EXPERTS_ONLY_CFG"
      assert only_other_models and "quantizes nothing" in str(error)
      return
    _, silent = jb.quantize(module, jax.tree.map(jnp.zeros_like, variables), jb.preset(name), lambda model: model(zeros))
  run = jax.jit(qmodule.apply)
  assert any(q.is_enabled for q in jb.quantizers(qvariables).values())
  y = run(qvariables, x)
  assert bool(jnp.isfinite(y).all()) and float(jnp.abs(y).max()) > 0
  assert bool(jnp.isfinite(run(qvariables, zeros)).all())
  if jax.tree.structure(silent) == jax.tree.structure(qvariables):
    assert bool(jnp.isfinite(run(silent, x)).all())
