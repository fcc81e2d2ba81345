"""The search on models that are no chain of linear layers in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.search.nets import INT4, classify, features, first, quantized
from tests.torch_backend.models import images, tiny_cnn

INT8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}, "default": {"enable": False}}}
ALL8 = {**INT8, "algorithm": "max"}


def by_autograd(model, data, loss, config, layers):
  """Scores from retained gradients and a plainly quantized model, in float64."""
  twin = quantized(model, config, data, first)
  sums = dict.fromkeys(layers, 0.0)
  for batch in data:
    kept = {}

    def keep(name, kept=kept):
      def hook(_, args, output):
        output.retain_grad()
        kept[name] = (args[0].detach(), output)

      return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    loss(first(model, batch), batch).backward()
    for handle in handles:
      handle.remove()
    for name, (x, y) in kept.items():
      with torch.no_grad():
        sums[name] += float(((y.grad.double() * (twin.get_submodule(name)(x) - y).double()) ** 2).sum())
  return sums


def test_convolutions():
  data = [(images(i), torch.tensor([1, 2, 3])) for i in range(2)]
  model = tiny_cnn()

  def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])

  _, state = classify(model, {"effective_bits": 12}, {"int8": ALL8, "four": INT4, "left": None}, data, loss_func=loss)
  expected = by_autograd(copy.deepcopy(model), data, loss, ALL8, ["conv1", "conv2", "up", "mlp.0"])
  for name, score in expected.items():
    assert state["scores"][name]["int8"] == pytest.approx(score, rel=1e-5), name
  assert state["weights"]["conv2"] == 16 * 4 * 9


class Tagger(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.embed, self.out = nn.Embedding(16, 32), nn.Linear(32, 8)

  def forward(self, ids: torch.Tensor) -> torch.Tensor:
    return self.out(self.embed(ids))


def test_an_embedding_is_a_layer_where_rules_name_it():
  torch.manual_seed(0)
  model = Tagger()
  data = [(torch.randint(0, 16, (4,), generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 2, 3])) for i in range(2)]
  found, state = classify(model, {"effective_bits": 8}, {"four": INT4, "eight": ALL8}, data)
  assert set(state["groups"]) == {"embed", "out"} and all(state["scores"]["embed"].values())
  assert "input_quantizer" not in state["layers"]["embed"]["quantizers"]
  assert found.embed.weight_quantizer.is_enabled and not found.embed.input_quantizer.is_enabled


@pytest.mark.parametrize("method", ["gradient", "kl_div", "hessian", "sqnr"])
def test_bfloat16(method):
  torch.manual_seed(0)
  model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).bfloat16()
  data = [(x.bfloat16(), y) for x, y in features()]
  found, state = classify(
    model, {"effective_bits": 7.5}, {"four": INT4, "eight": ALL8}, data, method=method, loss_func=None if method == "kl_div" else _loss
  )
  wide, expected = classify(
    copy.deepcopy(model).float(),
    {"effective_bits": 7.5},
    {"four": INT4, "eight": ALL8},
    [(x.float(), y) for x, y in data],
    method=method,
    loss_func=_loss,
  )
  assert found[0].weight.dtype == torch.bfloat16 and wide[0].weight.dtype == torch.float32
  if method in ("gradient", "sqnr"):  # products of numbers of 8 bits
    for group, row in expected["scores"].items():
      assert state["scores"][group]["four"] == pytest.approx(row["four"], rel=0.1), group
  assert state["assignment"].keys() == expected["assignment"].keys()


def test_autocast_is_that_of_the_forward_pass():
  """A format that changes next to nothing scores next to nothing, though outputs are rounded to bfloat16."""
  sixteen = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "block_sizes": {-1: 1}}, "default": {"enable": False}}, "algorithm": "max"}

  def step(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
      return model(batch[0])

  torch.manual_seed(0)
  model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
  options = {"forward_step": step, "loss_func": _loss}
  _, state = classify(model, {"effective_bits": 50}, {"exact": sixteen, "four": INT4}, features(), **options)
  for row in state["scores"].values():
    assert row["exact"] < 1e-4 * row["four"]


def _loss(output, batch):
  return nn.functional.cross_entropy(output.float(), batch[1])
