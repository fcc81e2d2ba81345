"""quantize, calibrate, edit, groups, summary and fold on whole models."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import core
import torch_backend as tb
from tests.torch_backend.models import WHOLE_PRESETS, mlp, quietly, tiny_cnn, tiny_llama, tokens

LLAMA = tiny_llama()
FP8 = {"num_bits": (4, 3), "axis": None}


def llama(preset="INT8_DEFAULT_CFG", **kwargs):
  model, ids = copy.deepcopy(LLAMA), tokens()
  return quietly(model, tb.preset(preset), lambda m: m(ids), **kwargs)


def state(model: nn.Module) -> dict:
  """Everything that must be as before: classes, attributes by identity, parameter bytes."""
  attributes = {
    name: (type(m), {k: id(v) for k, v in m.__dict__.items() if not isinstance(v, dict)}, list(m._modules), list(m._buffers))
    for name, m in model.named_modules()
  }
  return {"attributes": attributes, "values": {k: v.clone() for k, v in model.state_dict().items()}}


def same(a: dict, b: dict) -> bool:
  return a["attributes"] == b["attributes"] and all(torch.equal(v, b["values"][k]) for k, v in a["values"].items())


# -- names and rules ---------------------------------------------------------------------------------------------------------------


def test_names_follow_the_modules():
  model = llama()
  names = tb.quantizers(model)
  linears = [name for name, m in LLAMA.named_modules() if isinstance(m, nn.Linear)]
  assert len(linears) == 15
  expected = {f"{n}.{q}" for n in [*linears, "model.embed_tokens"] for q in ("input_quantizer", "weight_quantizer", "output_quantizer")}
  assert set(names) == expected
  enabled = {name for name, q in names.items() if q.is_enabled}
  assert len(enabled) == 28 and not any("lm_head" in n or "embed" in n or "output" in n for n in enabled)
  assert all(q.name == name for name, q in names.items())
  assert tb.is_quantized(model) and not tb.is_quantized(LLAMA)


def test_quantize_is_in_place_and_keeps_parameters():
  model, ids = copy.deepcopy(LLAMA), tokens()
  parameters = dict(model.named_parameters())
  assert tb.quantize(model, tb.INT8_DEFAULT_CFG, lambda m: m(ids)) is model
  assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
  assert all(torch.equal(p, q) for p, q in zip(model.parameters(), LLAMA.parameters(), strict=True))


def test_list_form_dict_form_and_preset_name_agree():
  listed = {
    "quant_cfg": [
      {"quantizer_name": "*", "enable": False},
      {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 16}}},
      {"quantizer_name": "*mlp*weight_quantizer", "enable": False},
      {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
      {"quantizer_name": "*lm_head*", "enable": False},
    ],
    "algorithm": "max",
  }
  written = {
    "quant_cfg": {
      "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}, "enable": True},
      "*mlp*weight_quantizer": {"enable": False},
      "nn.Embedding": {"*": {"enable": False}},
      "*lm_head*": {"enable": False},
      "default": {"enable": False},
    },
    "algorithm": {"method": "max"},
  }
  first, second = (tb.quantize(copy.deepcopy(LLAMA), c) for c in (listed, written))
  on = [{n: q.config for n, q in tb.quantizers(m).items() if q.is_enabled} for m in (first, second)]
  assert on[0] == on[1] and len(on[0]) == 8
  assert torch.equal(first(tokens()).logits, second(tokens()).logits)


def test_editing_a_copy_of_a_preset():
  config = tb.INT8_DEFAULT_CFG.copy()
  config["quant_cfg"]["*input_quantizer"]["enable"] = False
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    model = tb.quantize(copy.deepcopy(LLAMA), config)
  assert not any(q.is_enabled for n, q in tb.quantizers(model).items() if n.endswith("input_quantizer"))
  assert any(q.is_enabled for n, q in tb.quantizers(llama()).items() if n.endswith("input_quantizer"))


def test_a_root_module_can_be_quantized():
  layer = tb.quantize(nn.Linear(8, 4), tb.INT8_WEIGHT_ONLY_CFG)
  assert set(tb.quantizers(layer)) == {"input_quantizer", "output_quantizer", "weight_quantizer"}


def test_w4a8_is_sequential():
  model = llama("W4A8_AWQ_BETA_CFG")
  quantizer = tb.quantizers(model)["model.layers.0.mlp.up_proj.weight_quantizer"]
  assert isinstance(quantizer, tb.SequentialQuantizer) and [q.name[-2:] for q in quantizer] == [".0", ".1"]
  weight = model.model.layers[0].mlp.up_proj.stored_weight
  inner = core.fake_quantize(weight.detach(), quantizer[0].spec)
  assert torch.equal(quantizer[1].own_tensor_amax * torch.ones(()), inner.abs().max())
  quietly(model, tb.INT8_WEIGHT_ONLY_CFG)
  assert isinstance(tb.quantizers(model)["model.layers.0.mlp.up_proj.weight_quantizer"], tb.TensorQuantizer)


def test_quantizing_again_starts_over():
  again = quietly(llama("NVFP4_DEFAULT_CFG"), tb.FP8_DEFAULT_CFG, lambda m: m(tokens()))
  assert torch.equal(again(tokens()).logits, llama("FP8_DEFAULT_CFG")(tokens()).logits)


# -- bits --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", WHOLE_PRESETS)
@torch.no_grad()
def test_weights_are_cores_on_numpy(preset):
  """Every quantized weight equals core.fake_quantize on numpy with the model's amax; without groups, with no amax at all."""
  if preset == "NVFP4_EXPERTS_ONLY_CFG":
    return
  compared = 0
  for module in llama(preset, group_rules=()).modules():
    if isinstance(module, tb.QuantWeight) and module.weight_quantizer.is_enabled:
      quantizer = module.weight_quantizer
      value = module.stored_weight.numpy()
      for config in quantizer.config if isinstance(quantizer.config, tuple) else (quantizer.config,):
        value = core.fake_quantize(value, config.spec)
      assert torch.equal(module.quantized_weight(), torch.from_numpy(value))
      compared += value.size
  print(f"{preset}: {compared} values compared")
  assert compared > 0


