"""compress in PyTorch: bit for bit the simulation in three float types, as few bytes as counted, states, patterns, refusals."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import core
import torch_backend as tb
from core import blocks
from tests.torch_backend.models import WHOLE_PRESETS, tiny_llama
from torch_backend.host import TorchHost
from torch_backend.modules import QuantWeight
from torch_backend.sequential import tensor_quantizers

PRESETS = [name for name in WHOLE_PRESETS if name != "NVFP4_EXPERTS_ONLY_CFG"]  # the tiny Llama has no experts
TOKENS = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32}


@pytest.fixture(scope="module")
def llama():
  return tiny_llama().eval()


def quantized(model: nn.Module, config, dtype=torch.float32) -> nn.Module:
  model = copy.deepcopy(model).to(dtype)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", tb.ConfigWarning)
    return tb.quantize(model, config, lambda m: m(TOKENS))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
  return model(TOKENS).logits


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
  with torch.no_grad():
    return {name: m.compute_weight() for name, m in model.named_modules() if isinstance(m, QuantWeight)}


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
  assert a.dtype == b.dtype and a.shape == b.shape
  assert torch.equal(a.contiguous().view(BITS[a.element_size()]), b.contiguous().view(BITS[b.element_size()]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(llama, preset, dtype, compared):
  """fake == compress == decompress: every weight and the logits; bytes as `effective_bits` counts them."""
  model = quantized(llama, tb.preset(preset), dtype)
  expected, before = logits(model), weights(model)
  specs = {name: tensor_quantizers(m.weight_quantizer)[0].spec for name, m in model.named_modules() if isinstance(m, QuantWeight)}
  assert tb.compress(model) is model and tb.is_compressed(model)
  report = tb.compression_report(model)
  for one in report.compressed:
    assert f"{one.name}.weight" not in dict(model.named_parameters())
    assert 8 * one.nbytes == core.effective_bits(specs[one.name], one.shape) * one.numel
  assert_same_bits(logits(model), expected)
  for name, weight in weights(model).items():
    assert_same_bits(weight, before[name])
    compared(weight.numel())
  assert tb.is_compressed(tb.decompress(model)) is False
  assert_same_bits(logits(model), expected)
  compared(expected.numel() * 2)


def test_memory_is_what_the_tensors_take(llama):
  model = quantized(llama, tb.NVFP4_DEFAULT_CFG)
  before = tb.compression_report(model)
  assert before.total_bytes == before.float_bytes and not before.compressed
  tb.compress(model)
  report = tb.compression_report(model)
  state = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
  assert report.total_bytes - state < 500  # what is kept beside the state: step sizes of static scales
  assert 4.5 < report.bits_per_weight < 4.6
  assert report.float_bytes == before.float_bytes
  assert "14 of 16 weights compressed: 73,728 values" in report.summary()


def test_calibrated_blocks_leave_nothing_behind(llama):
  """amax and step of each block, which static scales keep, are not held beside the codes."""
  model = tb.compress(quantized(llama, tb.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG))
  largest = max(b.numel() for name, b in model.named_buffers() if "packed_weight" not in name and "weight_quantizer" in name)
  assert largest == 1


def test_print(llama, capsys):
  model = tb.compress(quantized(llama, tb.INT8_DEFAULT_CFG), "*.mlp.*")
  tb.print_compression_report(model)
  out = capsys.readouterr().out
  assert "model.layers.0.mlp.up_proj       INT8" in out and "6 of 16 weights compressed: 49,152 values" in out
  rows = {row["name"]: row["state"] for row in tb.print_quant_summary(model)}
  assert rows["model.layers.0.mlp.up_proj.weight_quantizer"] == "compressed"
  assert rows["model.layers.0.self_attn.q_proj.weight_quantizer"] == "calibrated"


def test_selected_by_pattern(llama):
  model = quantized(llama, tb.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
  expected = logits(model)
  tb.compress(model, ["*.mlp.*", "*layers.1.self_attn.q_proj"])
  assert len(tb.compression_report(model).compressed) == 7
  assert_same_bits(logits(model), expected)
  tb.compress(model)  # the rest
  assert len(tb.compression_report(model).compressed) == 14
  tb.decompress(model, "*.mlp.up_proj")
  assert len(tb.compression_report(model).compressed) == 12
  assert_same_bits(logits(model), expected)
  with pytest.raises(ValueError, match=r"include: '\*nowhere\*' matches none of the layers model.embed_tokens"):
    tb.compress(model, "*nowhere*")
  with pytest.raises(TypeError, match="include is a pattern"):
    tb.compress(model, [3])


@pytest.mark.parametrize("preset", ["NVFP4_DEFAULT_CFG", "W4A8_AWQ_BETA_CFG", "INT8_SMOOTHQUANT_CFG"])
def test_states(llama, preset):
  """A state dict goes into a compressed model and into one that is not yet; so does a pickled copy, and a deep copy."""
  model = quantized(llama, tb.preset(preset))
  fresh = copy.deepcopy(model)
  expected = logits(tb.compress(model))
  state = model.state_dict()
  assert "model.layers.0.mlp.up_proj.packed_weight.codes" in state and "model.layers.0.mlp.up_proj.weight" not in state
  file = io.BytesIO()
  torch.save(state, file)
  file.seek(0)
  for other in (fresh, copy.deepcopy(model)):
    for tensor in other.state_dict().values():
      tensor.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    file.seek(0)
    assert tb.is_compressed(other)
    assert_same_bits(logits(other), expected)


@pytest.mark.parametrize("name", ["blocks with zero points", "nf4, double quantization"])
def test_saved(llama, name, tmp_path):
  """`save` keeps codes, `restore` into a float model brings them back, packed zero points and double scales included."""
  config = {"quant_cfg": {"default": {"enable": False}, "*mlp*weight_quantizer": ROWS[name]}, "algorithm": "max"}
  model = tb.compress(quantized(llama, config))
  tb.save(model, tmp_path / "saved")
  other = tb.restore(copy.deepcopy(llama), tmp_path / "saved")
  assert tb.is_compressed(other)
  assert_same_bits(logits(other), logits(model))
  for a, b in zip(tb.compression_report(model).weights, tb.compression_report(other).weights, strict=True):
    assert a == b


def test_state_of_another_format_is_refused(llama):
  state = tb.compress(quantized(llama, tb.INT8_WEIGHT_ONLY_CFG)).state_dict()
  with pytest.raises(ValueError, match=r"codes has shape \[64, 64\]; a weight \[64, 64\] as E2M1 has \[64, 32\]"):
    quantized(llama, tb.MXFP4_DEFAULT_CFG).load_state_dict(state)


@pytest.mark.parametrize("preset", ["MXFP6_DEFAULT_CFG"])
def test_one_graph(preset):
  """torch.compile without a break; the eager backend, so that only the graph is asked (inductor: the slow test)."""
  torch.manual_seed(0)
  net, x = nn.Linear(32, 16), torch.randn(4, 32)
  tb.compress(tb.quantize(net, tb.preset(preset), lambda m: m(x)))
  torch._dynamo.reset()
  with torch.no_grad():
    assert_same_bits(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["NVFP4_DEFAULT_CFG", "MXFP6_DEFAULT_CFG", "INT8_DEFAULT_CFG", "W4A8_AWQ_BETA_CFG", "FP8_DEFAULT_CFG"])
def test_inductor(preset):
  """Compiled and compressed equals compiled and simulated."""
  torch.manual_seed(0)
  net, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), torch.randn(4, 64)
  tb.quantize(net, tb.preset(preset), lambda m: m(x))
  torch._dynamo.reset()
  with torch.no_grad():
    expected = torch.compile(copy.deepcopy(net), fullgraph=True)(x)
    assert_same_bits(torch.compile(tb.compress(net), fullgraph=True)(x), expected)


class Every(nn.Module):
  """Every kind of weight: convolutions, a transposed and grouped one, a table, Hugging Face's [in, out] layer."""

  def __init__(self) -> None:
    super().__init__()
    from transformers.pytorch_utils import Conv1D

    self.table = nn.Embedding(10, 24)
    self.gpt = Conv1D(32, 24)
    self.conv = nn.Conv1d(32, 8, 3)
    self.up = nn.ConvTranspose1d(8, 12, 2, groups=2)
    self.plane = nn.Conv2d(3, 5, (3, 2))
    self.linear = nn.Linear(35, 7)

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    x = self.up(self.conv(self.gpt(self.table(tokens)).transpose(1, 2)))
    x = self.plane(x[:, None, :, :8].expand(-1, 3, -1, -1))
    return self.linear(x.flatten(1)[:, :350].reshape(-1, 35))


