"""matmul="int8": sums of products of codes, exactly; the same in both frameworks; near the simulation; refused where it cannot be."""

from __future__ import annotations

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import core
import jax_backend as jb
import torch_backend as tb
from core import matmul as products

CHANNEL = {"num_bits": 8, "axis": 0}
TOKEN = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
CONFIGS = {
  "static input": (CHANNEL, {"num_bits": 8}),
  "token": (CHANNEL, TOKEN),
  "4 bits": ({"num_bits": 4, "axis": 0}, TOKEN),
  "one scale": ({"num_bits": 8}, TOKEN),
}


def config(weights, inputs):
  return {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": weights, "*input_quantizer": inputs}, "algorithm": "max"}


def net() -> torch.nn.Module:
  torch.manual_seed(0)
  return torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 10, bias=False)).eval()


class Twin(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10, use_bias=False, name="layers_1")(nn.Dense(48, name="layers_0")(x))


def variables(model) -> dict:
  first, second = (jnp.asarray(layer.weight.detach().numpy().T) for layer in model)
  return {"params": {"layers_0": {"kernel": first, "bias": jnp.asarray(model[0].bias.detach().numpy())}, "layers_1": {"kernel": second}}}


X = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)


def exact(x: np.ndarray, layer, input_amax) -> np.ndarray:
  """The definition, in numpy with int64 sums."""
  weight, into = layer.weight_quantizer, layer.input_quantizer
  q = core.quantize(x.reshape(-1, x.shape[-1]), into.spec, input_amax)
  w = core.quantize(layer.weight.detach().numpy(), weight.spec, weight.amax.numpy())
  sums = q.codes.astype(np.int64) @ w.codes.astype(np.int64).T
  y = sums.astype(np.float32) * (np.reshape(q.scale, (-1, 1)) * np.reshape(w.scale, (1, -1)))
  y = y if layer.bias is None else y + layer.bias.detach().numpy()
  return y.reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "token" else pytest.mark.slow) for n in CONFIGS])
def test_sums_of_codes(name, compared):
  """Both backends return what the definition says, to the last bit, and stay near the simulation."""
  cfg, model = config(*CONFIGS[name]), net()
  qmodule, qvariables = jb.quantize(Twin(), variables(model), cfg, lambda m: m(jnp.asarray(X)))
  tb.quantize(model, cfg, lambda m: m(torch.from_numpy(X)))
  with torch.no_grad():
    simulated = model(torch.from_numpy(X)).numpy()
    expected = X
    for layer in model:
      amax = layer.input_quantizer.amax
      expected = exact(expected, layer, None if amax is None else amax.numpy())
    tb.compress(model, matmul="int8")
    found = model(torch.from_numpy(X)).numpy()
  assert found.tobytes() == expected.tobytes()
  # both round 64 and 48 products of codes; only float32 sums differ, by some units in the last place of the largest partial sum
  assert not np.array_equal(found, simulated) and np.abs(found - simulated).max() < 2e-6 * np.abs(simulated).max()
  ours = jax.jit(qmodule.apply)(jb.compress(qmodule, qvariables, matmul="int8"), jnp.asarray(X))
  assert np.asarray(ours).tobytes() == expected.tobytes()
  compared(2 * expected.size)


@pytest.mark.parametrize("preset", [pytest.param("FP8_DEFAULT_CFG", marks=pytest.mark.slow), "FP8_PER_CHANNEL_PER_TOKEN_CFG"])
def test_float8(preset):
  """`torch._scaled_mm` and JAX's float8 dots (both run on the CPU too) are near the simulation, and refuse other formats."""
  cfg, model = tb.preset(preset), net()
  qmodule, qvariables = jb.quantize(Twin(), variables(model), cfg, lambda m: m(jnp.asarray(X)))
  tb.quantize(model, cfg, lambda m: m(torch.from_numpy(X)))
  with torch.no_grad():
    simulated = model[0](torch.from_numpy(X)).numpy()
    found = tb.compress(model, matmul="float8")[0](torch.from_numpy(X)).numpy()
  ours = jax.jit(lambda held, x: qmodule.apply(held, x, capture_intermediates=True)[1]["intermediates"]["layers_0"]["__call__"][0])(
    jb.compress(qmodule, qvariables, matmul="float8"), jnp.asarray(X)
  )
  # one layer, since a code of the second one's input may fall otherwise; float32 sums of 64 products, in another order
  for one in (found, np.asarray(ours)):
    assert np.abs(one - simulated).max() < 2e-6 * np.abs(simulated).max()
  with pytest.raises(ValueError, match="matmul 'float8' needs E4M3 with a float32 scale and no zero point; its weight is INT8"):
    tb.compress(tb.quantize(net(), tb.INT8_DEFAULT_CFG, lambda m: m(torch.from_numpy(X))), matmul="float8")


def test_scaled_inputs():
  """pre_quant_scale (SmoothQuant) comes before the codes."""
  model, x = net(), torch.from_numpy(X)
  tb.quantize(model, tb.INT8_SMOOTHQUANT_CFG, lambda m: m(x))
  with torch.no_grad():
    expected = model(x)
    found = tb.compress(model, matmul="int8")(x)
  assert torch.allclose(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))  # as above


def test_refusals():
  model = tb.quantize(net(), tb.NVFP4_DEFAULT_CFG, lambda m: m(torch.from_numpy(X)))
  with pytest.raises(ValueError, match=r"nothing was compressed. 0: matmul 'int8' needs signed integers .* its weight is E2M1"):
    tb.compress(model, matmul="int8")
  with pytest.raises(ValueError, match=r"matmul 'float4' is unknown; allowed are None .* and 'int8', 'float8'"):
    tb.compress(model, matmul="float4")
  qmodule, qvariables = jb.quantize(Twin(), variables(net()), jb.INT8_WEIGHT_ONLY_CFG, lambda m: m(jnp.asarray(X)))
  with pytest.raises(ValueError, match="a product of codes needs one format of the weight and one of the input; it has 1 and 0"):
    jb.compress(qmodule, qvariables, matmul="int8")
  with pytest.raises(ValueError, match="is unknown"):
    jb.compress(qmodule, qvariables, matmul="float4")
  model = tb.compress(tb.quantize(net(), tb.INT8_DEFAULT_CFG, lambda m: m(torch.from_numpy(X))), matmul="int8")
  with pytest.raises(ValueError, match=r"has no gradient; call the model under torch.no_grad"):
    model(torch.from_numpy(X).requires_grad_())
  blocks = core.QuantSpec.named("int4")
  assert "one per output" in str(products.refusal("int8", [blocks], [core.QuantSpec.named("int8")]))
  assert "one per token" in str(products.refusal("int8", [core.QuantSpec.named("int8")], [blocks]))


def test_restored_and_copied():
  """A copy computes in the same way; decompressed, the layer's own product is back."""
  model, x = net(), torch.from_numpy(X)
  tb.quantize(model, tb.INT8_DEFAULT_CFG, lambda m: m(x))
  with torch.no_grad():
    simulated = model(x)
    found = tb.compress(model, matmul="int8")(x)
    assert torch.equal(copy.deepcopy(model)(x), found)
    assert torch.equal(tb.decompress(model)(x), simulated)
