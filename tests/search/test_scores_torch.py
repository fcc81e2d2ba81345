"""Scores in PyTorch against explicit computations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import core
import torch_backend as tb
from core.search.scores import probe
from tests.search.nets import FORMATS, INT4, classify, cross_entropy, experts, features, first, language, llama_batches, quantized
from tests.torch_backend.models import mlp, tiny_llama
from torch_backend.search_host import effective_weight


def explicit(model, batch, config, data, layer, loss=cross_entropy, step=first):
  """(loss per output element to first order, by central differences in float64), with Q(Y) from a plainly quantized model."""
  twin = quantized(model, config, data, step).get_submodule(layer)
  held = {}

  def replaced(change):
    def hook(module, args, output):
      held["d"] = twin(*args).detach() - output.detach()
      return output if change is None else output + (held["d"].reshape(-1) * change).reshape(output.shape)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
      with torch.no_grad():
        return float(loss(step(model, batch), batch))
    finally:
      handle.remove()

  replaced(None)
  h, slopes = 1e-3, []
  for element in range(held["d"].numel()):
    one = torch.zeros(held["d"].numel(), dtype=held["d"].dtype)
    one[element] = h
    slopes.append((replaced(one) - replaced(-one)) / (2 * h))
  return np.array(slopes)


@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG"])
def test_gradient_scores_are_first_order_loss_changes(config):
  """Central differences of step 1e-3 in float64 err by about 1e-6; 1e-3 is what is asked for."""
  model = mlp().double()
  data = [(x.double(), y) for x, y in features()]
  _, state = classify(model, {"effective_bits": 20}, [config, None], data)
  for layer in ("0", "2"):
    expected = sum(float(np.sum(explicit(model, batch, config, data, layer) ** 2)) for batch in data)
    assert state["scores"][layer][config] == pytest.approx(expected, rel=1e-3)
    assert state["scores"][layer]["none"] == 0


@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_gradient_scores_of_a_language_model_equal_autograd(method):
  """All layers and formats of one backward pass, beside a backward pass with retained gradients and plainly quantized layers."""
  model, data = tiny_llama(), llama_batches()
  _, state = language({"effective_bits": 6}, FORMATS, copy.deepcopy(model), method=method)
  kept = {}
  names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]

  def keep(name):
    def hook(module, args, output):
      output.retain_grad()
      kept[name] = (args[0].detach(), output)

    return hook

  for name in names:
    model.get_submodule(name).register_forward_hook(keep(name))
  twins = {config: quantized(tiny_llama(), config, data, lambda m, b: m(**b)) for config in FORMATS}
  sums = {name: dict.fromkeys(FORMATS, 0.0) for name in names}
  for batch in data:
    model(**batch).loss.backward()
    for name, (x, y) in kept.items():
      for config in FORMATS:
        with torch.no_grad():
          change = y.grad.double() * (twins[config].get_submodule(name)(x) - y).double()
        sums[name][config] += float(((change if method == "gradient" else change.sum(-1)) ** 2).sum())
  assert list(state["layer_scores"]) == names
  for name in names:
    for config in FORMATS:  # products in float32 here, in float64 there; sums over a position's outputs cancel in part
      assert state["layer_scores"][name][config]["sum"] == pytest.approx(sums[name][config], rel=1e-5 if method == "gradient" else 1e-3)
  for group, members in state["groups"].items():
    total = sum(state["layer_scores"][m]["FP8_DEFAULT_CFG"]["sum"] for m in members)
    assert state["scores"][group]["FP8_DEFAULT_CFG"] == pytest.approx(total, rel=1e-12)


class Inplace(nn.Module):
  """Activations that write into the layers' outputs, a layer used twice, and a checkpointed part."""

  def __init__(self, inplace: bool, checkpointed: str = "") -> None:
    super().__init__()
    self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
    self.act = nn.ReLU(inplace=inplace)
    self.checkpointed = checkpointed

  def part(self, x: torch.Tensor) -> torch.Tensor:
    return self.act(self.b(self.act(self.b(x))))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.act(self.a(x))
    x = checkpoint(self.part, x, use_reentrant=self.checkpointed == "reentrant") if self.checkpointed else self.part(x)
    return self.c(x)


@pytest.mark.parametrize(
  "changes", [{"inplace": True}, {"inplace": False, "checkpointed": "plain"}, {"inplace": False, "checkpointed": "reentrant"}]
)
def test_in_place_operations_and_checkpoints_change_no_score(changes):
  torch.manual_seed(0)
  plain = Inplace(False)
  other = Inplace(**changes)
  other.load_state_dict(plain.state_dict())
  _, expected = classify(plain, {"effective_bits": 20}, ["FP8_DEFAULT_CFG", INT4])
  _, found = classify(other, {"effective_bits": 20}, ["FP8_DEFAULT_CFG", INT4])
  assert found["scores"] == expected["scores"]
  assert found["scores"]["b"]["format_1"] > 0


def test_a_step_that_runs_backward_itself_gives_the_same_scores():
  def backward(model, batch):
    cross_entropy(model(batch[0]), batch).backward()

  _, expected = classify(experts(), {"effective_bits": 6}, FORMATS)
  model, found = classify(experts(), {"effective_bits": 6}, FORMATS, loss_func=None, forward_backward_step=backward)
  assert found["scores"] == expected["scores"]
  assert all(p.grad is None for p in model.parameters())


