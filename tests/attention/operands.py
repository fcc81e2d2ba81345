"""Attention that shows its operands, the same in both frameworks: what comes in, [B, T, heads, D], leaves as its quantizers see it."""

from __future__ import annotations

from typing import Any

import flax.linen
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import jax_backend
import torch_backend

OFF = {"enable": False}
SHAPE = (2, 7, 3, 32)


def inputs(seed: int = 0, offset: float = 1.5) -> tuple[np.ndarray, ...]:
  """Queries, keys and values of three magnitudes, off the middle, so that a swapped pair or a lost bias shows."""
  rng = np.random.default_rng(seed)
  return tuple((scale * (rng.standard_normal(SHAPE) + offset)).astype(np.float32) for scale in (1.0, 3.0, 0.2))


class TorchOperands(nn.Module):
  def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch_backend.quantize_bmm(self, role, x, "bthd") for role, x in (("q", q), ("k", k), ("v", v)))


torch_backend.register_attention(TorchOperands)


class JaxOperands(flax.linen.Module):
  @flax.linen.compact
  def __call__(self, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    return tuple(jax_backend.quantize_bmm(self, role, x) for role, x in (("q", q), ("k", k), ("v", v)))


class Around(flax.linen.Module):
  """The attention as a part of a model."""

  @flax.linen.compact
  def __call__(self, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    return JaxOperands(name="attn")(q, k, v)


def torch_model() -> Any:
  return nn.ModuleDict({"attn": TorchOperands()})


def on_torch(config: dict[str, Any], batches: list[tuple[np.ndarray, ...]]) -> Any:
  model: Any = torch_model()
  return torch_backend.quantize(model, config, lambda m: [model["attn"](*map(torch.from_numpy, batch)) for batch in batches])


def on_jax(config: dict[str, Any], batches: list[tuple[np.ndarray, ...]]) -> tuple[Any, Any]:
  return jax_backend.quantize(Around(), {"params": {}}, config, lambda m: [m(*map(jnp.asarray, batch)) for batch in batches])
