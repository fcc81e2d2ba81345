"""What stands around the rounding of one tensor: Hadamard rotation, and the bias of affine quantization, y = Q(x - b) + b."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from core import hadamard
from core.blocks import normalize_axis
from core.config.options import BiasSpec, RotateSpec
from jax_backend.layouts import View


def rotate(x: Any, spec: RotateSpec | None) -> Any:
  """x with blocks of its last axis multiplied by the Hadamard matrix; x itself without a rotation."""
  return x if spec is None else hadamard.rotate(x, spec.block_size, spec.seed).astype(x.dtype)


def rotate_back(x: Any, spec: RotateSpec | None) -> Any:
  """The inverse of `rotate`, for mode "rotate_back"; in mode "rotate" the next layer holds the inverse, and x stays."""
  return x if spec is None or spec.mode != "rotate_back" else hadamard.unrotate(x, spec.block_size, spec.seed).astype(x.dtype)


def reduced_axes(spec: BiasSpec, seen: View) -> tuple[int, ...]:
  """The axes of the view over which the bias is taken."""
  rank = (0,) * len(seen.axes)
  return tuple(seen.axes[normalize_axis(a, rank)] for a in spec.axes)


def bias_of(x: Any, spec: BiasSpec, axes: tuple[int, ...]) -> Any:
  """The mean of x, or the middle of its range, over `axes`, kept as length 1. float32."""
  x = x.astype(jnp.float32)
  if spec.method == "mean":
    return jnp.mean(x, axis=axes, keepdims=True)
  return (jnp.min(x, axis=axes, keepdims=True) + jnp.max(x, axis=axes, keepdims=True)) / 2


def next_bias(x: Any, spec: BiasSpec, axes: tuple[int, ...], before: dict[str, Any]) -> dict[str, Any]:
  """Running statistics of a static bias with one more batch taken into account.

  Args:
    x: [...] float32, as the view shows it.
    spec: the bias.
    axes: reduced axes of the view.
    before: what an earlier call returned, or {} at the start.

  Returns:
    "bias": mean of the batches' means, or the middle of the range so far; and what the next call needs.
  """
  if spec.method == "mean":
    mean = bias_of(x, spec, axes)
    count = before.get("batches", jnp.zeros((), jnp.float32))
    bias = mean if "bias" not in before else (before["bias"] * count + mean) / (count + 1)
    return {"bias": bias, "batches": count + 1}
  low, high = jnp.min(x, axis=axes, keepdims=True), jnp.max(x, axis=axes, keepdims=True)
  if "low" in before:
    low, high = jnp.minimum(before["low"], low), jnp.maximum(before["high"], high)
  return {"bias": (low + high) / 2, "low": low, "high": high}
