"""Quantized layers: the original forward around quantized tensors, the axes of stored layouts, the kept weight, custom classes."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import core
import torch_backend as tb
from tests.torch_backend.models import mlp, quietly

INT4_PER_CHANNEL = {
  "quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 4, "axis": 0}, "*input_quantizer": {"num_bits": 8}},
  "algorithm": "max",
}
WEIGHTED = {
  "Linear": (lambda: nn.Linear(12, 8), (5, 12)),
  "Conv1d": (lambda: nn.Conv1d(4, 8, 3, groups=2, padding="same", padding_mode="reflect"), (2, 4, 9)),
  "Conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2), (2, 4, 9, 9)),
  "Conv3d": (lambda: nn.Conv3d(4, 8, 3), (2, 4, 5, 5, 5)),
  "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9)),
  "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
  "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 3, 3, 3)),
}
UNWEIGHTED = {
  "LayerNorm": (lambda: nn.LayerNorm(6), (4, 6)),
  "RMSNorm": (lambda: nn.RMSNorm(6), (4, 6)),
  "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (4, 6)),
  "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3)),
  "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (4, 6, 3, 3, 3)),
  "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6), (4, 6, 5)),
  "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 6, 3, 3)),
  "InstanceNorm3d": (lambda: nn.InstanceNorm3d(6), (4, 6, 3, 3, 3)),
  "LeakyReLU": (lambda: nn.LeakyReLU(0.2), (4, 6)),
  "MaxPool1d": (lambda: nn.MaxPool1d(2), (4, 6, 8)),
  "MaxPool2d": (lambda: nn.MaxPool2d(2), (4, 6, 8, 8)),
  "MaxPool3d": (lambda: nn.MaxPool3d(2), (4, 6, 8, 8, 8)),
  "AvgPool1d": (lambda: nn.AvgPool1d(2), (4, 6, 8)),
  "AvgPool2d": (lambda: nn.AvgPool2d(2), (4, 6, 8, 8)),
  "AvgPool3d": (lambda: nn.AvgPool3d(2), (4, 6, 8, 8, 8)),
  "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), (4, 6, 8)),
  "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (4, 6, 8, 8)),
  "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), (4, 6, 8, 8, 8)),
}


def channel_by_channel(weight: torch.Tensor, axis: int, bits: int) -> torch.Tensor:
  spec = core.QuantSpec(core.formats.int_format(bits))
  return torch.stack([core.fake_quantize(part.contiguous(), spec) for part in weight.unbind(axis)], axis)


def test_every_layer_of_the_registry_is_tested():
  from torch_backend.modules.layers import LAYERS

  assert {layer.__name__ for layer in LAYERS} == {f"Quant{name}" for name in [*WEIGHTED, *UNWEIGHTED, "Embedding"]}


@pytest.mark.parametrize("name", WEIGHTED)
@torch.no_grad()
def test_weighted_layers(name):
  """The output is that of the original layer with weight and input quantized outside; one scale per OUTPUT channel in every layout."""
  torch.manual_seed(0)
  make, shape = WEIGHTED[name]
  layer, x = make().eval(), torch.randn(shape)
  reference = copy.deepcopy(layer)
  tb.quantize(layer, INT4_PER_CHANNEL, lambda m: m(x))
  assert isinstance(layer, type(reference)) and type(layer).__name__ == f"Quant{name}"
  weight = reference.weight
  if not name.startswith("ConvTranspose"):
    expected = channel_by_channel(weight, 0, 4)
  else:  # [in, out/groups, ...]: an output channel is one index of axis 1 within one group's input channels
    groups = reference.groups
    expected = torch.cat([channel_by_channel(part, 1, 4) for part in weight.chunk(groups, 0)], 0)
  assert torch.equal(layer.quantized_weight(), expected)
  assert layer.weight_quantizer.amax.numel() == (layer.out_features if name == "Linear" else layer.out_channels)
  reference.weight.copy_(expected)
  quantized_x = core.fake_quantize(x, core.QuantSpec.named("int8"))
  assert torch.equal(layer(x), reference(quantized_x))
  assert layer.weight is layer.stored_weight


@pytest.mark.parametrize("name", UNWEIGHTED)
@torch.no_grad()
def test_layers_with_a_quantized_input(name):
  torch.manual_seed(0)
  make, shape = UNWEIGHTED[name]
  layer, x = make().eval(), torch.randn(shape)
  reference = copy.deepcopy(layer)
  tb.quantize(layer, {"quant_cfg": {"default": {"enable": False}, "*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}, lambda m: m(x))
  assert torch.equal(layer(x), reference(core.fake_quantize(x, core.QuantSpec.named("int8"))))
  assert set(tb.quantizers(layer)) == {"input_quantizer", "output_quantizer"}


@torch.no_grad()
def test_embedding():
  torch.manual_seed(0)
  table, ids = nn.Embedding(20, 16, padding_idx=0), torch.arange(12).reshape(3, 4)
  rule = {"num_bits": 8, "axis": 0}
  rules = {"*weight_quantizer": rule, "*input_quantizer": rule, "*output_quantizer": {"num_bits": 4}}
  tb.quantize(table, {"quant_cfg": rules, "algorithm": "max"}, lambda m: m(ids))
  looked_up = F.embedding(ids, channel_by_channel(table.weight, 0, 8))
  assert torch.equal(table(ids), core.fake_quantize(looked_up, core.QuantSpec(core.formats.INT4), looked_up_amax(table, ids)))
  assert not table.input_quantizer.is_enabled
  table.input_quantizer.enable()
  assert not table.input_quantizer.is_enabled


def looked_up_amax(table, ids):
  return F.embedding(ids, table.stored_weight).abs().max()


@torch.no_grad()
def test_hugging_face_conv1d_quantizes_output_channels():
  pytest.importorskip("transformers")
  from transformers.pytorch_utils import Conv1D

  torch.manual_seed(0)
  layer, x = Conv1D(6, 10), torch.randn(4, 10)
  layer.weight.normal_()
  tb.quantize(layer, INT4_PER_CHANNEL, lambda m: m(x))
  assert torch.equal(layer.quantized_weight(), channel_by_channel(layer.weight, 1, 4))
  assert layer.weight_quantizer.amax.shape == (6, 1) and layer(x).isfinite().all()
  assert "transformers.pytorch_utils" in sys.modules


@torch.no_grad()
def test_output_quantizer_and_pooling_with_indices():
  x = torch.randn(2, 3, 8, 8)
  pool = nn.MaxPool2d(2, return_indices=True)
  reference = copy.deepcopy(pool)
  tb.quantize(pool, {"quant_cfg": {"*output_quantizer": {"num_bits": 4}}, "algorithm": "max"}, lambda m: m(x))
  values, indices = pool(x)
  expected = reference(x)
  assert torch.equal(values, core.fake_quantize(expected[0], core.QuantSpec(core.formats.INT4))) and torch.equal(indices, expected[1])


class Scaled(nn.Linear):
  """A user's layer that reads self.weight in a forward of its own."""

  def forward(self, x, factor=2.0):
    return F.linear(x, self.weight * factor, self.bias)


