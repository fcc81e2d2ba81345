"""What else lives in torch: fused layers, parametrizations, export, pickling, wrappers, messages of torch_backend's import."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import core
import torch_backend as tb
from tests.torch_backend.models import mlp, quietly

WEIGHTS = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 4, "axis": 0}}, "algorithm": "max"}


def int4(weight):
  return core.fake_quantize(weight, core.QuantSpec(core.formats.INT4, axis=(0,)))


@torch.no_grad()
def test_the_fused_encoder_layer_does_not_bypass_the_quantizers():
  torch.manual_seed(0)
  layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
  x = torch.randn(2, 5, 16)
  plain = layer(x)
  quietly(layer, WEIGHTS)
  quantized = layer(x)
  with torch.enable_grad():  # recording gradients is the other thing that keeps torch off its fused path
    unfused = layer(x)
  # Attention has a fused path of its own, which sums in another order: a few float32 roundings of values around 1.
  assert float((quantized - unfused).abs().max()) < 1e-5 < 1e-2 < float((quantized - plain).abs().max())
  layer.activation_relu_or_gelu = 1  # the control: on the fused path the quantizers are not called
  assert float((layer(x) - plain).abs().max()) < 1e-5


class Double(nn.Module):
  def forward(self, weight):
    return 2 * weight


@torch.no_grad()
def test_parametrized_and_normed_weights():
  torch.manual_seed(0)
  x = torch.randn(3, 8)
  layer = nn.Linear(8, 4)
  parametrize.register_parametrization(layer, "weight", Double())
  expected = int4(layer.weight.detach())
  tb.quantize(layer, WEIGHTS)
  assert torch.equal(layer(x), nn.functional.linear(x, expected, layer.bias))
  normed = parametrizations.weight_norm(nn.Linear(8, 4))
  expected = int4(normed.weight.detach())
  tb.quantize(normed, WEIGHTS)
  assert torch.equal(normed(x), nn.functional.linear(x, expected, normed.bias))


@torch.no_grad()
@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_torch_export(preset):
  model, x = mlp(), torch.randn(4, 32)
  quietly(model, tb.preset(preset), lambda m: m(x))
  program = torch.export.export(model, (x,))
  assert torch.equal(program.module()(x), model(x))


@torch.no_grad()
def test_a_converted_model_can_be_pickled():
  model, x = mlp(), torch.randn(4, 32)
  quietly(model, tb.NVFP4_DEFAULT_CFG, lambda m: m(x))
  assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_state_holds_tensors_only():
  model = quietly(mlp(), tb.W4A8_AWQ_BETA_CFG, lambda m: m(torch.ones(2, 32)))
  assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())


@torch.no_grad()
def test_meta_device_and_back():
  model, x = mlp(), torch.randn(4, 32)
  quietly(model, tb.INT8_DEFAULT_CFG, lambda m: m(x))
  state, expected = model.state_dict(), model(x)
  model.to("meta")
  assert model[0].weight_quantizer.amax.is_meta and "meta" in repr(model)
  model.to_empty(device="cpu")
  model.load_state_dict(state)
  assert torch.equal(model(x), expected)


def test_every_warning_points_at_the_users_line():
  with pytest.warns(tb.ConfigWarning) as caught:
    tb.quantize(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)), tb.W4A8_MXFP4_FP8_CFG)
    tb.quantize(mlp(), tb.INT8_SMOOTHQUANT_CFG)
    tb.disable_quantizer(mlp(), "*")
  assert len(caught) == 5 and {w.filename for w in caught} == {__file__}


def test_import_brings_no_other_framework():
  others = ("jax", "flax", "jax_backend", "rich", "transformers", "scipy", "absl")
  code = f"import sys, torch_backend; print([m for m in {others} if m in sys.modules])"
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
