"""BERT in flax.linen, out of nn.Dense, nn.Embed and nn.LayerNorm, with the module names of Hugging Face.

Every tensor has the model's dtype (float64 with jax_enable_x64); in bfloat16 and float16 norms and softmax are computed in float32.
There is no dropout: this is the model for inference and calibration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.configs import BertConfig
from jax_backend.attention import quantize_bmm

_HIGHEST = jax.lax.Precision.HIGHEST
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}


class BertOutput(NamedTuple):
  """What the encoder returns: [B, T, hidden_size], and [B, hidden_size] or None without a pooler."""

  last_hidden_state: jax.Array
  pooler_output: jax.Array | None


def _dense(features: int, name: str, dtype: Any) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, param_dtype=dtype, precision=_HIGHEST, name=name)


def _layer_norm(config: BertConfig, dtype: Any) -> nn.LayerNorm:
  # The fast variance E[x^2] - E[x]^2 cancels in channels with large means, which BERT has.
  return nn.LayerNorm(config.layer_norm_eps, dtype, dtype, use_fast_variance=False, name="LayerNorm")


class Embeddings(nn.Module):
  """Word, position and segment embeddings."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
    c = self.config
    sizes = {"word": c.vocab_size, "position": c.max_position_embeddings, "token_type": c.type_vocab_size}
    table = {k: nn.Embed(n, c.hidden_size, self.dtype, self.dtype, name=f"{k}_embeddings") for k, n in sizes.items()}
    x = table["word"](input_ids) + table["token_type"](token_type_ids)
    return _layer_norm(c, self.dtype)(x + table["position"](jnp.arange(input_ids.shape[1])[None]))


class SelfAttention(nn.Module):
  """Attention of every token to every token that is not padding."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    c = self.config
    shape = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
    q, k, v = (quantize_bmm(self, n[0], _dense(c.hidden_size, n, self.dtype)(x).reshape(shape)) for n in ("query", "key", "value"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision=_HIGHEST) * shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = quantize_bmm(self, "p", jax.nn.softmax(scores, axis=-1).astype(self.dtype))
    return jnp.einsum("bhts,bshd->bthd", weights, v, precision=_HIGHEST).reshape(x.shape)


class Residual(nn.Module):
  """LayerNorm(dense(x) + residual): Hugging Face's BertSelfOutput and BertOutput."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
    return _layer_norm(self.config, self.dtype)(_dense(self.config.hidden_size, "dense", self.dtype)(x) + residual)


class Attention(nn.Module):
  """Self attention and its residual."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    y = SelfAttention(self.config, self.dtype, name="self")(x, mask)
    return Residual(self.config, self.dtype, name="output")(y, x)


class Intermediate(nn.Module):
  """The widening half of the feed-forward net."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return _ACTIVATIONS[self.config.hidden_act](_dense(self.config.intermediate_size, "dense", self.dtype)(x))


class Layer(nn.Module):
  """One encoder layer."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = Attention(self.config, self.dtype, name="attention")(x, mask)
    y = Intermediate(self.config, self.dtype, name="intermediate")(x)
    return Residual(self.config, self.dtype, name="output")(y, x)


class Encoder(nn.Module):
  """The stack of layers."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    for i in range(self.config.num_hidden_layers):
      x = Layer(self.config, self.dtype, name=f"layer_{i}")(x, mask)
    return x


class Pooler(nn.Module):
  """tanh(dense(first token))."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.tanh(_dense(self.config.hidden_size, "dense", self.dtype)(x[:, 0]))


class FlaxBert(nn.Module):
  """A BERT encoder.

  Attributes:
    config: sizes.
    dtype: of parameters and arithmetic; float64 needs jax_enable_x64.
    pooler: whether the checkpoint has one.
  """

  config: BertConfig
  dtype: Any = jnp.float32
  pooler: bool = True

  @nn.compact
  def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None, token_type_ids: jax.Array | None = None) -> BertOutput:
    """The hidden state of every token.

    Args:
      input_ids: [B, T] integers, T at most `max_position_embeddings`.
      attention_mask: [B, T], 0 where a token is padding, or None.
      token_type_ids: [B, T], the segment of each token, or None for segment 0.

    Returns:
      `BertOutput(last_hidden_state, pooler_output)`.

    Raises:
      ValueError: more tokens than the model has positions.
    """
    c = self.config
    if input_ids.shape[1] > c.max_position_embeddings:
      raise ValueError(f"{input_ids.shape[1]} tokens, but the model has {c.max_position_embeddings} positions; use shorter windows")
    segments = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    x = Embeddings(c, self.dtype, name="embeddings")(input_ids, segments)
    x = Encoder(c, self.dtype, name="encoder")(x, mask[:, None, None, :])
    pooled = Pooler(c, self.dtype, name="pooler")(x) if self.pooler else None
    return BertOutput(x, pooled)