@torch.no_grad()
def test_a_subclass_keeps_its_own_forward():
  torch.manual_seed(0)
  layer, x = Scaled(12, 8).eval(), torch.randn(3, 12)
  reference = copy.deepcopy(layer)
  tb.quantize(layer, INT4_PER_CHANNEL, lambda m: m(x))
  assert isinstance(layer, Scaled) and type(layer).__name__ == "QuantScaled"
  reference.weight.copy_(channel_by_channel(reference.weight, 0, 4))
  assert torch.equal(layer(x, factor=3.0), reference(core.fake_quantize(x, core.QuantSpec.named("int8")), 3.0))


class Wave(nn.Module):
  def __init__(self):
    super().__init__()
    self.gain = nn.Parameter(torch.linspace(0.1, 2, 6))

  def forward(self, x):
    return torch.sin(x) * self.gain


class QuantWave(Wave):
  def _setup(self):
    self.wave_quantizer = tb.TensorQuantizer()
    self.gain_quantizer = tb.TensorQuantizer()

  def forward(self, x):
    return self.wave_quantizer(torch.sin(x)) * self.gain_quantizer(self.gain)


@torch.no_grad()
def test_register_and_unregister():
  model, x = nn.Sequential(nn.Linear(6, 6), Wave()), torch.randn(4, 6)
  config = {"quant_cfg": {"*wave_quantizer": {"num_bits": 4}, "*gain_quantizer": {"num_bits": 8}}, "algorithm": "max"}
  tb.register(Wave, QuantWave)
  try:
    converted = tb.quantize(copy.deepcopy(model), config, lambda m: m(x))
  finally:
    tb.unregister(Wave)
  assert isinstance(converted[1], QuantWave) and tb.quantizers(converted)["1.gain_quantizer"].amax == 2.0
  wave = torch.sin(model[0](x))
  gain = core.fake_quantize(model[1].gain, core.QuantSpec.named("int8"))
  assert torch.equal(converted(x), core.fake_quantize(wave, core.QuantSpec(core.formats.INT4)) * gain)
  with pytest.raises(ValueError, match="quantizes nothing"):
    quietly(model, config)
  with pytest.raises(KeyError, match="Wave was not registered"):
    tb.unregister(Wave)
  with pytest.raises(TypeError, match="_setup"):
    tb.register(Wave, Wave)
  with pytest.raises(TypeError, match=r"two nn\.Module classes"):
    tb.register(Wave, int)


def test_registering_over_a_built_in_class():
  class QuantBoth(nn.LayerNorm):
    def _setup(self):
      self.input_quantizer = tb.TensorQuantizer()
      self.weight_quantizer = tb.TensorQuantizer()

    def forward(self, x):
      return F.layer_norm(self.input_quantizer(x), self.normalized_shape, self.weight_quantizer(self.weight), self.bias, self.eps)

  tb.register(nn.LayerNorm, QuantBoth)
  try:
    norm = tb.quantize(nn.LayerNorm(8), {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}, "algorithm": "max"})
  finally:
    tb.unregister(nn.LayerNorm)
  assert norm.weight_quantizer.amax == 1.0 and norm(torch.randn(2, 8)).shape == (2, 8)
  assert (
    type(tb.quantize(nn.LayerNorm(8), {"quant_cfg": {"*input_quantizer": {"num_bits": 8, "type": "dynamic"}}})).__name__ == "QuantLayerNorm"
  )


