"""auto_quantize in JAX: what is refused and how, resuming, scanned stacks, and the user's functions."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_backend
from jax_backend import auto_quantize, search_scores
from tests.jax_backend import nets
from tests.search.test_scores_jax import Stack

FORMATS = {
  "int4": {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 8}}, "default": {"enable": False}}, "algorithm": "max"},
  "int8": {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "default": {"enable": False}}, "algorithm": "max"},
}
BUDGET = {"effective_bits": 9.5}  # of 8, and of 8 with a float32 scale per row of 16 or 24


def loss_func(output: Any, batch: Any) -> Any:
  return jnp.mean(jnp.square(output - 1.0))


@pytest.fixture(scope="module")
def net():
  """(module, variables, three batches)."""
  module = nets.MLP(hidden=16, out=6)
  data = [np.asarray(jax.random.normal(jax.random.key(i), (4, 24))) for i in range(3)]
  return module, jax.jit(module.init)(jax.random.key(9), data[0]), data


def search(net: Any, constraints: Any = None, formats: Any = None, **options: Any) -> Any:
  module, variables, data = net
  given = {"data_loader": data, "loss_func": loss_func, **options}
  return auto_quantize(module, variables, BUDGET if constraints is None else constraints, FORMATS if formats is None else formats, **given)


def test_an_unreachable_budget_is_named_before_calibration(net):
  def forward_step(model: Any, batch: Any) -> Any:
    assert type(model).__name__ == "Shapes", "calibration has begun"
    return model(batch)

  with pytest.raises(ValueError, match=r"effective_bits of 2 cannot be reached: the least possible is 8"):
    search(net, {"effective_bits": 2}, forward_step=forward_step)
  nothing = {"quant_cfg": {"*conv*weight_quantizer": {"num_bits": 4}, "default": {"enable": False}}}
  with pytest.raises(ValueError, match="format 'nothing' quantizes nothing"):
    search(net, formats={**FORMATS, "nothing": nothing}, forward_step=forward_step)


def test_losses_that_say_nothing_are_named(net):
  with pytest.raises(ValueError, match="the loss of scoring batch 0 does not depend on the parameters of any layer"):
    search(net, loss_func=lambda output, batch: jnp.mean(batch))
  with pytest.raises(ValueError, match="the loss of scoring batch 0 is nan"):
    search(net, loss_func=lambda output, batch: jnp.mean(output) * jnp.nan)
  # The square root's slope at 0 is infinite, though its value is 0.
  with pytest.raises(ValueError, match=r"output of 'down' holds \d+ NaN or infinite of 24 values in scoring batch 0"):
    search(net, loss_func=lambda output, batch: jnp.sum(jnp.sqrt(output * 0.0)))
  with pytest.raises(ValueError, match=r"loss_func must return a scalar floating point loss of jax.numpy.*got shape \(4, 6\)"):
    search(net, loss_func=lambda output, batch: output)


def test_missing_functions_and_loaders_are_named(net):
  module, variables, data = net
  with pytest.raises(ValueError, match="method 'gradient' needs loss_func or forward_backward_step"):
    search(net, loss_func=None)
  with pytest.raises(TypeError, match="data_loader can be gone through only once"):
    search(net, data_loader=iter(data))
  with pytest.raises(ValueError, match="did not call the model"):
    search(net, forward_step=lambda model, batch: batch)
  with pytest.raises(TypeError, match="forward_step must be a function, got str"):
    search(net, forward_step="model")
  with pytest.raises(TypeError, match=r"flax.linen.Module, got dict"):
    auto_quantize(variables, module, BUDGET)


class Killed(Exception):
  pass


def test_a_killed_search_goes_on(net, tmp_path, monkeypatch):
  """The third batch is never reached in the first run; the second run scores it alone."""
  file = tmp_path / "scores.json"
  _, whole = search(net)
  scored: list[int] = []
  original = search_scores.gradients

  def gradients(module: Any, variables: Any, step: Any, number: int, *rest: Any) -> Any:
    scored.append(number)
    if scored == [0, 1, 2]:
      raise Killed
    return original(module, variables, step, number, *rest)

  monkeypatch.setattr(search_scores, "gradients", gradients)
  with pytest.raises(Killed):
    search(net, checkpoint=file)
  _, resumed = search(net, checkpoint=file)
  assert scored == [0, 1, 2, 2]
  assert json.loads(json.dumps(resumed)) == json.loads(json.dumps(whole))
  module, variables, data = net
  other = jax.tree.map(lambda x: x + 1, variables)
  with pytest.raises(ValueError, match="holds the scores of another model"):
    search((module, other, data), checkpoint=file)
  with pytest.raises(ValueError, match="another formats"):
    search(net, formats={**FORMATS, "int8": FORMATS["int4"]}, checkpoint=file)


def test_functions_may_look_at_values_and_return_the_loss_themselves(net):
  """What is compiled is the model's call; the rest runs as it is written. Nothing that was given is changed."""
  module, variables, data = net
  before = jax.tree.map(np.array, variables)

  def forward_step(model: Any, batch: Any) -> Any:
    rows = int(np.asarray(batch).shape[0]) if float(batch.sum()) < 1e9 else 0
    return model.apply(variables, jnp.asarray(batch)[:rows])

  def step(model: Any, batch: Any) -> Any:
    return loss_func(forward_step(model, batch), batch)

  (qmodule, qvariables), state = search(net, forward_step=forward_step, forward_backward_step=step, loss_func=None)
  _, plain = search(net)
  assert state["layer_scores"] == plain["layer_scores"]
  assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))
  again = jax_backend.quantize(module, variables, jax_backend.get_auto_quantize_config(state), lambda model: model(data[0]))
  assert np.array_equal(qmodule.apply(qvariables, data[0]), again[0].apply(again[1], data[0]))


def test_a_scanned_stack_is_one_layer_with_one_format():
  module, x = Stack(axis=0), np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 16)))
  variables = jax.jit(module.init)(jax.random.key(1), x)
  formats = {**FORMATS, "awq": {**FORMATS["int4"], "algorithm": "awq_lite"}}
  spaces = {"layers.down": ["awq"], "layers.up": ["int4", "int8"]}
  (qmodule, qvariables), state = auto_quantize(
    module, variables, {"effective_bits": 9}, formats, [x], loss_func=loss_func, module_search_spaces=spaces
  )
  assert list(state["layers"]) == ["layers.up", "layers.down"] and state["layers"]["layers.up"]["copies"] == 2
  assert state["weights"] == {"layers.down": 2 * 16 * 24, "layers.up": 2 * 16 * 24}
  assert state["assignment"] == {"layers.down": "awq", "layers.up": "int4"} and state["scores"]["layers.up"]["int8"] > 0
  config = jax_backend.get_auto_quantize_config(state)
  assert config["algorithm"] == ["max", {"method": "awq_lite", "include": ["layers.down"]}]
  scales = qvariables["quant"]["layers"]["down"]["input_quantizer"].pre_quant_scale
  assert scales.shape == (2, 24) and not np.array_equal(scales[0], scales[1])
  again = jax_backend.quantize(module, variables, config, lambda model: model(x))
  assert np.array_equal(qmodule.apply(qvariables, x), again[0].apply(again[1], x))
