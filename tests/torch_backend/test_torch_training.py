"""Gradients through the quantizers, and training: checkpointing, autocast, torch.compile, QAT of a digits net."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import core
import torch_backend as tb
from tests.torch_backend.models import mlp, quietly, tiny_llama, tokens


def gradient(quantizer, x, compiled=False):
  x = x.clone().requires_grad_()
  call = torch.compile(quantizer, fullgraph=True, backend="aot_eager") if compiled else quantizer
  weight = torch.arange(1.0, x.numel() + 1).reshape(x.shape)
  (call(x) * weight).sum().backward()
  return x.grad / weight


def with_amax(attributes, amax):
  quantizer = tb.TensorQuantizer(attributes)
  quantizer.amax = amax
  return quantizer


X = torch.tensor([[-3.0, -2.0, -1.0, 0.0], [0.5, 2.0, 2.0001, 9.0]])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attributes", [{"num_bits": 8}, {"num_bits": (4, 3)}, {"num_bits": 2, "narrow_range": True}])
def test_pass_through_and_clipped(attributes, compiled):
  torch._dynamo.reset()
  assert torch.equal(gradient(with_amax(attributes, 2.0), X, compiled), torch.ones_like(X))
  clipped = with_amax({**attributes, "pass_through_bwd": False}, 2.0)
  assert torch.equal(gradient(clipped, X, compiled), (X.abs() <= 2).float())


def test_clipped_gradients_of_channels_blocks_zero_points_and_dynamic_ones():
  channel = with_amax({"num_bits": 8, "axis": 0, "pass_through_bwd": False}, [[1.0], [3.0]])
  assert torch.equal(gradient(channel, X), (X.abs() <= torch.tensor([[1.0], [3.0]])).float())
  block = with_amax({"num_bits": 8, "block_sizes": {-1: 3}, "pass_through_bwd": False}, [[2.0, 0.5], [1.0, 9.0]])
  limit = torch.tensor([[2.0, 2.0, 2.0, 0.5], [1.0, 1.0, 1.0, 9.0]])
  assert torch.equal(gradient(block, X), (X.abs() <= limit).float())
  asymmetric = with_amax({"num_bits": 8, "zero_point": True, "pass_through_bwd": False}, [-1.0, 2.0])
  assert torch.equal(gradient(asymmetric, X), ((X >= -1) & (X <= 2)).float())
  nvfp4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}, "pass_through_bwd": False}
  assert torch.equal(gradient(with_amax(nvfp4, 2.0), X), (X.abs() <= 2).float())
  for dynamic in (
    {"num_bits": 8, "type": "dynamic"},
    {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
  ):
    assert torch.equal(gradient(tb.TensorQuantizer({**dynamic, "pass_through_bwd": False}), X), torch.ones_like(X))


def test_the_value_is_unchanged_by_recording_gradients():
  quantizer = with_amax({"num_bits": 4}, 2.0)
  assert torch.equal(quantizer(X.clone().requires_grad_()), quantizer(X))


def test_torch_func():
  quantizer = with_amax({"num_bits": 4}, 2.0)
  assert torch.equal(torch.func.grad(lambda x: (quantizer(x) ** 2).sum())(X), 2 * quantizer(X))


def losses(model, ids):
  model.zero_grad()
  loss = F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten())
  loss.backward()
  return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_gradient_checkpointing(preset):
  model, ids = tiny_llama().train(), tokens()
  quietly(model, tb.preset(preset), lambda m: m(ids))
  loss, gradients = losses(model, ids)
  for use_reentrant in (False, True):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again, repeated = losses(model, ids)
    assert torch.equal(loss, again) and gradients.keys() == repeated.keys()
    assert all(torch.equal(g, repeated[n]) for n, g in gradients.items())
  layer, x = model.model.layers[0].mlp, torch.randn(2, 3, 64, requires_grad=True)
  assert torch.equal(checkpoint(layer, x, use_reentrant=False), layer(x))


def test_autocast():
  model, x = mlp().train(), torch.randn(4, 32)
  quietly(model, tb.INT8_DEFAULT_CFG, lambda m: m(x))
  with torch.autocast("cpu", torch.bfloat16):
    y = model[0](x)
    # The quantizers decide in float32; the matmul then casts their results.
    expected = F.linear(core.fake_quantize(x, model[0].input_quantizer.spec, x.abs().max()), model[0].compute_weight(), model[0].bias)
    whole = model(x)
  assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
  y = whole
  y.sum().backward()
  assert model[0].weight.grad.isfinite().all()


def test_a_compiled_training_step_equals_the_eager_one():
  torch._dynamo.reset()
  x = torch.randn(8, 32)
  results = []
  for compiled in (False, True):
    model = mlp().train()
    quietly(model, tb.INT8_DEFAULT_CFG, lambda m: m(x))
    step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
      optimizer.zero_grad()
      step(x).square().mean().backward()
      optimizer.step()
    results.append([p.detach().clone() for p in model.parameters()])
  assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- QAT ---------------------------------------------------------------------------------------------------------------------------

QAT = {
  "quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 2, "axis": 0}, "*input_quantizer": {"num_bits": 8}},
  "algorithm": "max",
}


class Digits(nn.Module):
  def __init__(self):
    super().__init__()
    self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    self.fc1, self.fc2 = nn.Linear(32 * 16, 64), nn.Linear(64, 10)

  def forward(self, x):
    x = F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)
    return self.fc2(F.relu(self.fc1(x)))


def digits():
  datasets = pytest.importorskip("sklearn.datasets")
  data = datasets.load_digits()
  x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
  y = torch.tensor(data.target)
  order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
  return x[order[:1300]], y[order[:1300]], x[order[1300:]], y[order[1300:]]


def train(model, x, y, epochs, rate):
  """The user's own loop: nothing in it knows of quantization."""
  optimizer = torch.optim.Adam(model.parameters(), rate)
  generator = torch.Generator().manual_seed(1)
  model.train()
  for _ in range(epochs):
    for batch in torch.randperm(len(y), generator=generator).split(64):
      optimizer.zero_grad()
      F.cross_entropy(model(x[batch]), y[batch]).backward()
      optimizer.step()
  return model.eval()


@torch.no_grad()
def accuracy(model, x, y):
  return float((model(x).argmax(1) == y).float().mean())


def test_qat_recovers_what_two_bit_weights_lost():
  torch.manual_seed(0)
  x, y, test_x, test_y = digits()
  model = train(Digits(), x, y, epochs=8, rate=3e-3)
  plain = accuracy(model, test_x, test_y)
  tb.quantize(model, QAT, lambda m: m(x[:256]))
  before = accuracy(model, test_x, test_y)
  twin = copy.deepcopy(model)
  train(model, x, y, epochs=6, rate=1e-3)
  after = accuracy(model, test_x, test_y)
  print(f"digits, 497 test images: float {plain:.4f}, 2-bit weights {before:.4f}, after training {after:.4f}")
  assert plain > 0.93 and before < plain - 0.05
  assert plain - after < 0.25 * (plain - before)
  assert len(model.conv2.quantized_weight()[0].unique()) <= 4
  # The control of this test: where the weights get no gradient, as without a straight-through estimator, most of the loss stays.
  for module in twin.modules():
    if isinstance(module, tb.QuantWeight):
      module.stored_weight.requires_grad_(False)
  train(twin, x, y, epochs=6, rate=1e-3)
  assert accuracy(twin, test_x, test_y) < after
