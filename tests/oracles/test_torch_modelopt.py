"""torch_backend beside ModelOpt on the same tiny Llama: names, calibrated amax, quantized weights; and the gaps where rules differ."""

import copy
import warnings

import pytest
import torch

import torch_backend as tb
from tests.torch_backend.models import quietly, tiny_llama, tokens

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import modelopt.torch.quantization as mtq

LLAMA = tiny_llama()
COMMON = ["INT8_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG", "FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
          "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"]  # fmt: skip


def loop(model):
  for seed in range(2):
    model(tokens(seed))


@pytest.fixture(scope="module", params=COMMON)
def pair(request):
  """(preset, our model, theirs), calibrated on the same tokens, without sibling groups."""
  ours, theirs = copy.deepcopy(LLAMA), copy.deepcopy(LLAMA)
  quietly(ours, tb.preset(request.param), loop, group_rules=())
  with warnings.catch_warnings(), torch.no_grad():
    warnings.simplefilter("ignore")
    theirs = mtq.quantize(theirs, getattr(mtq, request.param), loop)
  return request.param, ours, theirs


def peers(model):
  return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Quantizer") and module.is_enabled}


def test_the_same_quantizers_are_enabled(pair):
  _, ours, theirs = pair
  assert {n for n, q in tb.quantizers(ours).items() if q.is_enabled} == set(peers(theirs))


def test_calibrated_amax_is_equal(pair):
  name, ours, theirs = pair
  own, compared = tb.quantizers(ours), 0
  for path, peer in peers(theirs).items():
    if getattr(peer, "_amax", None) is None:
      assert own[path].amax is None
      continue
    assert torch.equal(own[path].amax.reshape(-1), peer._amax.float().reshape(-1)), path
    compared += peer._amax.numel()
  print(f"{name}: {compared} amax values equal")
  assert compared > 0


def test_quantized_weights_pick_the_same_codes(pair):
  """INT: ModelOpt computes round(x * fl(Q/amax)) / fl(Q/amax), we round(x * fl(1/s)) * s with s = fl(amax/Q); FP8 likewise. The same
  code lies within a few roundings of float32; another code would be at least 2^-4 away. Codes differ only where x * inv_step sits within
  such a rounding of a tie, at most 1 in 10^4 on this model."""
  name, ours, theirs = pair
  codes_differ, total, largest = 0, 0, 0.0
  for path, mine in ours.named_modules():
    if isinstance(mine, tb.QuantWeight) and mine.weight_quantizer.is_enabled:
      other = theirs.get_submodule(path)
      a, b = mine.quantized_weight().detach(), other.weight_quantizer(other.weight).detach()
      relative = (a - b).abs() / b.abs().clamp(min=1e-30)
      differ = relative > 1e-6
      codes_differ += int(differ.sum())
      largest = max(largest, float(relative[~differ].max()))
      total += a.numel()
  print(f"{name}: {codes_differ} of {total} codes differ; equal codes differ by at most {largest:.2e}")
  # 4 roundings of 2^-24 at most: 2.4e-7, plus one for the division
  assert codes_differ <= total * 1e-4 and largest <= 3.6e-7


def test_logits_agree_as_far_as_two_roundings_allow(pair):
  """Weight-only presets flip no activation code, so only the weights' last bits and the matmuls' own error remain."""
  name, ours, theirs = pair
  if "WEIGHT_ONLY" not in name:
    return
  with torch.no_grad():
    a, b = ours(tokens(5)).logits, theirs(tokens(5)).logits
  # float32 forward of two layers with values below 1: about 1e-6, as between two summation orders of the float model
  assert float((a - b).abs().max()) < 2e-5


def test_gap_transposed_convolutions():
  """ModelOpt's axis 0 of a transposed convolution is its INPUT channel; ours is the output channel, as for every other layer."""
  torch.manual_seed(0)
  layer = torch.nn.ConvTranspose2d(6, 4, 3)
  own = quietly(torch.nn.Sequential(copy.deepcopy(layer)), tb.INT8_WEIGHT_ONLY_CFG)[0]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = mtq.quantize(torch.nn.Sequential(copy.deepcopy(layer)), mtq.INT8_WEIGHT_ONLY_CFG, lambda m: m(torch.ones(1, 6, 3, 3)))[0]
  assert own.weight_quantizer.amax.numel() == 4 and theirs.weight_quantizer._amax.numel() == 6


def test_gap_zero_fp8_amax():
  """A zero amax: ModelOpt quantizes with amax 1, we give zeros."""
  own, x = tb.TensorQuantizer({"num_bits": (4, 3)}), torch.tensor([3.0, 0.1])
  own.amax = 0.0
  from modelopt.torch.quantization.nn import TensorQuantizer

  theirs = TensorQuantizer(mtq.config.QuantizerAttributeConfig(num_bits=(4, 3)))
  theirs.amax = torch.tensor(0.0)
  assert own(x).tolist() == [0.0, 0.0] and theirs(x)[0] == 1.0


def test_gap_half_precision_statistics():
  """ModelOpt's amax takes the model's dtype, ours stays float32."""
  own = tb.TensorQuantizer({"num_bits": 8})
  own.amax = 3.14159
  from modelopt.torch.quantization.nn import TensorQuantizer

  theirs = TensorQuantizer(mtq.config.QuantizerAttributeConfig(num_bits=8))
  theirs.amax = torch.tensor(3.14159)
  assert own.half().amax.dtype == torch.float32 and theirs.half()._amax.dtype == torch.float16
