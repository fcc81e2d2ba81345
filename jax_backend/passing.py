"""One activation on its way through one quantizer, inside a running module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_backend import capture, statistics, tree
from jax_backend.quantizer import CALIBRATE, AnyQuantizer
from jax_backend.tree import RIDER, Rider

RNG = "quantize"  # name of the rng stream that stochastic rounding draws from


def through(module: nn.Module, name: str, quantizer: AnyQuantizer, x: Any) -> Any:
  """x through the quantizer; while calibrating, its statistics go back to where the quantizer rides."""
  if quantizer.mode == CALIBRATE:
    try:
      updated = statistics.collect(quantizer, x)
    except ValueError as error:
      raise ValueError(f"quantizer {tree.full_name(tuple(module.path), name)!r}: {error}") from error
    rider: Rider = module.get_variable("params", RIDER)
    module.put_variable("params", RIDER, dataclasses.replace(rider, quantizers={**rider.quantizers, name: tree.disembark(updated)}))
  y = with_key(module, quantizer)(x)
  capture.observe(lambda: tree.full_name(tuple(module.path), name), quantizer, x, y)
  return y


def with_key(module: nn.Module, quantizer: AnyQuantizer) -> Callable[[Any], Any]:
  """The quantizer, with a key of the rng stream "quantize" where it rounds stochastically."""
  if not any(q.is_enabled and q.config.spec.rounding == "stochastic" for q in quantizer.leaves):
    return quantizer
  if not module.has_rng(RNG):
    raise ValueError(f'stochastic rounding needs a key: call apply(..., rngs={{"{RNG}": jax.random.key(0)}})')

  def quantize(x: Any) -> Any:
    words = jax.random.key_data(module.make_rng(RNG)).reshape(-1)[:2]
    key = jax.lax.bitcast_convert_type(words, jnp.int32)
    return quantizer(x, (key[0], key[1]))

  return quantize