ATTRIBUTES = {
  "int8 per channel": {"num_bits": 8, "axis": 0},
  "int4 with zero points": {"num_bits": 4, "axis": 0, "unsigned": True, "zero_point": True},
  "int3": {"num_bits": 3, "axis": 0},
  "affine": {"num_bits": 4, "axis": 0, "bias": {0: None, "type": "static"}},
}
ROWS = {
  "nf4": {"format": "nf4"},
  "nf4, double quantization": {"format": "nf4_double"},
  "blocks with zero points": {"num_bits": 4, "block_sizes": {-1: 16}, "unsigned": True, "zero_point": True},
  "turned": {"num_bits": 4, "axis": 0, "rotate": {"enable": True, "mode": "rotate_back"}},
  "turned with its input": {"num_bits": 6, "axis": 0, "rotate": True},
  "int4, then fp8, then int8": [{"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": (4, 3)}, {"num_bits": 8, "axis": 0}],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_formats(llama, name, dtype, compared):
  """Formats that no preset has."""
  config = {"quant_cfg": {"default": {"enable": False}, "*mlp*weight_quantizer": ROWS[name]}, "algorithm": "max"}
  model = quantized(llama, config, dtype)
  expected, before = logits(model), weights(model)
  tb.compress(model)
  assert len(tb.compression_report(model).compressed) == 6
  assert_same_bits(logits(model), expected)
  for key, weight in weights(model).items():
    assert_same_bits(weight, before[key])
    compared(weight.numel())


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_layer(name, dtype, compared):
  attributes = ATTRIBUTES[name]
  torch.manual_seed(1)
  model = Every().eval().to(dtype)
  tokens = torch.arange(10)[None].repeat(2, 1)
  tb.quantize(
    model, {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": attributes}, "algorithm": "max"}, lambda m: m(tokens)
  )
  before = weights(model)
  with torch.no_grad():
    expected = model(tokens)
    tb.compress(model)
    assert len(tb.compression_report(model).compressed) == 6
    assert_same_bits(model(tokens), expected)
  for key, weight in weights(model).items():
    assert_same_bits(weight, before[key])
    compared(weight.numel())


def test_signed_scales_and_host(llama):
  """Codes as a host shows them are those of `core.quantize`; a negative scale stays negative."""
  config = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 32}}}, "algorithm": "max"}
  model = quantized(llama, config)
  quantizer = tb.quantizers(model)["model.layers.0.mlp.up_proj.weight_quantizer"]
  quantizer.amax = -quantizer.amax
  weight, spec, amax = model.model.layers[0].mlp.up_proj.weight.detach().clone(), quantizer.spec, quantizer.amax.clone()
  expected = logits(model)
  host = TorchHost(model, None)
  assert host.stored("model.layers.0.mlp.up_proj") is None
  tb.compress(model)
  assert_same_bits(logits(model), expected)
  held, q = TorchHost(model, None).stored("model.layers.0.mlp.up_proj"), core.quantize(weight, spec, amax)
  assert held is not None and (held.scale < 0).all() and held.spec == spec and held.shape == blocks.tiling(weight.shape, spec).shape
  assert held.codes.tobytes() == q.codes.numpy().tobytes() and held.scale.tobytes() == q.scale.numpy().tobytes()


