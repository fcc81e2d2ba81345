"""What auto_quantize refuses in PyTorch, by name, and that the model is then as it was."""

from __future__ import annotations

import pytest
import torch

import torch_backend as tb
from tests.search.nets import FORMATS, INT4, classify, cross_entropy, experts, features, first


def nan_gradient(y, batch):
  """Finite, with a gradient that is not: the root's slope at 0."""
  return torch.sqrt((y * 0).sum())


FAULTS = {
  "unreachable": ({"constraints": {"effective_bits": 4.5}}, r"effective_bits of 4.5 cannot be reached: the least possible is 4\.5\d+, "),
  "unknown constraint": (
    {"constraints": {"effective_bit": 5}},
    r"unknown constraint 'effective_bit'; allowed are 'effective_bits', 'weight_bytes'",
  ),
  "no constraint": ({"constraints": {}}, r"no constraint; allowed are"),
  "nothing quantized": (
    {"formats": ["FP8_DEFAULT_CFG", {"quant_cfg": {"*nowhere*weight_quantizer": {"num_bits": 8}}}]},
    r"format 'format_1' quantizes nothing: none of its rules",
  ),
  "no format": ({"formats": [None]}, r"holds no format to quantize to"),
  "twice": ({"formats": ["FP8_DEFAULT_CFG", tb.FP8_DEFAULT_CFG]}, r"names 'FP8_DEFAULT_CFG' twice"),
  "whole algorithm": (
    {"formats": [{**INT4, "algorithm": "rotate"}]},
    r"format 'format_0' uses algorithm 'rotate', which changes several layers",
  ),
  "independent loss": ({"loss_func": lambda y, b: torch.zeros(())}, r"batch 0 does not depend on the parameters of any layer"),
  "detached loss": ({"loss_func": lambda y, b: y.detach().sum()}, r"batch 0 does not depend on the parameters of any layer"),
  "detached input": (
    {"loss_func": None, "forward_backward_step": lambda m, b: m(b[0]).detach().sum().backward()},
    r"batch 0 does not depend on the parameters of any layer",
  ),
  "no gradient at all": ({"loss_func": lambda y, b: torch.zeros((), requires_grad=True)}, r"batch 0 does not depend on the parameters"),
  "loss nan": ({"loss_func": lambda y, b: y.sum() * float("nan")}, r"the loss of scoring batch 0 is nan"),
  "loss shape": ({"loss_func": lambda y, b: y.sum(0)}, r"loss_func returned a tensor of shape \[8\]; a scalar tensor is needed"),
  "gradient": (
    {"loss_func": nan_gradient},
    r"gradient of the loss with respect to the output of 'head' holds 32 NaN or infinite of 32 values",
  ),
  "no data": ({"data": []}, r"data_loader gave no batch"),
  "no loader": ({"data_loader": None}, r"method 'gradient' needs data_loader"),
  "no loss": ({"loss_func": None}, r"method 'gradient' needs loss_func or forward_backward_step"),
  "hessian": ({"loss_func": None, "method": "hessian"}, r"method 'hessian' needs loss_func"),
  "method": ({"method": "gradients"}, r"method is 'gradients', which is unknown \(did you mean 'gradient'\?\)"),
  "steps": ({"num_score_steps": 0}, r"num_score_steps is 0"),
  "accounting": ({"accounting": "theirs"}, r"accounting is 'theirs'; allowed are 'stored', 'modelopt'"),
  "disabled": ({"disabled_layers": "lm_head"}, r"disabled_layers: pattern 'lm_head' matches no layer; the layers are attn.q_proj"),
  "space": ({"module_search_spaces": {"*q_proj": []}}, r"module_search_spaces\['\*q_proj'\] is empty"),
  "spaces apart": (
    {"module_search_spaces": {"*q_proj": ["FP8_DEFAULT_CFG"], "*k_proj": ["INT8_DEFAULT_CFG"]}},
    r"the layers of group 'attn.\(q_proj\|k_proj\)' have no format in common: attn.k_proj: INT8_DEFAULT_CFG; attn.q_proj: FP8_DEFAULT_CFG",
  ),
  "no logits": ({"method": "kl_div", "forward_step": lambda m, b: [m(b[0])]}, r"method 'kl_div' takes logits .* returned list"),
  "logits nan": (
    {"method": "kl_div", "forward_step": lambda m, b: m(b[0]) * float("inf")},
    r"the output of the float model holds NaN or infinity",
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_by_name_leave_the_model_as_it_was(fault):
  options, message = FAULTS[fault]
  options = dict(options)
  model = experts().train()
  before = {name: value.clone() for name, value in model.state_dict().items()}
  classes = [type(module) for module in model.modules()]
  data = options.pop("data_loader", options.pop("data", features(2)))
  given = {"forward_step": first, "loss_func": cross_entropy, **options}
  constraints, formats = given.pop("constraints", {"effective_bits": 6}), given.pop("formats", FORMATS)
  with pytest.raises(ValueError, match=message):
    tb.auto_quantize(model, constraints, formats, data, **given)
  assert [type(module) for module in model.modules()] == classes
  assert all(module.training for module in model.modules())
  assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
  assert all(p.requires_grad and p.grad is None for p in model.parameters())
  assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fault", ["unreachable", "unknown constraint", "nothing quantized", "twice", "spaces apart"])
def test_what_cannot_be_met_is_said_before_the_model_runs(fault):
  options = dict(FAULTS[fault][0])

  def never(model, batch):
    raise AssertionError("the model ran")

  with pytest.raises(ValueError, match=FAULTS[fault][1]):
    classify(experts(), options.pop("constraints", {"effective_bits": 6}), options.pop("formats", FORMATS), forward_step=never, **options)


def test_a_loader_that_can_be_used_once_is_refused():
  with pytest.raises(TypeError, match=r"data_loader can be gone through only once"):
    tb.auto_quantize(experts(), {"effective_bits": 6}, FORMATS, iter(features()), first, cross_entropy)