# -- calibration -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_activations_are_calibrated_on_the_float_model():
  """Whatever the format of the layers before, amax is that of the unquantized model."""
  batches = [tokens(i) for i in range(3)]
  seen = {}

  def record(name):
    def hook(module, args):
      seen[name] = max(seen.get(name, 0.0), float(args[0].abs().max()))

    return hook

  plain = copy.deepcopy(LLAMA)
  for name, module in plain.named_modules():
    if isinstance(module, nn.Linear):
      module.register_forward_pre_hook(record(name))
  model = copy.deepcopy(LLAMA)
  tb.quantize(model, tb.INT8_DEFAULT_CFG, lambda m: [m(b) for b in batches])
  for batch in batches:
    plain(batch)
  amax = {n.removesuffix(".input_quantizer"): float(q.amax) for n, q in tb.quantizers(model).items() if "input" in n and q.is_enabled}
  assert amax and all(amax[name] == seen[name] for name in amax)


def test_training_flags_are_restored_and_calibration_is_in_evaluation():
  model, flags = tiny_cnn(), []
  model.train()
  model.bn.eval()
  tb.quantize(model, tb.INT8_DEFAULT_CFG, lambda m: (flags.append((m.training, torch.is_grad_enabled())), m(torch.randn(2, 3, 12, 12))))
  assert flags == [(False, False)]
  assert model.training and model.conv1.training and model.conv1.weight_quantizer.training and not model.bn.training
  assert torch.equal(model.bn.running_mean, torch.zeros(8))


def test_static_activations_without_data_warn_by_name_and_act_dynamically():
  model, x = mlp(), torch.randn(4, 32)
  with pytest.warns(
    tb.ConfigWarning, match=r"2 static activation quantizers have no amax \(no forward_loop ran\).*0\.input_quantizer, 2\.input"
  ):
    tb.quantize(model, tb.INT8_DEFAULT_CFG)
  assert torch.equal(model[0].input_quantizer(x), core.fake_quantize(x, core.QuantSpec.named("int8")))
  with pytest.warns(tb.ConfigWarning, match=r"1 static .*never reached them.*: 2\.input_quantizer"):
    tb.calibrate(model, "max", lambda m: m[0](x))
  tb.calibrate(model, "max", lambda m: m(x))
  assert model[2].input_quantizer.amax is not None