def test_other_float_types_later(llama):
  """.half() changes what weights are dequantized to; codes and scales stay."""
  model = tb.compress(quantized(llama, tb.INT8_WEIGHT_ONLY_CFG))
  layer = model.model.layers[0].mlp.up_proj
  before, scale = layer.weight.clone(), layer.packed_weight.scale
  model.half()
  assert layer.weight.dtype == torch.float16 and layer.packed_weight.scale.dtype == torch.float32
  assert torch.equal(layer.packed_weight.scale, scale) and torch.equal(layer.weight, before.half())
  assert logits(model).dtype == torch.float16


def test_shared_weights():
  """A table and a head that quantize one weight alike share its codes; otherwise a warning says that floats remain."""
  weights_on = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}
  model = quantized(tiny_llama(tied=True).eval(), weights_on)
  expected = logits(model)
  tb.compress(model)
  assert model.lm_head.packed_weight is model.model.embed_tokens.packed_weight
  assert_same_bits(logits(model), expected)
  assert len(tb.compression_report(model).weights) == 15
  tb.fold_weight(model)
  assert model.lm_head.weight is model.model.embed_tokens.weight
  assert_same_bits(logits(model), expected)

  model = quantized(tiny_llama(tied=True).eval(), {**weights_on, "quant_cfg": {**weights_on["quant_cfg"], "*embed*": {"enable": False}}})
  with pytest.warns(tb.ConfigWarning, match=r"still held as floats by modules that share them: model.embed_tokens.weight"):
    tb.compress(model)


