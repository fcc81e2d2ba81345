"""quantize and calibrate on whole models, and what errors leave behind."""

import copy
import warnings

import pytest
import torch
from torch import nn

import core
import torch_backend as tb
from tests.torch_backend.models import WHOLE_PRESETS, mlp, quietly, tiny_cnn, tiny_llama, tokens

LLAMA = tiny_llama()
FP8 = {"num_bits": (4, 3), "axis": None}


def llama(preset="INT8_DEFAULT_CFG", algorithm=None, **kwargs):
  model, ids = copy.deepcopy(LLAMA), tokens()
  config = tb.preset(preset) if algorithm is None else tb.preset(preset) | {"algorithm": algorithm}
  return quietly(model, config, lambda m: m(ids), **kwargs)


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
  expected |= {f"model.layers.{layer}.self_attn.{role}_bmm_quantizer" for layer in range(2) for role in "qkvp"}
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
  """Max-calibrated, every quantized weight equals core.fake_quantize on numpy; without groups, with no amax at all."""
  if preset == "NVFP4_EXPERTS_ONLY_CFG":
    return
  compared = 0
  for module in llama(preset, group_rules=(), algorithm="max").modules():
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