def test_calibrating_again():
  model, x = mlp(), torch.randn(4, 32)
  tb.quantize(model, tb.INT8_DEFAULT_CFG, lambda m: m(x))
  before = model[0].input_quantizer.amax
  with torch.no_grad():
    model[0].weight.mul_(3)
  tb.calibrate(model, "max", lambda m: m(2 * x))
  assert torch.equal(model[0].input_quantizer.amax, 2 * before)
  assert torch.equal(model[0].weight_quantizer.amax, model[0].weight.detach().abs().amax(1, keepdim=True))
  tb.calibrate(model, None)
  with pytest.raises(ValueError, match=r"not quantized|no quantized modules"):
    tb.calibrate(mlp())
  with pytest.raises(ValueError, match="algorithm"):
    tb.calibrate(model, "maximum")


def test_unimplemented_algorithms_say_so():
  with pytest.warns(tb.ConfigWarning, match="'some_new_method'|'svdquant' is not implemented; calibrating with 'max'"):
    tb.quantize(mlp(), tb.NVFP4_SVDQUANT_DEFAULT_CFG, lambda m: m(torch.randn(2, 32)))


def test_register_algorithm():
  seen = {}

  @tb.register_algorithm("half_of_max", options=("factor",))
  def half(model, forward_loop, factor=0.5):
    seen.update(training=model.training, grad=torch.is_grad_enabled())
    tb.max_calibrate(model, forward_loop)
    for quantizer in tb.quantizers(model).values():
      if quantizer.amax is not None:
        quantizer.amax = quantizer.amax * factor

  model, x = mlp(), torch.randn(4, 32)
  tb.quantize(model, {**tb.INT8_DEFAULT_CFG, "algorithm": {"method": "half_of_max", "factor": 0.25}}, lambda m: m(x))
  assert torch.equal(model[0].input_quantizer.amax, x.abs().max() / 4) and seen == {"training": False, "grad": False}


# -- errors leave the model as it was ------------------------------------------------------------------------------------------------


def bad_loop(model):
  raise RuntimeError("data server is down")


@pytest.mark.parametrize(
  "config,loop,error,message",
  [
    (tb.INT8_DEFAULT_CFG, lambda m: m(torch.full((2, 32), float("nan"))), ValueError, r"0\.input_quantizer.*64 NaN"),
    (tb.INT8_DEFAULT_CFG, lambda m: m(torch.full((2, 32), float("inf"))), ValueError, r"0\.input_quantizer.*64 infinite"),
    (tb.INT8_DEFAULT_CFG, bad_loop, RuntimeError, "data server"),
    (tb.INT8_DEFAULT_CFG, 3, TypeError, "function of the model"),
    ({"quant_cfg": {"*weight_quantizer": {"num_bits": 9}}}, None, ValueError, "num_bits is 9"),
    ({"quant_cfg": {"*nowhere*": {"num_bits": 8}}}, None, ValueError, "quantizes nothing"),
    ({"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 7}, "pad": False}}, "algorithm": "max"}, None, ValueError,
     r"block size 7 does not divide axis -1 of length 32"),
  ],
)  # fmt: skip
@pytest.mark.parametrize("quantized", [False, True])
def test_after_an_error_the_model_is_as_before(config, loop, error, message, quantized):
  model = mlp().train()
  if quantized:
    quietly(model, tb.FP8_DEFAULT_CFG, lambda m: m(torch.ones(2, 32)))
  before, x = state(model), torch.randn(3, 32)
  output = model(x)
  with pytest.raises(error, match=message):
    tb.quantize(model, config, loop)
  assert same(before, state(model))
  assert torch.equal(model(x), output)


def test_an_error_in_calibrate_leaves_the_statistics():
  model = mlp()
  tb.quantize(model, tb.INT8_DEFAULT_CFG, lambda m: m(torch.ones(2, 32)))
  before = state(model)
  with pytest.raises(RuntimeError):
    tb.calibrate(model, "max", bad_loop)
  assert same(before, state(model))


def test_wrong_arguments():
  with pytest.raises(TypeError, match=r"nn\.Module, got list"):
    tb.quantize([1], tb.INT8_DEFAULT_CFG)
  with pytest.raises((TypeError, ValueError), match=r"quant_cfg|config"):
    tb.quantize(mlp(), {})


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
  shared, alone = llama(preset), llama(preset, group_rules=())
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
  assert len(rows) == 48 and "48 quantizers, 28 enabled" in text and "dB SQNR" in text
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
