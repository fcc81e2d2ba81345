"""nn.MultiheadAttention with quantized operands: its products are inside one function of torch, so they are spelled out here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_backend.modules.attention import QuantAttention, explicit


class QuantMultiheadAttention(QuantAttention, nn.MultiheadAttention):
  """nn.MultiheadAttention itself while its quantizers are off. Its projections are no layers and stay unquantized."""

  def forward(
    self,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
  ) -> tuple[Tensor, Tensor | None]:
    if not self.quantizes_bmm():
      return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    if is_causal and attn_mask is None:
      raise ValueError("is_causal=True is a hint about attn_mask, as in torch; give the mask as well")
    if self.bias_k is not None or self.add_zero_attn:
      raise ValueError("nn.MultiheadAttention with add_bias_kv or add_zero_attn has no quantized form; switch its bmm quantizers off")
    batched = query.ndim == 3
    q, k, v = self._projected(*(self._batch_first(x, batched) for x in (query, key, value)))
    mask = self._mask(q, attn_mask, key_padding_mask)
    q, k, v = self.quantized_operands(q, k, v)
    output, weights = explicit(self, q, k, v, mask, dropout=self.dropout if self.training else 0.0)
    output = F.linear(output.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
    if batched and not self.batch_first:
      output = output.transpose(0, 1)
    shown = None if not need_weights else weights.mean(1) if average_attn_weights else weights
    return (output, shown) if batched else (output[0], None if shown is None else shown[0])

  def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
    if not batched:
      return x[None]
    return x if self.batch_first else x.transpose(0, 1)

  def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, heads, T, head_dim] of inputs [B, T, E]."""
    if self.in_proj_weight is not None:
      weights = self.in_proj_weight.chunk(3)
    else:
      weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    made = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    return tuple(x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in made)

  def _mask(self, query: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """Both masks as one that is added to the scores. In torch's layer True means: not seen."""
    found = None
    if attn_mask is not None:
      found = _added(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (query.shape[0], self.num_heads)), query.dtype)
    if key_padding_mask is not None:
      padding = key_padding_mask if key_padding_mask.ndim == 2 else key_padding_mask[None]
      added = _added(padding[:, None, None, :], query.dtype)
      found = added if found is None else torch.clamp(found + added, min=torch.finfo(query.dtype).min)
    return found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
  if mask.dtype != torch.bool:
    return mask.to(dtype)
  return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, torch.finfo(dtype).min)
