"""Weights outside a forward pass: what each weight quantizer is given."""

from __future__ import annotations

from torch import Tensor, nn

from core.config import QuantizerConfig
from torch_backend.modules import QuantWeight
from torch_backend.names import walk
from torch_backend.sequential import SequentialQuantizer, tensor_quantizers

WeightState = tuple[Tensor, QuantizerConfig | tuple[QuantizerConfig, ...], Tensor | tuple[Tensor | None, ...] | None]


def weight_quantization(model: nn.Module) -> dict[str, WeightState]:
  """Every enabled weight quantizer's tensor as its axes see it, for comparison code by code.

  `core.quantize(weight, config.spec, amax)` gives the codes and scales that the model computes with; a static two-level weight also needs
  `tensor_amax=quantizers(model)[name].tensor_amax`, which siblings may share.

  Args:
    model: a quantized model.

  Returns:
    quantizer name -> (weight [out, in] or OIHW before quantization; its QuantizerConfig; amax, float32, or None where it is taken from the
    weight). For a sequential quantizer config and amax are tuples.
  """
  result: dict[str, WeightState] = {}
  for name, quantizer, module in walk(model):
    if isinstance(module, QuantWeight) and quantizer is module.weight_quantizer and quantizer.is_enabled:
      amax = tuple(q.amax for q in tensor_quantizers(quantizer)) if isinstance(quantizer, SequentialQuantizer) else quantizer.amax
      result[name] = (module.canonical(module.stored_weight.detach()), quantizer.config, amax)
  return result
