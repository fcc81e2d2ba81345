"""What stands around the rounding of one tensor: Hadamard rotation, and the bias of affine quantization, y = Q(x - b) + b."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from core import affine, hadamard
from core.config.options import BiasSpec, RotateSpec
from jax_backend.layouts import View, normalize_axis


def rotate(x: Any, spec: RotateSpec | None) -> Any:
  """x with blocks of its last axis multiplied by the Hadamard matrix; x itself without a rotation."""
  return x if spec is None else unfused(hadamard.rotate(x, spec.block_size, spec.seed))


def rotate_back(x: Any, spec: RotateSpec | None) -> Any:
  """The inverse of `rotate`, for mode "rotate_back"; in mode "rotate" the next layer holds the inverse, and x stays."""
  if spec is None or spec.mode != "rotate_back":
    return x
  return hadamard.unrotate(unfused(x), spec.block_size, spec.seed)


def unfused(x: Any) -> Any:
  """x behind a select, which XLA does not fuse over: level * step + b would be rounded once, where numpy and torch round twice."""
  return jnp.where(x == x, x, jnp.nan)


def reduced_axes(spec: BiasSpec, seen: View) -> tuple[int, ...]:
  """The axes of the view over which the bias is taken."""
  return tuple(seen.axes[normalize_axis(a, len(seen.axes))] for a in spec.axes)


def bias_of(x: Any, spec: BiasSpec, axes: tuple[int, ...]) -> Any:
  """The mean of x, or the middle of its range, over `axes`, kept as length 1. float32."""
  return affine.bias(x, axes, spec.method)


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
    count = before.get("batches", jnp.zeros((), jnp.float32)) + 1
    total = mean if "total" not in before else before["total"] + mean
    return {"bias": affine.running_mean(total, jnp.broadcast_to(count, total.shape)), "total": total, "batches": count}
  low, high = jnp.min(x, axis=axes, keepdims=True), jnp.max(x, axis=axes, keepdims=True)
  if "low" in before:
    low, high = jnp.minimum(before["low"], low), jnp.maximum(before["high"], high)
  return {"bias": affine.middle(low, high), "low": low, "high": high}
