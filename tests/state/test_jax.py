"""Saving and restoring Flax models: stacks, layouts, other collections, types, refusals, and the checkpoints of training."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_backend as jb
import torch_backend as tb
from core.config import normalize
from jax_backend.state import state_of
from tests.jax_backend import nets as flax_nets
from tests.state import nets
from torch_backend.state import state_of as torch_state

OFF = {"default": {"enable": False}}
INT8 = {"quant_cfg": {**OFF, "*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}
NVFP4 = {**tb.preset("NVFP4_DEFAULT_CFG"), "algorithm": "max"}


def quantized(module, variables, config, x):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", jb.ConfigWarning)
    return jb.quantize(module, variables, config, lambda m: m(x))


@pytest.mark.parametrize("stack", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_scanned_stack_is_saved_layer_by_layer_under_torch_names(stack, tmp_path):
  net = nets.quantized_torch(NVFP4, layers=2)
  tb.save(net, tmp_path / "torch")
  module = nets.FlaxNet(2, stack)
  qmodule, qvariables = jb.restore(module, nets.flax_variables(module), tmp_path / "torch")
  jb.save(qmodule, qvariables, tmp_path / "scanned")
  unrolled = jb.restore(nets.FlaxNet(2), nets.flax_variables(nets.FlaxNet(2)), tmp_path / "scanned")
  back = tb.restore(nets.torch_net(5, 2), tmp_path / "scanned")
  for state in (state_of(qmodule, qvariables), state_of(*unrolled), torch_state(back)):
    nets.assert_same_state(torch_state(net), state)
  # The stack computes what the unrolled model does, up to the order of XLA's fused sums.
  assert np.abs(nets.jax_output(qmodule, qvariables) - nets.jax_output(*unrolled)).max() < 1e-5


@pytest.mark.slow  # calibration compiles the whole model
def test_a_scanned_model_calibrated_as_such_computes_the_same_when_restored(tmp_path):
  module = nets.FlaxNet(2, 0)
  config = {**tb.preset("INT4_AWQ_CFG"), "algorithm": {"method": "svdquant", "lowrank": 2}}
  qmodule, qvariables = nets.quantized_jax(config, module)
  jb.save(qmodule, qvariables, tmp_path)
  restored = jb.restore(module, nets.flax_variables(module, 7), tmp_path)
  assert np.array_equal(nets.jax_output(*restored), nets.jax_output(qmodule, qvariables))
  assert jax.tree.structure(restored[1]["quant"]) == jax.tree.structure(qvariables["quant"])  # no compiled function is compiled anew


def test_layers_of_a_stack_cannot_differ(tmp_path):
  net = nets.quantized_torch(INT8, layers=2)
  tb.disable_quantizer(net, "layers.1.mlp.up_proj.weight_quantizer")
  tb.save(net, tmp_path)
  module = nets.FlaxNet(2, 0)
  with pytest.raises(ValueError, match=r"'layers.0.mlp.up_proj.weight_quantizer' and 'layers.1.mlp.up_proj.weight_quantizer'.*unroll"):
    jb.restore(module, nets.flax_variables(module), tmp_path)
  jb.restore(nets.FlaxNet(2), nets.flax_variables(nets.FlaxNet(2)), tmp_path)


class Heads(nn.Module):
  """Kernels [in, heads, d] and [heads, d, out], whose biases have two axes and one."""

  @nn.compact
  def __call__(self, x):
    x = nn.DenseGeneral((2, 16), name="split")(x)
    return nn.DenseGeneral(8, axis=(-2, -1), name="join")(x)


@pytest.mark.slow  # calibration compiles the whole model
def test_kernels_and_biases_of_several_axes_are_saved_as_torch_would_hold_them(tmp_path):
  x = jnp.asarray(nets.data())
  variables = Heads().init(jax.random.key(0), x)
  variables = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape), variables)
  qmodule, qvariables = quantized(Heads(), variables, NVFP4, x)
  shapes = {name: tensor.shape for name, tensor in state_of(qmodule, qvariables).tensors.items()}
  assert shapes == {"split.weight": (32, 32), "split.bias": (32,), "join.weight": (8, 32), "join.bias": (8,)}
  jb.save(qmodule, qvariables, tmp_path)
  restored = jb.restore(Heads(), Heads().init(jax.random.key(2), x), tmp_path, example_inputs=x)
  assert jnp.array_equal(restored[0].apply(restored[1], x), qmodule.apply(qvariables, x))


@pytest.mark.slow  # calibration compiles the whole model
def test_convolutions_and_batch_statistics(tmp_path):
  module, x = flax_nets.CNN(), jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  variables = module.init(jax.random.key(0), x)
  _, updates = module.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
  qmodule, qvariables = quantized(module, {**variables, **updates}, INT8, x)
  jb.save(qmodule, qvariables, tmp_path)
  assert "BatchNorm.0.running_mean" in state_of(qmodule, qvariables).tensors
  restored = jb.restore(module, module.init(jax.random.key(3), x), tmp_path, example_inputs=x)
  assert jnp.array_equal(restored[0].apply(restored[1], x), qmodule.apply(qvariables, x))


@pytest.mark.slow  # calibration compiles the whole model
def test_an_embedding_of_indices_and_a_norm_of_the_models_own_in_a_stack(tmp_path):
  module = flax_nets.Llama(3, 0)
  tokens = flax_nets.tokens()
  qmodule, qvariables = quantized(module, {"params": module.init(jax.random.key(0), tokens)["params"]}, NVFP4, tokens)
  names = state_of(qmodule, qvariables).tensors
  assert names["model.layers.2.input_layernorm.weight"].shape == (32,) and names["model.norm.weight"].shape == (32,)
  jb.save(qmodule, qvariables, tmp_path)
  abstract = jax.eval_shape(module.init, jax.random.key(0), tokens)  # no values are needed to restore into
  restored = jb.restore(module, abstract, tmp_path)
  assert jnp.array_equal(restored[0].apply(restored[1], tokens), qmodule.apply(qvariables, tokens))
  unrolled = flax_nets.Llama(3)
  again = jb.restore(unrolled, jax.eval_shape(unrolled.init, jax.random.key(0), tokens), tmp_path)
  nets.assert_same_state(state_of(*again), state_of(*restored))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_are_kept_across_frameworks(dtype, tmp_path):
  import torch

  net = nets.quantized_torch(NVFP4, dtype=getattr(torch, dtype))
  tb.save(net, tmp_path)
  module = nets.FlaxNet(dtype=jnp.dtype(dtype))
  restored = jb.restore(module, nets.flax_variables(module), tmp_path)
  nets.assert_same_state(torch_state(net), state_of(*restored))
  with pytest.raises(ValueError, match=r"13 tensors of another type.*adopt_dtype=True"):
    jb.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path)
  adopted = jb.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path, adopt_dtype=True)
  assert adopted[1]["params"]["head"]["kernel"].dtype == dtype


def test_float8_parameters(tmp_path):
  module = nets.FlaxNet()
  qmodule, qvariables = nets.quantized_jax(INT8)
  codes = jnp.asarray(np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn))
  held = {**qvariables, "extra": {"codes": codes, "scale": codes.astype(jnp.float32).astype(jnp.float8_e5m2), "n": jnp.int8(-3)}}
  jb.save(qmodule, held, tmp_path)
  blank = {**nets.flax_variables(), "extra": jax.tree.map(jnp.zeros_like, held["extra"])}
  _, restored = jb.restore(module, blank, tmp_path)
  for name, value in held["extra"].items():
    assert restored["extra"][name].dtype == value.dtype and np.asarray(restored["extra"][name]).tobytes() == np.asarray(value).tobytes()


@pytest.mark.slow
def test_switches_and_a_quantized_model_to_restore_into(tmp_path):
  qmodule, qvariables = nets.quantized_jax(NVFP4)
  folded = jb.fold_weight(qmodule, jb.disable_quantizer(qvariables, "*q_proj*"))
  jb.save(qmodule, folded, tmp_path)
  other = nets.quantized_jax(INT8, seed=5)
  restored = jb.restore(*other, tmp_path)
  assert np.array_equal(nets.jax_output(*restored), nets.jax_output(qmodule, folded))
  nets.assert_same_state(state_of(qmodule, folded), state_of(*restored))
  assert normalize(restored[0].config) == normalize(NVFP4)
  net = tb.restore(nets.torch_net(), tmp_path)
  nets.assert_same_state(state_of(qmodule, folded), torch_state(net))


def test_what_is_given_is_not_changed_and_refusals_name_what_is_wrong(tmp_path):
  qmodule, qvariables = nets.quantized_jax(INT8)
  jb.save(qmodule, qvariables, tmp_path)
  variables = nets.flax_variables(seed=4)
  copy = jax.tree.map(np.array, variables)
  jb.restore(nets.FlaxNet(), variables, tmp_path)
  assert jax.tree.all(jax.tree.map(np.array_equal, variables, copy))
  with pytest.raises(ValueError, match=r"lacks 11 of the model's tensors: layers.1.*"):
    jb.restore(nets.FlaxNet(2), nets.flax_variables(nets.FlaxNet(2)), tmp_path)
  with pytest.raises(ValueError, match="have no quantizers; call quantize"):
    jb.save(qmodule, variables, tmp_path)
  with pytest.raises(TypeError, match=r"flax.linen.Module, got dict"):
    jb.restore({}, variables, tmp_path)  # type: ignore[arg-type]


def test_names_that_would_be_one_in_torch(tmp_path):
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(32, name="a_0")(x)
      return nn.Dense(32, name="a.0")(x)

  x = jnp.asarray(nets.data())
  qmodule, qvariables = quantized(Twice(), Twice().init(jax.random.key(0), x), INT8, x)
  with pytest.raises(ValueError, match=r"are both called 'a.0.\w+' in torch; rename one"):
    jb.save(qmodule, qvariables, tmp_path)


# -- checkpoints of training ---------------------------------------------------------------------------------------------------------


def test_flax_serialization(tmp_path):
  from flax import serialization

  qmodule, qvariables = nets.quantized_jax(NVFP4)
  data = serialization.to_bytes(qvariables)
  jb.save(qmodule, qvariables, tmp_path)  # formats and switches; later values come from the checkpoint
  other, target = jb.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path)
  target = jax.tree.map(jnp.zeros_like, target)
  held = serialization.from_bytes(target, data)
  assert np.array_equal(nets.jax_output(other, held), nets.jax_output(qmodule, qvariables))


def test_orbax(tmp_path):
  import orbax.checkpoint as ocp

  qmodule, qvariables = nets.quantized_jax({**tb.preset("W4A8_AWQ_BETA_CFG"), "algorithm": "max"})
  jb.save(qmodule, qvariables, tmp_path / "formats")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "step", qvariables)
    checkpointer.wait_until_finished()
    other, target = jb.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path / "formats")
    held = checkpointer.restore(tmp_path / "step", jax.tree.map(jnp.zeros_like, target))
  assert jax.tree.structure(held) == jax.tree.structure(qvariables)
  assert np.array_equal(nets.jax_output(other, held), nets.jax_output(qmodule, qvariables))
