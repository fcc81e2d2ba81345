"""Llama in plain torch, op for op the model of `experiments.models.flax_llama`, with the module names of Hugging Face.

transformers' own Llama computes norms, softmax and positions in float32 whatever its dtype; here a float64 model is float64 throughout.
In bfloat16 and float16 norms and softmax are computed in float32, as in transformers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from experiments.models import rope
from experiments.models.configs import LlamaConfig
from torch_backend.attention import quantize_bmm, register_attention


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
  """x in float32 where its type is narrower."""
  return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * weight over the last axis. Not torch's own: like transformers' LlamaRMSNorm it gets no quantizers."""

  def __init__(self, size: int, eps: float) -> None:
    super().__init__()
    self.weight = nn.Parameter(torch.ones(size))
    self.eps = eps

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = at_least_float32(x)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.eps)
    return self.weight * y.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  """Rotary position embedding of [B, T, heads, head_dim] with tables [T, head_dim]; channel i turns with channel i + head_dim / 2."""
  first, second = x.chunk(2, dim=-1)
  return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class Attention(nn.Module):
  """Causal attention, `num_attention_heads` queries sharing `num_key_value_heads` keys and values (GQA)."""

  def __init__(self, c: LlamaConfig) -> None:
    super().__init__()
    self.config = c
    own, shared = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    self.q_proj = nn.Linear(c.hidden_size, own, c.attention_bias)
    self.k_proj = nn.Linear(c.hidden_size, shared, c.attention_bias)
    self.v_proj = nn.Linear(c.hidden_size, shared, c.attention_bias)
    self.o_proj = nn.Linear(own, c.hidden_size, c.attention_bias)

  def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    c = self.config
    batch, tokens, _ = x.shape
    groups, shared = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    # The scale goes onto the queries: there are fewer of them than scores, and for head sizes 64 and 256 it is a power of two.
    q = quantize_bmm(self, "q", rotate(q.reshape(batch, tokens, -1, c.head_dim), cos, sin), "bthd") * c.head_dim**-0.5
    q = q.reshape(batch, tokens, groups, shared, c.head_dim)
    k = quantize_bmm(self, "k", rotate(k.reshape(batch, tokens, groups, c.head_dim), cos, sin), "bthd")
    v = quantize_bmm(self, "v", v.reshape(batch, tokens, groups, c.head_dim), "bthd")
    scores = torch.einsum("btgrd,bsgd->bgrts", q, k)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(at_least_float32(scores), dim=-1).to(x.dtype)
    weights = quantize_bmm(self, "p", weights.reshape(batch, -1, tokens, tokens)).reshape(weights.shape)
    y = torch.einsum("bgrts,bsgd->btgrd", weights, v)
    return self.o_proj(y.reshape(batch, tokens, -1))


register_attention(Attention)


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  def __init__(self, c: LlamaConfig) -> None:
    super().__init__()
    self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
    self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
    self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
  """One decoder layer."""

  def __init__(self, c: LlamaConfig) -> None:
    super().__init__()
    self.self_attn = Attention(c)
    self.mlp = MLP(c)
    self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
    self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

  def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
    return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
  """Embedding, layers and the last norm."""

  def __init__(self, c: LlamaConfig) -> None:
    super().__init__()
    self.config = c
    self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
    self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
    self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

  def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    c = self.config
    tokens = input_ids.shape[1]
    x = self.embed_tokens(input_ids)
    tables = rope.tables(c.rope, c.head_dim, tokens, str(x.dtype).removeprefix("torch."))
    cos, sin = (torch.from_numpy(t).to(device=x.device, dtype=x.dtype) for t in tables)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()[None, None, None]
    if attention_mask is not None:
      mask = mask & attention_mask.bool()[:, None, None, None, :]
    for layer in self.layers:
      x = layer(x, cos, sin, mask)
    return self.norm(x)


class TorchLlama(nn.Module):
  """A Llama language model; with tied embeddings `lm_head.weight` and `model.embed_tokens.weight` are one parameter."""

  def __init__(self, config: LlamaConfig) -> None:
    super().__init__()
    self.config = config
    self.model = Model(config)
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.tie_weights()

  def tie_weights(self) -> None:
    """Make the head's weight the table itself, where the configuration ties them."""
    if self.config.tie_word_embeddings:
      self.lm_head.weight = self.model.embed_tokens.weight

  def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, T, vocab_size] in the model's dtype, of input_ids [B, T]; attention_mask [B, T] is 0 where a token is padding."""
    return self.lm_head(self.model(input_ids, attention_mask))
