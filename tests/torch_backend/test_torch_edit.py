"""edit, groups, summary, fold and copies of whole models."""

import copy
import json

import pytest
import torch
from torch import nn

import core
import torch_backend as tb
from tests.torch_backend.models import mlp, quietly, tiny_llama, tokens
from tests.torch_backend.test_torch_quantize import FP8, LLAMA, llama

# -- edit --------------------------------------------------------------------------------------------------------------------------


def test_enable_disable_by_pattern_and_function():
  model = llama()
  tb.disable_quantizer(model, "*mlp*input_quantizer")
  assert not model.model.layers[1].mlp.up_proj.input_quantizer.is_enabled and model.model.layers[1].mlp.up_proj.weight_quantizer.is_enabled
  tb.enable_quantizer(model, lambda name: name == "model.layers.1.mlp.up_proj.input_quantizer")
  assert [n for n, q in tb.quantizers(model).items() if q.is_enabled and "mlp" in n and "input" in n] == [
    "model.layers.1.mlp.up_proj.input_quantizer"
  ]
  tb.disable_quantizer(model, "model/layers_1/*")
  assert not any(q.is_enabled for n, q in tb.quantizers(model).items() if ".layers.1." in n)
  with pytest.warns(tb.ConfigWarning, match=r"'\*conv\*' matches no quantizer"):
    tb.disable_quantizer(model, "*conv*")
  with pytest.raises(TypeError, match="pattern"):
    tb.disable_quantizer(model, 3)


def test_set_quantizer_by_cfg():
  model = llama()
  amax = model.model.layers[0].mlp.up_proj.weight_quantizer.amax
  tb.set_quantizer_by_cfg(
    model, {"*layers.1*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}, "*lm_head.weight_quantizer": {"num_bits": 8}}
  )
  assert model.model.layers[0].mlp.up_proj.weight_quantizer.amax is amax
  changed = model.model.layers[1].mlp.up_proj.weight_quantizer
  assert changed.config.describe() == "INT4 block 16" and changed.amax is None
  assert model.lm_head.weight_quantizer.is_enabled
  tb.set_quantizer_by_cfg(model, [{"quantizer_name": "*lm_head*", "enable": False}])
  assert not model.lm_head.weight_quantizer.is_enabled
  tb.set_quantizer_by_cfg(model, {"*layers.0.mlp*weight_quantizer": [{"num_bits": 4, "block_sizes": {-1: 16}}, FP8]})
  assert isinstance(model.model.layers[0].mlp.up_proj.weight_quantizer, tb.SequentialQuantizer)
  with pytest.warns(tb.ConfigWarning, match=r"match no quantizer: '\*o_proj\*nothing'"):
    tb.set_quantizer_by_cfg(model, {"*nowhere": {"enable": False}, "*o_proj*nothing": {"num_bits": 8}})
  with pytest.raises(ValueError, match="num_bit"):
    tb.set_quantizer_by_cfg(model, {"*": {"num_bit": 4}})


# -- groups ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset,static", [("FP8_DEFAULT_CFG", False), ("NVFP4_DEFAULT_CFG", False), ("NVFP4_FOUR_OVER_SIX_CFG", True)])
def test_siblings_share_their_tensor_scale(preset, static):
  shared, alone = llama(preset, algorithm="max"), llama(preset, group_rules=(), algorithm="max")
  for layer, other in zip(shared.model.layers, alone.model.layers, strict=True):
    for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
      parents = (layer.self_attn, other.self_attn) if "q_proj" in members else (layer.mlp, other.mlp)
      for role in ("weight_quantizer", "input_quantizer"):
        together, apart = ([getattr(getattr(p, m), role).tensor_level_amax() for m in members] for p in parents)
        assert len({float(a) for a in together}) == 1 and float(together[0]) == max(map(float, apart))
      if static:  # block amax stay their own, only the second level is shared
        pairs = [[getattr(p, m).weight_quantizer.amax for p in parents] for m in members]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert layer.self_attn.o_proj.weight_quantizer.group is None
  weight = shared.model.layers[0].self_attn.k_proj
  quantizer = weight.weight_quantizer
  tensor_amax = quantizer.tensor_level_amax()
  amax = {"amax": quantizer.amax, "tensor_amax": tensor_amax} if static else {"amax": tensor_amax}
  assert torch.equal(weight.quantized_weight(), core.fake_quantize(weight.stored_weight.detach(), quantizer.spec, **amax))


def test_groups_by_own_rules_and_not_for_int8():
  model = llama("FP8_DEFAULT_CFG", group_rules=["q_proj|o_proj"])
  layer = model.model.layers[0].self_attn
  assert layer.q_proj.weight_quantizer.amax == layer.o_proj.weight_quantizer.amax
  assert layer.k_proj.weight_quantizer.group is None
  assert all(row["group"] is None for row in tb.summary(llama("INT8_DEFAULT_CFG")))
  tb.calibrate(model, "max", lambda m: m(tokens()))
  assert layer.q_proj.weight_quantizer.amax == layer.o_proj.weight_quantizer.amax


def test_recalibration_keeps_the_groups_and_does_not_ratchet():
  model = llama("FP8_DEFAULT_CFG")
  before = {n: q.amax for n, q in tb.quantizers(model).items()}
  tb.calibrate(model, "max", lambda m: m(tokens()))
  assert all(q.amax is None or torch.equal(q.amax, before[n]) for n, q in tb.quantizers(model).items())


# -- summary -----------------------------------------------------------------------------------------------------------------------


def test_summary_as_text_data_and_file(tmp_path, capsys):
  model = llama("FP8_DEFAULT_CFG")
  rows = tb.print_quant_summary(model, tmp_path)
  text = capsys.readouterr().out
  assert text == (tmp_path / "quant_summary.txt").read_text()
  assert len(rows) == 56 and "56 quantizers, 28 enabled" in text and "dB SQNR" in text
  assert json.loads(json.dumps(rows))[0]["name"] == rows[0]["name"]
  row = next(r for r in rows if r["name"] == "model.layers.0.self_attn.k_proj.weight_quantizer")
  assert row["format"] == "E4M3 per tensor" and row["state"] == "calibrated"
  assert row["group"] == "model.layers.0.self_attn.(q_proj|k_proj|v_proj).weight_quantizer" and row["cost_db"] is not None
  assert tb.summary(LLAMA) == []


def test_the_cost_of_sharing_is_measured_against_the_own_scale():
  model = llama("NVFP4_DEFAULT_CFG")
  module = model.model.layers[0].self_attn.k_proj
  weight, spec = module.stored_weight.detach(), module.weight_quantizer.spec
  cost = float(core.sqnr_db(weight, core.fake_quantize(weight, spec))) - float(core.sqnr_db(weight, module.quantized_weight().detach()))
  row = next(r for r in tb.summary(model) if r["name"].endswith("0.self_attn.k_proj.weight_quantizer"))
  assert row["cost_db"] == pytest.approx(cost, abs=1e-9)


def test_summary_on_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr("sys.stdout.isatty", lambda: True)
  tb.print_quant_summary(mlp_quantized())
  out = capsys.readouterr().out
  assert "0.weight_" in out and "6 quantizers, 4 enabled" in out


def mlp_quantized():
  return quietly(mlp(), tb.INT8_DEFAULT_CFG, lambda m: m(torch.ones(2, 32)))


# -- fold, tied weights, copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "preset", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_DEFAULT_CFG"]
)
@torch.no_grad()
def test_folding_changes_no_output(preset):
  model = llama(preset)
  before = model(tokens()).logits
  weight = model.model.layers[0].mlp.up_proj.quantized_weight()
  tb.fold_weight(model)
  module = model.model.layers[0].mlp.up_proj
  assert torch.equal(model(tokens()).logits, before)
  assert torch.equal(module.weight, weight) and not module.weight_quantizer.is_enabled and module.weight_quantizer.amax is None
  tb.fold_weight(model)
  assert torch.equal(model(tokens()).logits, before)


