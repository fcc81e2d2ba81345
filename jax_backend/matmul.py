"""The layer's product on codes (`core.matmul`), where `compress(..., matmul="int8")` or "float8" asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import core
from core import matmul as codes
from jax_backend import packed
from jax_backend.quantizer import AnyQuantizer, Quantizer

_DENSE = ((1,), (0,))  # stored axes of torch's [out, in]


def refusal(weight: AnyQuantizer, into: AnyQuantizer | None, matmul: str) -> str | None:
  """Why a layer's product cannot be computed on codes; None where it can."""
  first = weight.leaves[0]
  if "nn.Dense" not in first.parent_classes and "flax.linen.Dense" not in first.parent_classes:
    return f"products of codes are those of nn.Dense; this is {', '.join(first.parent_classes[:1]) or 'another module'}"
  if first.layout.dims != _DENSE:
    return f"a product of codes needs a kernel [in, out]; its axes are {first.layout.dims}"
  inputs = [q for q in into.leaves if q.is_enabled] if into is not None else []
  if any(q.config.rotate is not None or q.config.bias is not None for q in (*weight.leaves, *inputs)):
    return "a product of codes knows no rotation and no offset"
  return codes.refusal(matmul, [q.spec for q in weight.leaves if q.is_enabled], [q.spec for q in inputs])


def asks(weights: Sequence[AnyQuantizer]) -> bool:
  """Whether the one weight of a layer is held for products of codes."""
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
  x_codes, w_codes, wide = q.codes.reshape(-1, q.codes.shape[-1]), held.codes, jnp.int32
  if weight.packed.matmul == codes.FLOAT8:
    x_codes, w_codes = (jax.lax.bitcast_convert_type(part, jnp.float8_e4m3fn) for part in (x_codes, w_codes))
    wide = jnp.float32
  product = jax.lax.dot_general(x_codes, w_codes, (((1,), (0,)), ((), ())), preferred_element_type=wide)
  y = codes.rescale(product, q.scale, held.scale)
  if module.has_variable("params", "bias"):
    y = y + module.get_variable("params", "bias").astype(jnp.float32)
  target = jnp.zeros((), module.dtype or jnp.result_type(x, weight.packed.dtype))  # type: ignore[attr-defined]
  return core.cast_saturating(y, target).reshape(*x.shape[:-1], -1)
