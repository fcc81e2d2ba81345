"""The layer's product on integer codes (`core.integer_matmul`), where `compress(..., matmul="int8")` asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import core
from core import integer_matmul
from jax_backend import packed
from jax_backend.quantizer import AnyQuantizer, Quantizer

_DENSE = ((1,), (0,))  # stored axes of torch's [out, in]


def refusal(weight: AnyQuantizer, into: AnyQuantizer | None) -> str | None:
  """Why a layer's product cannot be computed on codes; None where it can."""
  first = weight.leaves[0]
  if "nn.Dense" not in first.parent_classes and "flax.linen.Dense" not in first.parent_classes:
    return f"integer products are those of nn.Dense; this is {', '.join(first.parent_classes[:1]) or 'another module'}"
  if first.layout.dims != _DENSE:
    return f"an integer product needs a kernel [in, out]; its axes are {first.layout.dims}"
  inputs = [q for q in into.leaves if q.is_enabled] if into is not None else []
  if any(q.config.rotate is not None or q.config.bias is not None for q in (*weight.leaves, *inputs)):
    return "an integer product knows no rotation and no offset"
  return integer_matmul.refusal([q.spec for q in weight.leaves if q.is_enabled], [q.spec for q in inputs])


def asks(weights: Sequence[AnyQuantizer]) -> bool:
  """Whether the one weight of a layer is held for integer products."""
  return len(weights) == 1 and weights[0].leaves[0].packed is not None and weights[0].leaves[0].packed.matmul is not None


def dense(module: nn.Module, weight: Quantizer, into: Quantizer, x: Any) -> Any:
  """x W + b on the codes of x and W.

  Args:
    module: an nn.Dense.
    weight: its weight quantizer, which holds the codes.
    into: its input quantizer.
    x: [..., K].

  Returns:
    [..., N], in the type that the module would return.
  """
  q, _ = packed.codes(into, x)
  held = core.unpack_tensor(weight.packed.tensor)
  product = jax.lax.dot_general(
    q.codes.reshape(-1, q.codes.shape[-1]), held.codes, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
  )
  x_step = q.scale.reshape(-1, 1) if q.scale.size > 1 else q.scale.reshape(())
  w_step = held.scale.reshape(1, -1) if held.scale.size > 1 else held.scale.reshape(())
  y = integer_matmul.rescale(product, x_step, w_step)
  if module.has_variable("params", "bias"):
    y = y + module.get_variable("params", "bias").astype(jnp.float32)
  target = jnp.zeros((), module.dtype or jnp.result_type(x, weight.packed.dtype))  # type: ignore[attr-defined]
  return core.cast_saturating(y, target).reshape(*x.shape[:-1], -1)