def test_kl_scores_equal_models_with_one_group_quantized():
  model, data = experts(), features()
  _, state = classify(model, {"effective_bits": 6}, ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"], method="kl_div")
  for group, name in (("attn.(q_proj|k_proj)", "NVFP4_DEFAULT_CFG"), ("head", "FP8_DEFAULT_CFG")):
    twin = quantized(model, name, data, first)
    tb.disable_quantizer(twin, lambda q, members=state["groups"][group]: q.rpartition(".")[0] not in members)
    with torch.no_grad():
      expected = sum(float(core.kl_divergence(model(x).numpy(), twin(x).numpy()).sum()) for x, _ in data)
    assert state["scores"][group][name] == pytest.approx(expected, rel=1e-9)


def test_hessian_of_least_squares_is_exact():
  """loss = |X W^T - T|^2 / 2 with X^T X diagonal: v H v = N sum x^2 for every vector of signs, so the score is known."""
  torch.manual_seed(0)
  model = nn.Sequential(nn.Linear(16, 8, bias=False))
  data = [(torch.diag(torch.arange(1.0, 17.0)), torch.randn(16, 8)) for _ in range(2)]

  def loss(y, batch):
    return ((y - batch[1]) ** 2).sum() / 2

  _, state = classify(model, {"effective_bits": 20}, [INT4, None], data, loss_func=loss, method="hessian", num_probes=2)
  weight = model[0].weight.detach().numpy()
  spec = core.QuantSpec.from_attributes({"num_bits": 4, "block_sizes": {-1: 16}})
  noise = float(np.sum((core.fake_quantize(weight, spec).astype(np.float64) - weight) ** 2))
  trace = 8 * float(np.sum(np.arange(1.0, 17.0) ** 2))
  expected = 2 * trace / weight.size * noise / 2  # two batches
  assert state["scores"]["0"]["format_0"] == pytest.approx(expected, rel=1e-5)  # sums of float32


def test_hessian_traces_are_products_with_the_seeded_signs():
  model, data = mlp().double(), [(x.double(), y) for x, y in features(1)]
  held = {}

  def step(m, batch):
    return first(m, batch)

  _, state = classify(model, {"effective_bits": 20}, [INT4, None], data, forward_step=step, method="hessian", seed=7)
  weights = [model[0].weight, model[2].weight]
  vectors = [torch.from_numpy(probe(7, 0, 0, name, w.shape)()).double() for name, w in zip("02", weights, strict=True)]

  def loss(w0, w2):
    held["y"] = nn.functional.linear(torch.relu(nn.functional.linear(data[0][0], w0, model[0].bias)), w2, model[2].bias)
    return cross_entropy(held["y"], data[0])

  products = torch.autograd.functional.hvp(loss, tuple(w.detach() for w in weights), tuple(vectors))[1]
  _, sqnr = classify(model, {"effective_bits": 20}, [INT4, None], data, method="sqnr")
  for name, w, v, p in zip("02", weights, vectors, products, strict=True):
    noise = sqnr["scores"][name]["format_0"] * float((w.detach() ** 2).sum())
    expected = float((v * p).sum()) / w.numel() * noise / 2
    assert state["layer_scores"][name]["format_0"]["mean"] == pytest.approx(expected, rel=1e-9)


def test_signs_are_seeded_and_balanced():
  v = probe(0, 1, 2, "layers.0", (64, 64))()
  assert v.dtype == np.float32 and set(np.unique(v)) == {-1.0, 1.0}
  assert abs(v.mean()) < 5 / 64  # five standard errors
  assert np.array_equal(v, probe(0, 1, 2, "layers.0", (64, 64))())
  assert not np.array_equal(v, probe(0, 1, 2, "layers.1", (64, 64))())


def test_sqnr_is_noise_over_signal_of_the_weights():
  model = mlp()
  _, state = classify(model, {"effective_bits": 6}, [INT4, "INT8_DEFAULT_CFG"], method="sqnr", data=features(1))
  for layer in ("0", "2"):
    weight = model.get_submodule(layer).weight.detach().numpy()
    spec = core.QuantSpec.from_attributes({"num_bits": 8, "axis": 0})
    expected = 10 ** (-core.sqnr_db(weight, core.fake_quantize(weight, spec)) / 10)
    assert state["scores"][layer]["INT8_DEFAULT_CFG"] == pytest.approx(expected, rel=1e-6)
  assert state["batches"] == 0 and state["layer_scores"]["0"]["format_0"]["std"] == 0


@pytest.mark.parametrize("algorithm", ["max", "awq_lite", {"method": "svdquant", "lowrank": 4}, "smoothquant"])
def test_the_effective_weight_is_what_a_layer_multiplies_its_input_with(algorithm):
  x = features(1)[0][0]
  config = {
    "quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}, "*input_quantizer": {"num_bits": 8}},
    "algorithm": algorithm,
  }
  layer = quantized(nn.Sequential(nn.Linear(32, 16, bias=False)), config, [(x,)], first)[0]
  layer.input_quantizer.disable_quant()
  with torch.no_grad():
    expected, found = layer(x), x @ effective_weight(layer).T
  # Scaled before or after the product, a float32 sum of 32 terms.
  assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