@torch.no_grad()
def test_folding_a_tied_embedding():
  config = {"quant_cfg": {"default": {"enable": False}, "*lm_head.weight_quantizer": {"num_bits": 4, "axis": 0}}, "algorithm": "max"}
  model = tb.quantize(tiny_llama(tied=True), config)
  assert model.lm_head.stored_weight is model.model.embed_tokens.stored_weight
  before = model(tokens()).logits
  with pytest.warns(tb.ConfigWarning, match=r"lm_head\.weight is shared"):
    tb.fold_weight(model)
  assert torch.equal(model(tokens()).logits, before)
  both = {**config, "quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}}}
  model = tb.quantize(tiny_llama(tied=True), both)
  before = model(tokens()).logits
  tb.fold_weight(model)
  assert model.lm_head.stored_weight is model.model.embed_tokens.stored_weight
  assert torch.equal(model(tokens()).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "NVFP4_FOUR_OVER_SIX_CFG", "W4A8_AWQ_BETA_CFG"])
def test_deepcopy_and_state_dict(preset):
  model = llama(preset)
  expected = model(tokens()).logits
  other = copy.deepcopy(model)
  assert torch.equal(other(tokens()).logits, expected)
  tb.disable_quantizer(other, "*")
  assert torch.equal(model(tokens()).logits, expected)
  fresh = quietly(copy.deepcopy(LLAMA), tb.preset(preset))
  fresh.load_state_dict(model.state_dict())
  assert torch.equal(fresh(tokens()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"])
@torch.no_grad()
def test_half_precision_models(preset, dtype):
  model = copy.deepcopy(LLAMA).to(dtype)
  quietly(model, tb.preset(preset), lambda m: m(tokens()))
  assert all(q.amax is None or q.amax.dtype == torch.float32 for q in tb.quantizers(model).values())
  logits = model(tokens()).logits
  assert logits.dtype == dtype and logits.isfinite().all()
  amax = {n: q.amax for n, q in tb.quantizers(model).items()}
  model.float().to(dtype)
  assert all(q.amax is None or torch.equal(q.amax, amax[n]) for n, q in tb.quantizers(model).items())
  assert torch.equal(model(tokens()).logits, logits)


def test_two_models_do_not_disturb_each_other():
  first, second = llama("INT8_DEFAULT_CFG"), llama("NVFP4_DEFAULT_CFG")
  a, b = first(tokens()).logits, second(tokens()).logits
  assert torch.equal(first(tokens()).logits, a) and torch.equal(second(tokens()).logits, b)
  assert type(LLAMA.lm_head) is nn.Linear and not torch.equal(a, b)


def test_a_shared_module_is_converted_once():
  layer = nn.Linear(8, 8)
  model = tb.quantize(nn.Sequential(layer, nn.ReLU(), layer), tb.INT8_DEFAULT_CFG, lambda m: m(torch.ones(2, 8)))
  assert set(tb.quantizers(model)) == {"0.input_quantizer", "0.weight_quantizer", "0.output_quantizer"}
