"""Wrong calls say what to do; the torch twin of tests/jax_backend/test_refusals.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_backend as tb


def test_an_axis_that_is_not_there_names_the_quantizer():
  model = nn.Sequential(nn.Linear(8, 4))
  with pytest.raises(ValueError, match=r"'0\.weight_quantizer'.*axis 5 does not exist"):
    tb.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 5}}, "algorithm": "max"})
  assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("model", [nn.Linear(8, 4), None])
def test_a_plain_model_has_nothing_to_fold_or_calibrate(model):
  for call in (tb.fold_weight, tb.calibrate):
    with pytest.raises(ValueError, match="no quantized modules"):
      call(model)


def test_rules_of_groups_are_a_list():
  with pytest.raises(ValueError, match="give a list"):
    tb.quantize(nn.Sequential(nn.Linear(8, 4)), tb.FP8_DEFAULT_CFG, lambda m: m(torch.ones(1, 8)), group_rules="q|k")


def test_weight_quantization_shows_what_the_codes_are_made_of():
  model = tb.quantize(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), tb.INT8_WEIGHT_ONLY_CFG)
  weight, config, amax = tb.weight_quantization(model)["0.weight_quantizer"]
  assert tuple(weight.shape) == (6, 4, 3, 3) and config.spec.axis == (0,) and tuple(amax.shape) == (6, 1, 1, 1)
