"""fold_weight: put the quantized weights in the place of the weights."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from core.config import ConfigWarning
from torch_backend.compress import decompress
from torch_backend.modules import QuantWeight
from torch_backend.names import is_quantized
from torch_backend.sequential import tensor_quantizers


@torch.no_grad()
def fold_weight(model: nn.Module, keep_attrs: bool = False) -> None:
  """Replace every weight that has an enabled quantizer by its quantized values, in place, and let that quantizer pass.

  The model computes the same afterwards, and faster. A weight that several modules share (a tied embedding) stays shared where all of
  them quantize it alike; otherwise the module that quantizes it gets a weight of its own, and a warning says so. A compressed weight is
  decompressed.

  Args:
    model: a quantized model.
    keep_attrs: keep amax and pre_quant_scale of the folded quantizers.

  Raises:
    ValueError: the model is not quantized.
  """
  if not is_quantized(model):
    raise ValueError("the model has no quantized modules; call quantize(model, config, forward_loop) first")
  decompress(model)
  users: dict[int, list[nn.Module]] = {}
  for module in model.modules():
    for parameter in module._parameters.values():
      if parameter is not None:
        users.setdefault(id(parameter), []).append(module)
  folded: dict[int, torch.Tensor] = {}
  for name, module in model.named_modules():
    if isinstance(module, QuantWeight) and module.weight_quantizer.is_enabled:
      _fold(name, module, users, folded)
      for quantizer in tensor_quantizers(module.weight_quantizer):
        if not keep_attrs:
          quantizer.reset_amax()
          quantizer.pre_quant_scale = None
      module.weight_quantizer.set_folded()
      module.drop_kept_weight()


def _fold(name: str, module: QuantWeight, users: dict[int, list[nn.Module]], folded: dict[int, torch.Tensor]) -> None:
  weight = module.stored_weight
  if id(weight) in folded:  # an earlier module with the same settings has done it
    return
  value = module.compute_weight().detach()
  others = [other for other in users.get(id(weight), []) if other is not module]
  if not others or all(_same(other, weight, value) for other in others):
    weight.copy_(value)
    folded[id(weight)] = weight
    return
  warnings.warn(
    f"{name}.weight is shared with a module that does not quantize it alike; it becomes a parameter of its own", ConfigWarning, stacklevel=3
  )
  module.weight = nn.Parameter(value.clone(), requires_grad=weight.requires_grad)


def _same(other: nn.Module, weight: torch.Tensor, value: torch.Tensor) -> bool:
  if not isinstance(other, QuantWeight) or other.stored_weight is not weight or not other.weight_quantizer.is_enabled:
    return False
  return torch.equal(other.compute_weight(), value)
