"""Saving and restoring torch models: types, shared parameters, switches, refusals, and the checkpoints of training."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import torch_backend as tb
from core.state import DOCUMENT
from tests.state import nets
from tests.torch_backend.models import images, quietly, tiny_cnn, tiny_llama, tokens
from torch_backend.state import state_of

OFF = {"default": {"enable": False}}
INT8 = {"quant_cfg": {**OFF, "*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}


def snapshot(model: nn.Module) -> dict[str, object]:
  """Everything by which a changed model would show: classes, objects, values, settings."""
  held = {f"class {n}": type(m) for n, m in model.named_modules()}
  held |= {f"id {n}": id(p) for n, p in model.named_parameters()}
  held |= {f"value {n}": t.detach().clone() for n, t in model.state_dict().items()}
  return held | {f"quantizer {n}": repr(q) for n, q in tb.quantizers(model).items()}


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
  after = snapshot(model)
  assert list(after) == list(before)
  for name, value in before.items():
    assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


def test_training_of_a_restored_model_goes_on_with_the_same_parameters(tmp_path):
  net = nets.quantized_torch(INT8)
  tb.save(net, tmp_path)
  other = nets.torch_net(seed=3)
  optimizer = torch.optim.SGD(other.parameters(), 0.1)
  before = {name: id(p) for name, p in other.named_parameters()}
  tb.restore(other, tmp_path)
  assert {name: id(p) for name, p in other.named_parameters()} == before
  other(torch.from_numpy(nets.data())).square().mean().backward()
  optimizer.step()
  assert not np.array_equal(nets.torch_output(other), nets.torch_output(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept(dtype, tmp_path):
  net = nets.quantized_torch({**tb.preset("NVFP4_SVDQUANT_DEFAULT_CFG"), "algorithm": {"method": "svdquant", "lowrank": 2}}).to(dtype)
  tb.save(net, tmp_path)
  other = tb.restore(nets.torch_net(seed=3).to(dtype), tmp_path)
  nets.assert_same_state(state_of(net), state_of(other))
  assert np.array_equal(nets.torch_output(other), nets.torch_output(net))


class OddTypes(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.fc = nn.Linear(8, 4)
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("e8m0", torch.float8_e8m0fnu)):
      self.register_buffer(name, torch.arange(256, dtype=torch.uint8).view(dtype))
    self.register_buffer("signed", torch.arange(-128, 128).to(torch.int8))
    self.register_buffer("flags", torch.tensor([True, False]))
    self.register_buffer("count", torch.tensor(2**40))
    self.register_buffer("nothing", torch.empty(0, 3))
    self.register_buffer("passing", torch.ones(2), persistent=False)

  def forward(self, x):
    return self.fc(x)


def test_buffers_of_every_type_and_none_that_are_not_persistent(tmp_path):
  model = OddTypes()
  quietly(model, INT8, lambda m: m(torch.ones(2, 8)))
  tb.save(model, tmp_path)
  other = OddTypes()
  for name, buffer in other.named_buffers():
    if name != "passing":
      empty = torch.zeros(buffer.numel() * buffer.element_size(), dtype=torch.uint8)
      other._buffers[name] = empty.view(buffer.dtype).reshape(buffer.shape)
  tb.restore(other, tmp_path)
  nets.assert_same_state(state_of(model), state_of(other))
  assert "passing" not in state_of(model).tensors and "e4m3" in state_of(model).tensors


def test_convolutions_norms_and_running_statistics(tmp_path):
  model = quietly(tiny_cnn(), {**INT8, "quant_cfg": {**INT8["quant_cfg"], "*bn*": {"enable": False}}}, lambda m: m(images()))
  model.train()
  model(images(5))
  model.eval()
  tb.save(model, tmp_path)
  other = tb.restore(tiny_cnn(1), tmp_path)
  assert torch.equal(model(images(2)), other(images(2)))
  assert torch.equal(other.bn.running_mean, model.bn.running_mean) and int(other.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("state", ["folded", "off", "pass", "some"])
def test_switches(state, tmp_path):
  net = nets.quantized_torch(tb.preset("W4A8_AWQ_BETA_CFG") | {"algorithm": "max"})
  if state == "folded":
    tb.fold_weight(net)
  elif state == "off":
    tb.disable_quantizer(net, "*")
  elif state == "some":
    tb.disable_quantizer(net, "*up_proj*")
  else:
    for quantizer in tb.quantizers(net).values():
      for one in quantizer.quantizers if isinstance(quantizer, tb.SequentialQuantizer) else (quantizer,):
        one.disable_quant()
  tb.save(net, tmp_path)
  other = tb.restore(nets.torch_net(seed=3), tmp_path)
  assert np.array_equal(nets.torch_output(other), nets.torch_output(net))
  nets.assert_same_state(state_of(net), state_of(other))
  tb.enable_quantizer(net, "*input_quantizer")
  tb.enable_quantizer(other, "*input_quantizer")
  assert np.array_equal(nets.torch_output(other), nets.torch_output(net))


def test_rotation_bias_histogram_and_zero_point(tmp_path):
  quant_cfg = {
    **OFF,
    "*q_proj.weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}, "rotate": {"enable": True, "seed": 3, "block_size": 16}},
    "*q_proj.input_quantizer": {"num_bits": 8, "rotate": {"enable": True, "seed": 3, "block_size": 16}},
    "*k_proj.weight_quantizer": {"format": "nf4_double"},
    "*k_proj.input_quantizer": {"num_bits": 8, "bias": {-1: None, "type": "static"}},
    "*v_proj.input_quantizer": {"num_bits": 8, "calibrator": ["histogram", {"method": "percentile", "percentile": 99.0}]},
    "*head.input_quantizer": {"num_bits": 8, "zero_point": True},
    "*head.weight_quantizer": {"num_bits": 8, "axis": 0, "zero_point": True},
    "*o_proj.input_quantizer": {"num_bits": (4, 3), "use_constant_amax": True},
  }
  net = nets.quantized_torch({"quant_cfg": quant_cfg, "algorithm": "max"})
  tb.save(net, tmp_path)
  other = tb.restore(nets.torch_net(seed=3), tmp_path)
  nets.assert_same_state(state_of(net), state_of(other))
  assert np.array_equal(nets.torch_output(other), nets.torch_output(net))


def test_stochastic_rounding_goes_on_where_it_was(tmp_path):
  quant_cfg = {**OFF, "*weight_quantizer": {"format": "nvfp4", "rounding": "stochastic"}}
  net = nets.quantized_torch({"quant_cfg": quant_cfg, "algorithm": "max"})
  net.train()
  first = nets.torch_output(net)
  tb.save(net, tmp_path)
  other = tb.restore(nets.torch_net(seed=3).train(), tmp_path)
  expected = nets.torch_output(net)
  assert np.array_equal(nets.torch_output(other), expected) and not np.array_equal(first, expected)


def test_a_shared_parameter_stays_one_and_is_stored_once(tmp_path):
  model = quietly(tiny_llama(tied=True), INT8, lambda m: m(tokens()))
  tb.save(model, tmp_path)
  assert json.loads((tmp_path / DOCUMENT).read_text())["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
  other = tb.restore(tiny_llama(1, tied=True), tmp_path)
  assert other.lm_head._parameters["weight"] is other.model.embed_tokens._parameters["weight"]
  assert torch.equal(other(tokens()).logits, model(tokens()).logits)
  untied = tb.restore(tiny_llama(1, tied=False), tmp_path)
  assert torch.equal(untied(tokens()).logits, model(tokens()).logits)


def test_a_parameter_that_calibration_made_its_own_is_not_shared_after_restoring(tmp_path):
  model = tiny_llama(tied=True)
  quant_cfg = {**OFF, "*lm_head.weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 32}}}
  quietly(model, {"quant_cfg": quant_cfg, "algorithm": {"method": "gptq"}}, lambda m: m(tokens()))
  assert model.lm_head.stored_weight is not model.model.embed_tokens.stored_weight
  tb.save(model, tmp_path)
  other = tb.restore(tiny_llama(1, tied=True), tmp_path)
  assert torch.equal(other(tokens()).logits, model(tokens()).logits)
  assert other.config.tie_word_embeddings is False


def test_config_metadata_and_versions_are_kept(tmp_path):
  config = copy.deepcopy(INT8)
  net = nets.quantized_torch(config)
  config["quant_cfg"]["*weight_quantizer"]["num_bits"] = 2  # later changes of the caller's dict do not count
  tb.save(net, tmp_path, metadata={"text_sha256": "abc", "perplexity": 20.53})
  held = json.loads((tmp_path / DOCUMENT).read_text())
  assert held["config"] == INT8 and held["metadata"] == {"text_sha256": "abc", "perplexity": 20.53}
  assert held["versions"]["torch"] == torch.__version__ and held["backend"] == "torch"
  other = tb.restore(nets.torch_net(), tmp_path)
  tb.save(other, tmp_path)
  assert json.loads((tmp_path / DOCUMENT).read_text())["config"] == INT8


# -- what does not fit ---------------------------------------------------------------------------------------------------------------


class Wider(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.layers = nn.ModuleList([nets.TorchLayer()])
    self.head = nn.Linear(nets.WIDTH, nets.OUT + 1)
    self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
  "make, words",
  [
    (Wider, ["extra.weight", r"head.weight \(saved \[16, 32\], model \[17, 32\]\)"]),
    (lambda: nets.torch_net(layers=2), ["lacks 11 of the model's tensors", "layers.1.self_attn.q_proj.weight"]),
    (lambda: nn.Sequential(nn.Linear(2, 2)), ["holds 13 tensors that the model has not: ", "and 7 more"]),
    (lambda: nets.torch_net().double(), ["13 tensors of another type", r"\(saved F32, model F64\)", "adopt_dtype=True"]),
  ],
)
@pytest.mark.parametrize("already", [False, True])
def test_another_model_is_refused_and_left_as_it_was(make, words, already, tmp_path):
  tb.save(nets.quantized_torch(INT8), tmp_path)
  model = make()
  if already and isinstance(model, nets.TorchNet):
    quietly(model, INT8, lambda m: m(torch.from_numpy(nets.data()).to(next(m.parameters()).dtype)))
  before = snapshot(model)
  for word in words:
    with pytest.raises(ValueError, match=word):
      tb.restore(model, tmp_path)
  assert_unchanged(model, before)


def test_another_type_may_be_adopted(tmp_path):
  net = nets.quantized_torch(INT8, dtype=torch.bfloat16)
  tb.save(net, tmp_path)
  other = tb.restore(nets.torch_net(seed=3), tmp_path, adopt_dtype=True)
  assert next(other.parameters()).dtype == torch.bfloat16
  nets.assert_same_state(state_of(net), state_of(other))


def test_what_cannot_be_saved(tmp_path):
  with pytest.raises(ValueError, match="no quantized modules; call quantize"):
    tb.save(nets.torch_net(), tmp_path)
  net = nets.quantized_torch(INT8)
  with pytest.raises(ValueError, match=r"metadata\['x'\] is \{1\} \(set\)"):
    tb.save(net, tmp_path, metadata={"x": {1}})
  net.head.input_quantizer.enable_calib()
  with pytest.raises(ValueError, match=r"'head.input_quantizer' is collecting statistics"):
    tb.save(net, tmp_path)
  net.head.input_quantizer.disable_calib()
  net.register_buffer("odd", torch.zeros(2, dtype=torch.complex64))
  with pytest.raises(ValueError, match=r"'odd' is of type torch.complex64"):
    tb.save(net, tmp_path)
  assert not list(tmp_path.iterdir())
  with pytest.raises(FileNotFoundError, match=f"no {DOCUMENT}"):
    tb.restore(net, tmp_path)
  with pytest.raises(TypeError, match=r"takes an nn\.Module"):
    tb.restore({}, tmp_path)  # type: ignore[arg-type]


# -- checkpoints of training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG", "W4A8_AWQ_BETA_CFG"])
def test_state_dict(name, tmp_path):
  config = {**tb.preset(name), "algorithm": {"method": "svdquant", "lowrank": 2} if "SVD" in name else "max"}
  net = nets.quantized_torch(config)
  torch.save(net.state_dict(), tmp_path / "checkpoint.pt")
  held = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
  tb.save(net, tmp_path / "formats")
  other = tb.restore(nets.torch_net(seed=3), tmp_path / "formats")  # formats and switches; later values come from the state dict
  with torch.no_grad():
    for parameter in other.parameters():
      parameter.zero_()
  other.load_state_dict(held, strict=True)
  assert np.array_equal(nets.torch_output(other), nets.torch_output(net))
  fresh = nets.torch_net(seed=4)  # the same configuration without calibration will do as well
  quietly(fresh, {**config, "algorithm": None})
  fresh.load_state_dict(held, strict=True)
  assert np.array_equal(nets.torch_output(fresh), nets.torch_output(net))


def test_distributed_checkpoint(tmp_path):
  from torch.distributed import checkpoint

  net = nets.quantized_torch({**tb.preset("NVFP4_DEFAULT_CFG"), "algorithm": "max"})
  checkpoint.save({"model": net.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
  other = nets.quantized_torch({**tb.preset("NVFP4_DEFAULT_CFG"), "algorithm": "max"}, seed=3)
  held = {"model": other.state_dict()}
  assert not np.array_equal(nets.torch_output(other), nets.torch_output(net))
  checkpoint.load(held, checkpoint_id=tmp_path, no_dist=True)
  other.load_state_dict(held["model"])
  assert np.array_equal(nets.torch_output(other), nets.torch_output(net))
