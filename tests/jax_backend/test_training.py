"""Training through the straight-through estimator, with the user's own loop."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jax_backend as jb

W2A8 = {
  "quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 2, "axis": 0}, "*input_quantizer": {"num_bits": 8}},
  "algorithm": "max",
}


class Digits(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(64)(x))
    x = nn.relu(nn.Dense(32)(x))
    return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def digits():
  data = load_digits()
  x, y = (data.data / 16.0 - 0.3).astype(np.float32), data.target
  order = np.random.default_rng(0).permutation(len(x))
  x, y = jnp.asarray(x[order]), jnp.asarray(y[order])
  return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def train(apply, params, data, steps, rate):
  """Adam on minibatches of 128, one jitted scan."""
  x, y = data
  optimizer = optax.adam(rate)

  def loss(params, index):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x[index]), y[index]).mean()

  def step(carry, key):
    params, state = carry
    grads = jax.grad(loss)(params, jax.random.randint(key, (128,), 0, len(x)))
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  keys = jax.random.split(jax.random.key(7), steps)
  (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys))(params)
  return params


def accuracy(apply, params, data):
  return float((jnp.argmax(apply(params, data[0]), -1) == data[1]).mean())


def test_qat_recovers_most_of_what_ptq_lost(digits):
  training, held_out = digits
  module = Digits()
  start = module.init(jax.random.key(0), training[0][:1])["params"]
  plain = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
  params = train(plain, start, training, 400, 2e-3)
  float_accuracy = accuracy(plain, params, held_out)
  qmodule, qvariables = jb.quantize(module, {"params": params}, W2A8, lambda model: model(training[0][:256]))
  quantized = lambda params, x: qmodule.apply({**qvariables, "params": params}, x)  # noqa: E731
  ptq = accuracy(quantized, params, held_out)
  tuned = train(quantized, params, training, 400, 1e-3)
  qat = accuracy(quantized, tuned, held_out)
  assert float_accuracy > 0.93
  assert ptq < float_accuracy - 0.1, "2-bit weights must cost something, or the test shows nothing"
  assert (qat - ptq) / (float_accuracy - ptq) > 0.7, (float_accuracy, ptq, qat)
  folded = jb.fold_weight(qmodule, {**qvariables, "params": tuned})
  for layer in folded["params"].values():
    assert max(len(np.unique(column)) for column in np.asarray(layer["kernel"]).T) <= 4  # 2 bits


def test_optimizer_sees_the_users_tree_only(digits):
  (x, _), _ = digits
  module = Digits()
  variables = module.init(jax.random.key(0), x[:1])
  qmodule, qvariables = jb.quantize(module, variables, W2A8, lambda model: model(x[:16]))
  state = optax.adam(1e-3).init(qvariables["params"])
  assert jax.tree.structure(state[0].mu) == jax.tree.structure(variables["params"])
  grads = jax.eval_shape(jax.grad(lambda p: qmodule.apply({**qvariables, "params": p}, x[:16]).std()), qvariables["params"])
  assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
