"""One layer in both backends: weights, amax and quantizer outputs are the same bits, whatever stands around the rounding."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_backend as jb
import torch_backend as tb

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
ATTRIBUTES = {
  "int8_blocks_static": {"num_bits": 8, "block_sizes": {-1: 16}},
  "int8_range_per_channel": {"num_bits": 8, "axis": -1, "zero_point": True},
  "nvfp4": NVFP4,
  "nvfp4_static": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}},
  "bias_mean": {"num_bits": 8, "bias": {-1: None, "type": "static"}},
  "bias_range": {"num_bits": 8, "bias": {-2: None, "type": "static", "method": "max_min"}},
  "bias_dynamic": {"num_bits": (4, 3), "bias": {-1: None, "type": "dynamic"}},
  "nvfp4_bias": {**NVFP4, "bias": {-2: None, "type": "static"}},
  "rotate": {"num_bits": 4, "rotate": True},
  "rotate_back": {"num_bits": 4, "rotate": {"enable": True, "mode": "rotate_back", "seed": 5}},
  "rotate_blocks": {"num_bits": 4, "rotate": {"enable": True, "block_size": 4}, "block_sizes": {-1: 16}},
  "sequence": [{"num_bits": 8}, {"num_bits": (4, 3)}],
  "sequence_after_constant": [{"num_bits": 8, "constant_amax": 1.0}, {"num_bits": (4, 3)}],
}
RNG = np.random.default_rng(1)
WEIGHT = RNG.standard_normal((24, 40)).astype(np.float32)
BATCHES = [RNG.standard_normal((3, 5, 40)).astype(np.float32) * scale for scale in (1.0, 2.0)]


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(24, use_bias=False, name="layer")(x)


def both(pattern, attributes, dtype):
  """The quantizer of the pattern's role in torch and in JAX, and the two models."""
  config = {"quant_cfg": {pattern: attributes}, "algorithm": "max"}
  layer = torch.nn.Linear(40, 24, bias=False)
  layer.weight.data = torch.tensor(WEIGHT)
  model = torch.nn.ModuleDict({"layer": layer}).to(getattr(torch, dtype))
  tb.quantize(model, config, lambda _: [model["layer"](torch.tensor(x).to(layer.weight.dtype)) for x in BATCHES])
  variables = {"params": {"layer": {"kernel": jnp.asarray(WEIGHT.T, dtype)}}}
  qmodule, qvariables = jb.quantize(Layer(), variables, config, lambda m: [m(jnp.asarray(x, dtype)) for x in BATCHES])
  name = f"layer.{pattern[1:]}"
  return tb.quantizers(model)[name], jb.quantizers(qvariables)[name], model["layer"], jb.fold_weight(qmodule, qvariables)


def same_bits(a, b):
  a, b = a.detach().float().numpy(), np.asarray(b, np.float32)
  assert a.shape == b.shape and a.tobytes() == b.tobytes(), f"{(a != b).sum()} of {a.size} values differ"


@pytest.mark.parametrize("attributes", ATTRIBUTES)
def test_weights_are_the_same_bits(attributes):
  ours, theirs, layer, folded = both("*weight_quantizer", ATTRIBUTES[attributes], "float32")
  if ours.amax is not None:
    same_bits(ours.amax, theirs.amax)
  same_bits(layer.quantized_weight(), folded["params"]["layer"]["kernel"].T)


@pytest.mark.parametrize("attributes", ATTRIBUTES)
def test_inputs_are_the_same_bits(attributes):
  ours, theirs, _, _ = both("*input_quantizer", ATTRIBUTES[attributes], "float32")
  same_bits(ours.amax, theirs.amax)
  for run in (theirs, jax.jit(lambda x: theirs(x))):
    same_bits(ours(torch.tensor(BATCHES[1])), run(jnp.asarray(BATCHES[1])))


@pytest.mark.parametrize("attributes", ["bias_dynamic", "rotate_back"])
def test_float16_saturates_in_both(attributes):
  x = np.array([[65504.0, -65504.0, 1e4, 3.0] * 8], np.float16)
  ours = tb.TensorQuantizer(ATTRIBUTES[attributes])(torch.tensor(x))
  theirs = jb.Quantizer(ATTRIBUTES[attributes])(jnp.asarray(x))
  assert bool(torch.isfinite(ours).all())
  same_bits(ours, theirs)
  assert bool(torch.isfinite(tb.TensorQuantizer(ATTRIBUTES[attributes])(torch.full((1, 32), 65504.0).half())).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_are_cast_once(dtype):
  attributes = {"num_bits": 8, "rotate": {"enable": True, "mode": "rotate_back"}}
  x = torch.tensor(BATCHES[0]).to(getattr(torch, dtype))
  ours = tb.TensorQuantizer(attributes)
  expected = ours(x.float()).to(x.dtype)
  assert torch.equal(ours(x), expected)
  assert torch.equal(torch.compile(lambda v: ours(v), fullgraph=True)(x), expected)
  theirs = jb.Quantizer(attributes)
  same_bits(expected, jax.jit(lambda v: theirs(v))(jnp.asarray(BATCHES[0]).astype(dtype)))


def test_both_have_the_same_public_names():
  # torch converts modules to subclasses, JAX runs them through a runner: these names have no counterpart
  # ... and a torch class says that it calls quantize_bmm, while JAX sees the call; Flax's attention function has a quantized form
  torch_only = {"QuantInput", "QuantWeight", "TensorQuantizer", "register_attention"}
  jax_only = {"Quantizer", "Runner", "dot_product_attention"}
  assert set(tb.__all__) - torch_only == set(jb.__all__) - jax_only
  shared = ("spec", "config", "amax", "tensor_amax", "pre_quant_scale", "bias_value", "maxbound", "step_size", "is_enabled", "is_dynamic")
  shared += ("is_folded", "is_calibrating", "group", "enable", "disable")
  for name in shared:
    assert hasattr(tb.TensorQuantizer({"num_bits": 8}), name) and hasattr(jb.Quantizer({"num_bits": 8}), name), name