def test_what_needs_floats_says_so(llama):
  model = tb.compress(quantized(llama, tb.INT8_DEFAULT_CFG))
  calls = {
    "quantize": lambda: tb.quantize(model, tb.INT8_DEFAULT_CFG),
    "auto_quantize": lambda: tb.auto_quantize(model, data_loader=[TOKENS], method="sqnr"),
    "calibration": lambda: tb.calibrate(model, "mse", lambda m: m(TOKENS)),
    "switching weight quantizers": lambda: tb.disable_quantizer(model, "*weight_quantizer"),
    "changing a weight quantizer": lambda: tb.set_quantizer_by_cfg(model, {"*weight_quantizer": {"num_bits": 4}}),
  }
  before = logits(model)
  for what, call in calls.items():
    with pytest.raises(ValueError, match=f"{what} needs float weights, but .* are compressed .*call decompress first"):
      call()
  assert_same_bits(logits(model), before)
  tb.disable_quantizer(model, "*input_quantizer")  # inputs may change
  tb.fold_weight(model)
  assert not tb.is_compressed(model) and "model.layers.0.mlp.up_proj.weight" in model.state_dict()
  tb.quantize(model, tb.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)


def test_refusals():
  """Layers that stay as they are, each with its reason; an error where nothing is left."""
  torch.manual_seed(0)
  model = nn.ModuleDict(
    {"plain": nn.Linear(32, 8), "normed": nn.utils.parametrizations.weight_norm(nn.Linear(32, 8)), "broken": nn.Linear(32, 8)}
  )
  weights_on = {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 32}}}
  tb.quantize(model, {"quant_cfg": weights_on, "algorithm": "max"})
  with torch.no_grad():
    model["broken"].weight[0, 0] = float("nan")
  with pytest.warns(tb.ConfigWarning, match=r"normed: its weight is not a parameter .*; broken: its codes do not stand for"):
    tb.compress(model)
  assert [w.name for w in tb.compression_report(model).compressed] == ["plain"]
  assert torch.isnan(model["broken"].weight[0, 0])
  with pytest.raises(ValueError, match=r"nothing was compressed. normed: its weight is not a parameter"):
    tb.compress(model, "normed")
  with pytest.raises(ValueError, match="no quantized modules"):
    tb.compress(nn.Linear(2, 2))
  tb.decompress(model)
  tb.quantize(model, {"quant_cfg": {"default": {"enable": False}, "plain.weight_quantizer": {"num_bits": 8, "rounding": "stochastic"}}})
  with pytest.raises(ValueError, match="plain: it is rounded stochastically"):
    tb.compress(model)


def test_gradients_reach_inputs_and_biases():
  """A compressed weight is no parameter; everything else trains."""
  torch.manual_seed(0)
  net, x = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), torch.randn(3, 16, requires_grad=True)
  tb.quantize(net, tb.INT8_WEIGHT_ONLY_CFG)
  net(x).sum().backward()
  expected, bias = x.grad.clone(), net[0].bias.grad.clone()
  x.grad = net[0].bias.grad = None
  tb.compress(net).train()
  assert [name for name, _ in net.named_parameters()] == ["0.bias", "1.bias"]
  net(x).sum().backward()
  assert torch.equal(x.grad, expected) and torch.equal(net[0].bias.grad, bias)