# -- the weight kept in evaluation -----------------------------------------------------------------------------------------------


def quantized_layer() -> tb.QuantWeight:
  torch.manual_seed(0)
  return tb.quantize(nn.Linear(16, 8).eval(), tb.INT8_WEIGHT_ONLY_CFG)


EDITS = {
  "in place": lambda m: m.weight.mul_(2),
  "one element": lambda m: m.weight[0, 0].fill_(0.01),
  "data in place": lambda m: m.weight.data.mul_(0.5),
  "one element of data": lambda m: m.weight.data[3, 5].fill_(0.02),
  "data permuted": lambda m: m.weight.data.copy_(m.weight.data.flip(0)),
  "data replaced": lambda m: setattr(m.weight, "data", m.weight.data * 0.25),
  "parameter replaced": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(8, 16))),
  "state dict": lambda m: m.load_state_dict({**m.state_dict(), "weight": torch.randn(8, 16)}),
  "amax": lambda m: setattr(m.weight_quantizer, "amax", m.weight_quantizer.amax * 2),
  "amax in place": lambda m: m.weight_quantizer.amax.mul_(0.5),
  "configuration": lambda m: m.weight_quantizer.set_from_attribute_config({"num_bits": 4, "axis": 0}),
  "disabled": lambda m: m.weight_quantizer.disable(),
  "bfloat16": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_the_kept_weight_never_is_stale(edit):
  layer = quantized_layer()
  kept = layer.quantized_weight()
  assert layer.quantized_weight() is kept
  for _ in range(2):
    EDITS[edit](layer)
    fresh = layer.weight_quantizer(layer.stored_weight)
    assert torch.equal(layer.quantized_weight(), fresh)
    x = torch.randn(3, 16, dtype=layer.weight.dtype)
    assert torch.equal(layer(x), F.linear(x, fresh, layer.bias))


def test_no_weight_is_kept_in_training():
  layer = quantized_layer()
  with torch.no_grad():
    layer(torch.randn(2, 16))
    assert layer._weight_kept is not None
    layer.train()
    assert layer._weight_kept is None
    layer(torch.randn(2, 16))
    assert layer._weight_kept is None


@pytest.mark.parametrize("pass_through", [True, False])
def test_gradients_in_evaluation_are_those_of_training(pass_through):
  layer, x = quantized_layer(), torch.randn(2, 16)
  rule = {"num_bits": 4, "axis": 0, "pass_through_bwd": pass_through}
  tb.set_quantizer_by_cfg(layer, {"*weight_quantizer": rule})
  layer.weight_quantizer.amax = torch.full((8, 1), 0.1)
  gradients = []
  for training in (True, False, False):
    layer.train(training)
    layer.zero_grad()
    layer(x).square().sum().backward()
    gradients.append(layer.weight.grad.clone())
  assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
  assert (layer._weight_kept is not None) == pass_through
  assert bool((gradients[0] == 0).any()) != pass_through


@torch.no_grad()
def test_the_input_may_be_a_keyword():
  torch.manual_seed(0)
  layer, x = Scaled(12, 8).eval(), torch.randn(3, 12)
  tb.quantize(layer, INT4_PER_CHANNEL, lambda m: m(x))
  assert torch.equal(layer(x=x, factor=3.0), layer(x, 3.0))
  with pytest.raises(TypeError, match="missing"):
    layer()


def test_inference_mode():
  with torch.inference_mode():
    model, x = mlp(), torch.randn(4, 32)
    tb.quantize(model, tb.INT8_DEFAULT_CFG, lambda m: m(x))
    first = model(x)
    assert torch.equal(first, model(x))


def test_projections_of_multi_head_attention_are_named_and_left_alone():
  attention = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 16)})
  with pytest.warns(tb.ConfigWarning, match=r"MultiheadAttention.*unquantized: attn"):
    tb.quantize(attention, tb.INT8_WEIGHT_ONLY_CFG)
  operands = {f"attn.{role}_bmm_quantizer" for role in "qkvp"}
  assert set(tb.quantizers(attention)) == {"fc.input_quantizer", "fc.weight_quantizer", "fc.output_quantizer"} | operands
  assert not any(tb.quantizers(attention)[name].is_enabled for name in operands)


def test_integer_weights_are_named_and_left_alone():
  model = mlp()
  model[0].weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
  with pytest.warns(tb.ConfigWarning, match=r"0 \(Linear\) stays unquantized: its weight is of dtype torch\.int8"):
    tb.quantize(model, tb.INT8_WEIGHT_ONLY_CFG)
  assert type(model[0]) is nn.Linear
