"""The layer's product on codes (`core.matmul`), where `compress(model, matmul="int8")` or "float8" asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import core
from core import matmul as codes
from torch_backend.packed import PackedWeight
from torch_backend.sequential import tensor_quantizers

if TYPE_CHECKING:
  from torch_backend.modules import QuantWeight


def refusal(module: QuantWeight, matmul: str) -> str | None:
  """Why a layer's product cannot be computed on codes; None where it can."""
  if not isinstance(module, nn.Linear):
    return f"products of codes are those of nn.Linear; this is {type(module).__name__}"
  weights, inputs = (
    [q.spec for q in tensor_quantizers(held) if q.is_enabled] for held in (module.weight_quantizer, module.input_quantizer)
  )
  if any(q.config.rotate is not None or q.config.bias is not None for q in tensor_quantizers(module.weight_quantizer)):
    return "a product of codes knows no rotation and no offset of the weight"
  if any(q.config.rotate is not None or q.config.bias is not None for q in tensor_quantizers(module.input_quantizer)):
    return "a product of codes knows no rotation and no offset of the input"
  return codes.refusal(matmul, weights, inputs)


def linear(module: QuantWeight, held: PackedWeight, x: Tensor) -> Tensor:
  """x W^T + b on the codes of x and W.

  Args:
    module: the layer.
    held: its codes.
    x: [..., K], its input.

  Returns:
    [..., N] in the type of x.

  Raises:
    ValueError: a gradient is asked for; products of codes have none.
  """
  if torch.is_grad_enabled() and x.requires_grad:
    raise ValueError(f'matmul="{held.matmul}" has no gradient; call the model under torch.no_grad(), or compress it without matmul')
  q, _ = tensor_quantizers(module.input_quantizer)[0].codes(x)
  weight = core.unpack_tensor(held.packed)
  multiply = _int8 if held.matmul == codes.INT8 else _float8
  y = codes.rescale(multiply(q.codes.reshape(-1, q.codes.shape[-1]), weight.codes), q.scale, weight.scale)
  bias = module._parameters.get("bias")
  if bias is not None:
    y = y + bias.to(torch.float32)
  return core.cast_saturating(y, x).reshape(*x.shape[:-1], -1)


def _int8(x: Tensor, w: Tensor) -> Tensor:
  """[M, K] and [N, K] int8 -> [M, N] int32."""
  return torch._int_mm(x, w.t())  # type: ignore[reportPrivateImportUsage]  # exported, under a private name


def _float8(x: Tensor, w: Tensor) -> Tensor:
  """[M, K] and [N, K] codes of E4M3 -> [M, N] float32."""
  one = torch.ones((), device=x.device)
  a, b = x.contiguous().view(torch.float8_e4m3fn), w.contiguous().view(torch.float8_e4m3fn)
  return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)  # type: ignore[reportPrivateImportUsage]
