"""Tiny modules that the tests of the JAX backend share. Submodules of the Llama are named as in Hugging Face."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
  hidden: int = 24
  out: int = 6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Any) -> Any:
    x = nn.relu(nn.Dense(self.hidden, name="up", param_dtype=self.dtype)(x))
    return nn.Dense(self.out, name="down", param_dtype=self.dtype)(x)


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x: Any, train: bool = False) -> Any:
    x = nn.Conv(6, (3, 3))(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.Conv(6, (3, 3), strides=2, feature_group_count=3)(x)
    x = nn.ConvTranspose(4, (2, 2))(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    x = nn.avg_pool(x, (2, 2))
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Norm(nn.Module):
  """An RMS norm of the model's own, as Hugging Face's Llama has one: it gets no quantizers."""

  @nn.compact
  def __call__(self, x: Any) -> Any:
    weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight


class Attention(nn.Module):
  heads: int = 2

  @nn.compact
  def __call__(self, x: Any) -> Any:
    d = x.shape[-1]
    q, k, v = (nn.Dense(d, use_bias=False, name=f"{n}_proj")(x).reshape(*x.shape[:2], self.heads, -1) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4.0)
    return nn.Dense(d, use_bias=False, name="o_proj")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class GatedMLP(nn.Module):
  @nn.compact
  def __call__(self, x: Any) -> Any:
    gate, up = (nn.Dense(48, use_bias=False, name=f"{n}_proj")(x) for n in ("gate", "up"))
    return nn.Dense(x.shape[-1], use_bias=False, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x: Any, _: Any = None) -> Any:
    x = x + Attention(name="self_attn")(Norm(name="input_layernorm")(x))
    x = x + GatedMLP(name="mlp")(Norm(name="post_attention_layernorm")(x))
    self.sow("intermediates", "stream", x)
    return x, None


class Decoder(nn.Module):
  """`stack`: None unrolls the layers; a number scans them with parameters stacked on that axis."""

  layers: int = 2
  stack: int | None = None
  remat: bool = False
  jit: bool = False

  @nn.compact
  def __call__(self, tokens: Any) -> Any:
    x = nn.Embed(64, 32, name="embed_tokens")(tokens)
    layer = nn.remat(Layer) if self.remat else Layer
    layer = nn.jit(layer) if self.jit else layer
    if self.stack is None:
      for i in range(self.layers):
        x, _ = layer(name=f"layers_{i}")(x)
    else:
      axes = {"params": self.stack, "intermediates": 0}
      scanned = nn.scan(layer, variable_axes=axes, split_rngs={"params": True}, length=self.layers)
      x, _ = scanned(name="layers")(x, None)
    return Norm(name="norm")(x)


class Llama(nn.Module):
  layers: int = 2
  stack: int | None = None
  remat: bool = False
  jit: bool = False

  @nn.compact
  def __call__(self, tokens: Any) -> Any:
    x = Decoder(self.layers, self.stack, self.remat, self.jit, name="model")(tokens)
    return nn.Dense(64, use_bias=False, name="lm_head")(x)


def stacked(params: Any, layers: int, axis: int) -> Any:
  """Parameters of an unrolled Llama as those of a scanned one. Vectors of a scan over axis 1 are stacked on axis 1 as well."""
  model = dict(params["model"])
  each = [model.pop(f"layers_{i}") for i in range(layers)]
  model["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *each)
  return {**params, "model": model}


def tokens(seed: int = 0, batch: int = 2, length: int = 8) -> Any:
  return jax.random.randint(jax.random.key(seed), (batch, length), 0, 64)
