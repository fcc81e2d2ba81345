"""Every whole preset on a tiny Llama and a small CNN: converts, calibrates, runs, compiles without graph breaks."""

import copy

import pytest
import torch

import torch_backend as tb
from tests.torch_backend.models import WHOLE_PRESETS, images, mlp, quietly, tiny_cnn, tiny_llama, tokens

LLAMA, CNN, MLP = tiny_llama(), tiny_cnn(), mlp()


def test_all_34_whole_presets_are_there():
  assert len(WHOLE_PRESETS) == 34


@pytest.mark.parametrize("name", WHOLE_PRESETS)
def test_llama(name):
  model, ids = copy.deepcopy(LLAMA), tokens()
  if name == "NVFP4_EXPERTS_ONLY_CFG":
    with pytest.raises(ValueError, match="quantizes nothing"):
      quietly(model, tb.preset(name), lambda m: m(ids))
    return
  with torch.no_grad():
    plain = model(ids).logits
    quietly(model, tb.preset(name), lambda m: m(ids))
    logits = model(ids).logits
  enabled = [n for n, q in tb.quantizers(model).items() if q.is_enabled]
  assert logits.isfinite().all() and not torch.equal(logits, plain)
  assert enabled and not any(n.startswith("lm_head") and not name.endswith("MHA_CONFIG") for n in enabled)


@pytest.mark.parametrize("name", WHOLE_PRESETS)
def test_cnn_with_dead_channels_and_zero_inputs(name):
  model, x = copy.deepcopy(CNN), images()
  with torch.no_grad():
    model.conv1.weight[2] = 0.0
    model.up.weight[:, 1] = 0.0
    model.mlp[0].weight[:, 5] = 0.0
    model.moe.experts[0].weight.zero_()
    quietly(model, tb.preset(name), lambda m: m(x))
    assert model(x).isfinite().all()
    assert model(torch.zeros_like(x)).isfinite().all()


@pytest.mark.parametrize("name", WHOLE_PRESETS)
def test_calibrated_on_zeros(name):
  model, x = copy.deepcopy(CNN), images()
  with torch.no_grad():
    quietly(model, tb.preset(name), lambda m: m(torch.zeros_like(x)))
    assert model(x).isfinite().all()


COMPILED: set = set()


class Block(torch.nn.Module):
  """A gated layer and an expert behind it, so that every preset finds something."""

  def __init__(self):
    super().__init__()
    self.mlp = torch.nn.Linear(64, 32)
    self.moe = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(32, 24)])})

  def forward(self, x):
    return self.moe["experts"][0](torch.nn.functional.silu(self.mlp(x)))


@pytest.mark.parametrize("name", WHOLE_PRESETS)
def test_compiles_without_graph_breaks(name):
  """Presets that differ in their algorithm only, hence have equal quantizers, are traced once."""
  torch._dynamo.reset()
  model, x = Block(), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
  with torch.no_grad():
    quietly(model, tb.preset(name), lambda m: m(x))
    graph = tuple((n, q.config, q.is_enabled, q.amax is None) for n, q in tb.quantizers(model).items())
    if graph not in COMPILED:
      # The eager backend runs the captured graph with the kernels and in the order of the uncompiled model: equal bits.
      assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
      COMPILED.add(graph)


@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "MXFP4_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_inductor_gives_the_bits_of_eager(name):
  torch._dynamo.reset()
  model, x = copy.deepcopy(MLP), torch.randn(16, 32)
  with torch.no_grad():
    quietly(model, tb.preset(name), lambda m: m(x))
    for quantizer, value in ((model[0].weight_quantizer, model[0].stored_weight.detach()), (model[0].input_quantizer, x)):
      if quantizer.is_enabled:
        assert torch.equal(torch.compile(quantizer, fullgraph=True)(value), quantizer(value))


def test_a_llama_compiles_in_two_graphs_for_all_lengths():
  """One graph for the first length and one for every other: no recompilation per length."""
  torch._dynamo.reset()
  counters = torch._dynamo.utils.counters
  model = copy.deepcopy(LLAMA)
  del model.model.layers[1]
  with torch.no_grad():
    quietly(model, tb.INT8_DEFAULT_CFG, lambda m: m(tokens()))
    counters.clear()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="eager")
    for length in (16, 9, 12, 23):
      ids = tokens(1, 2, length)
      assert torch.equal(compiled(ids), model(ids, use_cache=False).logits)
  assert counters["stats"]["unique_graphs"] <= 2
