"""Every whole preset on a tiny Llama and a small CNN: converts, calibrates, runs, compiles without graph breaks."""

import copy

import pytest
import torch
from tests.torch_backend.models import WHOLE_PRESETS, images, mlp, quietly, tiny_cnn, tiny_llama, tokens

import torch_backend as tb
from torch_backend.sequential import tensor_quantizers

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


@pytest.mark.parametrize("name", WHOLE_PRESETS)
def test_compiles_without_graph_breaks(name):
  """One graph for the whole model; each quantizer, compiled alone by inductor's front end, gives the bits of eager."""
  torch._dynamo.reset()
  model, ids = copy.deepcopy(LLAMA.model.layers[0].mlp), torch.randn(2, 5, 64)
  experts = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(64, 24)])})
  block = torch.nn.ModuleDict({"mlp": model, "moe": experts})
  run = lambda m, x: m["moe"]["experts"][0](m["mlp"](x))  # noqa: E731
  with torch.no_grad():
    quietly(block, tb.preset(name), lambda m: run(m, ids))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(block, ids), run(block, ids))  # aot_eager runs the same kernels in the same order
    for quantizer in tb.quantizers(block).values():
      if quantizer.is_enabled:
        x = torch.randn(24, 128) if "weight" in tensor_quantizers(quantizer)[0].name else torch.randn(3, 5, 128)
        for one in tensor_quantizers(quantizer):
          one.reset_amax()
        assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x), quantizer(x))
        break


@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_inductor_gives_the_bits_of_eager(name):
  torch._dynamo.reset()
  model, x = copy.deepcopy(MLP), torch.randn(16, 32)
  with torch.no_grad():
    quietly(model, tb.preset(name), lambda m: m(x))
    for quantizer, value in ((model[0].weight_quantizer, model[0].stored_weight.detach()), (model[0].input_quantizer, x)):
      if quantizer.is_enabled:
        assert torch.equal(torch.compile(quantizer, fullgraph=True)(value), quantizer(value))


@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"])
def test_a_whole_llama_compiles_in_one_graph_at_several_lengths(name):
  torch._dynamo.reset()
  model = copy.deepcopy(LLAMA)
  with torch.no_grad():
    quietly(model, tb.preset(name), lambda m: m(tokens()))
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    for length in (16, 9, 12, 23, 31):
      assert torch.equal(compiled(tokens(1, 2, length)), model(tokens(1, 2, length), use_cache=False).logits)
