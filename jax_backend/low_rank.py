"""The low-rank branch of a layer beside its quantized weight (SVDQuant): y + b (a x), x scaled but not quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import core
from jax_backend.quantizer import AnyQuantizer


def branch(own: Mapping[str, AnyQuantizer], into: AnyQuantizer, x: Any) -> Any:
  """What the branch adds to the layer's output; None where its weight quantizer has none.

  Args:
    own: the layer's quantizers.
    into: its input quantizer.
    x: [..., K], its input.

  Returns:
    [..., N] in the type of x, or None.
  """
  held = [q.leaves[0] for q in own.values() if q.param is not None and q.leaves[0].low_rank_a is not None]
  if not held:
    return None
  a, b = held[0].low_rank_a, held[0].low_rank_b
  x = jnp.asarray(x)
  scaled = core.cast_saturating(into.leaves[0].prepare(x), x)
  inner = jnp.matmul(scaled, a.T.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
  return jnp.matmul(inner, b.T.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
