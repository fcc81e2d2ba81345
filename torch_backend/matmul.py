"""The layer's product on integer codes (`core.integer_matmul`), where `compress(model, matmul="int8")` asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import core
from core import integer_matmul
from torch_backend.packed import PackedWeight
from torch_backend.sequential import tensor_quantizers

if TYPE_CHECKING:
  from torch_backend.modules import QuantWeight


def refusal(module: QuantWeight) -> str | None:
  """Why a layer's product cannot be computed on codes; None where it can."""
  if not isinstance(module, nn.Linear):
    return f"integer products are those of nn.Linear; this is {type(module).__name__}"
  weights, inputs = (
    [q.spec for q in tensor_quantizers(held) if q.is_enabled] for held in (module.weight_quantizer, module.input_quantizer)
  )
  if any(q.config.rotate is not None or q.config.bias is not None for q in tensor_quantizers(module.weight_quantizer)):
    return "an integer product knows no rotation and no offset of the weight"
  if any(q.config.rotate is not None or q.config.bias is not None for q in tensor_quantizers(module.input_quantizer)):
    return "an integer product knows no rotation and no offset of the input"
  return integer_matmul.refusal(weights, inputs)


def linear(module: QuantWeight, held: PackedWeight, x: Tensor) -> Tensor:
  """x W^T + b on the codes of x and W.

  Args:
    module: the layer.
    held: its codes.
    x: [..., K], its input.

  Returns:
    [..., N] in the type of x.

  Raises:
    ValueError: a gradient is asked for; integer products have none.
  """
  if torch.is_grad_enabled() and x.requires_grad:
    raise ValueError('matmul="int8" has no gradient; call the model under torch.no_grad(), or compress it without matmul')
  q, _ = tensor_quantizers(module.input_quantizer)[0].codes(x)
  weight = core.unpack_tensor(held.packed)
  product = torch._int_mm(q.codes.reshape(-1, q.codes.shape[-1]), weight.codes.t())  # type: ignore[reportPrivateImportUsage]  # exported, under a private name
  x_step = q.scale.reshape(-1, 1) if q.scale.numel() > 1 else q.scale.reshape(())
  w_step = weight.scale.reshape(1, -1) if weight.scale.numel() > 1 else weight.scale.reshape(())
  y = integer_matmul.rescale(product, x_step, w_step)
  bias = module._parameters.get("bias")
  if bias is not None:
    y = y + bias.to(torch.float32)
  return core.cast_saturating(y, x).reshape(*x.shape[:-1], -1)
