"""What is refused, and with which words; variables that can be donated."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jax_backend as jb


class Siblings(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(16, name="q_proj")(x) + nn.Dense(16, name="k_proj")(x)


@pytest.fixture(scope="module")
def model():
  x = jax.random.normal(jax.random.key(0), (4, 32))
  return Siblings(), Siblings().init(jax.random.key(1), x), x


@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_variables_can_be_donated(config, model):
  module, variables, x = model
  qmodule, qvariables = jb.quantize(module, variables, config, lambda m: m(x))
  expected = qmodule.apply(qvariables, x)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(qvariables):
    return qvariables, qmodule.apply(qvariables, x)

  _, y = step({**qvariables, "params": jax.tree.map(jnp.copy, qvariables["params"])})  # siblings share a value, not a buffer
  assert jnp.allclose(y, expected)


@pytest.mark.parametrize(
  "attributes, words",
  [
    ({"num_bits": 8, "backend": "mine"}, r"q_proj\.weight_quantizer.*'mine'"),
    ({"num_bits": 8, "fake_quant": False}, r"q_proj\.weight_quantizer.*fake_quant=False"),
    ({"num_bits": 8, "axis": 5}, r"q_proj\.weight_quantizer.*axis 5 does not exist in a tensor of 2 axes.*-2 to 1"),
  ],
)
def test_what_cannot_be_done_names_the_quantizer(attributes, words, model):
  module, variables, x = model
  with pytest.raises(ValueError, match=words):
    jb.quantize(module, variables, {"quant_cfg": {"*weight_quantizer": attributes}, "algorithm": "max"}, lambda m: m(x))


def test_rules_of_groups_are_a_list(model):
  module, variables, x = model
  with pytest.raises(ValueError, match=r"'q_proj\|k_proj'; give a list"):
    jb.quantize(module, variables, "FP8_DEFAULT_CFG", lambda m: m(x), group_rules="q_proj|k_proj")


def test_plain_variables_have_nothing_to_fold(model):
  module, variables, _ = model
  assert not jb.is_quantized(variables)
  with pytest.raises(ValueError, match="no quantizers"):
    jb.fold_weight(jb.QuantModule(module), variables)


@pytest.mark.parametrize("amax", [-1.0, float("nan"), float("inf")])
def test_amax_is_finite_and_not_negative(amax):
  with pytest.raises(ValueError, match="finite and not negative"):
    jb.Quantizer({"num_bits": (4, 3)}).with_amax(amax)
  if amax != -1.0:  # a negative amax is the negative scale of a signed integer
    with pytest.raises(ValueError, match="finite; got"):
      jb.Quantizer({"num_bits": 8}).with_amax(amax)


def test_a_quantizer_reads_attributes():
  quantizer = jb.Quantizer({"num_bits": 8, "constant_amax": 2.0, "enable": False})
  assert quantizer.config.spec.element.bits == 8 and float(quantizer.amax) == 2.0 and not quantizer.is_enabled
  assert float(quantizer.enable()(jnp.asarray([4.0]))[0]) == 2.0
