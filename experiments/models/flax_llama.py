"""Llama in flax.linen, out of nn.Dense and nn.Embed, with the module names of Hugging Face.

Every tensor has the model's dtype: in float64 (with jax_enable_x64) norms, softmax and position tables are float64 too. In bfloat16 and
float16 norms and softmax are computed in float32, as transformers does. `experiments.models.torch_llama` is the same model in torch.

The head is always a module `lm_head` with a kernel of its own, as torch's Linear of that name: it has its own quantizers there. With tied
embeddings its kernel is loaded as the transposed table; who trains passes the gradients through `tied_gradients`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import rope
from experiments.models.configs import LlamaConfig
from jax_backend.attention import quantize_bmm

_HIGHEST = jax.lax.Precision.HIGHEST


def _dense(features: int, name: str, dtype: Any, use_bias: bool = False) -> nn.Dense:
  return nn.Dense(features, use_bias, dtype=dtype, param_dtype=dtype, precision=_HIGHEST, name=name)


def at_least_float32(x: jax.Array) -> jax.Array:
  """x in float32 where its type is narrower."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis. Not flax's own: like transformers' LlamaRMSNorm it gets no quantizers."""

  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
    y = at_least_float32(x)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return scale * y.astype(self.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary position embedding of [B, T, heads, head_dim] with tables [T, head_dim]; channel i turns with channel i + head_dim / 2."""
  first, second = jnp.split(x, 2, axis=-1)
  return x * cos[:, None] + jnp.concatenate([-second, first], axis=-1) * sin[:, None]


class Attention(nn.Module):
  """Causal attention, `num_attention_heads` queries sharing `num_key_value_heads` keys and values (GQA)."""

  config: LlamaConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array) -> jax.Array:
    c = self.config
    batch, tokens, _ = x.shape
    groups, shared = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    q = _dense(c.num_attention_heads * c.head_dim, "q_proj", self.dtype, c.attention_bias)(x)
    k = _dense(groups * c.head_dim, "k_proj", self.dtype, c.attention_bias)(x)
    v = _dense(groups * c.head_dim, "v_proj", self.dtype, c.attention_bias)(x)
    # The scale goes onto the queries: there are fewer of them than scores, and for head sizes 64 and 256 it is a power of two.
    q = quantize_bmm(self, "q", rotate(q.reshape(batch, tokens, -1, c.head_dim), cos, sin)) * c.head_dim**-0.5
    q = q.reshape(batch, tokens, groups, shared, c.head_dim)
    k = quantize_bmm(self, "k", rotate(k.reshape(batch, tokens, groups, c.head_dim), cos, sin))
    v = quantize_bmm(self, "v", v.reshape(batch, tokens, groups, c.head_dim))
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, precision=_HIGHEST)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(at_least_float32(scores), axis=-1).astype(self.dtype)
    weights = quantize_bmm(self, "p", weights.reshape(batch, -1, tokens, tokens)).reshape(weights.shape)
    y = jnp.einsum("bgrts,bsgd->btgrd", weights, v, precision=_HIGHEST)
    return _dense(c.hidden_size, "o_proj", self.dtype, c.attention_bias)(y.reshape(batch, tokens, -1))


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  config: LlamaConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    gate = _dense(c.intermediate_size, "gate_proj", self.dtype, c.mlp_bias)(x)
    up = _dense(c.intermediate_size, "up_proj", self.dtype, c.mlp_bias)(x)
    return _dense(c.hidden_size, "down_proj", self.dtype, c.mlp_bias)(jax.nn.silu(gate) * up)


class Layer(nn.Module):
  """One decoder layer."""

  config: LlamaConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array) -> jax.Array:
    eps = self.config.rms_norm_eps
    attention = Attention(self.config, self.dtype, name="self_attn")
    x = x + attention(RMSNorm(eps, self.dtype, name="input_layernorm")(x), cos, sin, mask)
    return x + MLP(self.config, self.dtype, name="mlp")(RMSNorm(eps, self.dtype, name="post_attention_layernorm")(x))


class ScannedLayer(Layer):
  """The layer as nn.scan wants it: carry in, (carry, nothing) out."""

  def __call__(self, x: jax.Array, *tables: jax.Array) -> tuple[jax.Array, None]:  # type: ignore[override]
    return super().__call__(x, *tables), None


class Model(nn.Module):
  """Embedding, layers and the last norm."""

  config: LlamaConfig
  dtype: Any
  scan_layers: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    c = self.config
    tokens = input_ids.shape[1]
    x = nn.Embed(c.vocab_size, c.hidden_size, self.dtype, self.dtype, name="embed_tokens")(input_ids)
    cos, sin = (jnp.asarray(t, self.dtype) for t in rope.tables(c.rope, c.head_dim, tokens, jnp.dtype(self.dtype).name))
    mask = jnp.tril(jnp.ones((tokens, tokens), bool))[None, None, None]
    if attention_mask is not None:
      mask = mask & attention_mask.astype(bool)[:, None, None, None, :]
    if self.scan_layers:
      layer = nn.remat(ScannedLayer, prevent_cse=False) if self.remat else ScannedLayer
      axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
      x, _ = nn.scan(layer, length=c.num_hidden_layers, **axes)(c, self.dtype, name="layers")(x, cos, sin, mask)
    else:
      layer = nn.remat(Layer) if self.remat else Layer
      for i in range(c.num_hidden_layers):
        x = layer(c, self.dtype, name=f"layers_{i}")(x, cos, sin, mask)
    return RMSNorm(c.rms_norm_eps, self.dtype, name="norm")(x)


class FlaxLlama(nn.Module):
  """A Llama language model.

  Attributes:
    config: sizes.
    dtype: of parameters and arithmetic; float64 needs jax_enable_x64.
    scan_layers: one layer with stacked parameters [L, ...] under nn.scan (compiles L times faster; the layers then have one name).
    remat: recompute the layers' activations in the backward pass instead of keeping them.
  """

  config: LlamaConfig
  dtype: Any = jnp.float32
  scan_layers: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
    """Logits.

    Args:
      input_ids: [B, T] integers.
      attention_mask: [B, T], 0 where a token is padding, or None.

    Returns:
      [B, T, vocab_size] in the model's dtype.
    """
    x = Model(self.config, self.dtype, self.scan_layers, self.remat, name="model")(input_ids, attention_mask)
    return _dense(self.config.vocab_size, "lm_head", self.dtype)(x)


def tied_gradients(gradients: dict[str, Any]) -> dict[str, Any]:
  """Gradients of a model with tied embeddings: table and head both get the sum of the two.

  Both copies start equal, so an optimizer that works element by element (SGD, Adam) keeps them equal. Apply it first: a clip by global
  norm behind it counts the table twice.

  Args:
    gradients: of the tree `variables["params"]`.
  """
  table = gradients["model"]["embed_tokens"]["embedding"] + gradients["lm_head"]["kernel"].T
  model = {**gradients["model"], "embed_tokens": {**gradients["model"]["embed_tokens"], "embedding": table}}
  return {**gradients, "model": model, "lm_head": {**gradients["lm_head"], "kernel": table.T}}
