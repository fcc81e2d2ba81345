"""QuantModule: an unmodified linen module and the way to run it with quantizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jax_backend import tree
from jax_backend.interceptors import quantizing
from jax_backend.lifted import asks_for_params, with_params


@dataclasses.dataclass(frozen=True)
class QuantModule:
  """A linen module that runs quantized. Frozen, hashable, without arrays; all state is in the variables.

  Attributes:
    module: the user's module, unchanged.
    config: the quantization config as it was given, for `save`; no part of what two modules are compared by.
  """

  module: nn.Module
  config: Any = dataclasses.field(default=None, compare=False, repr=False)

  def apply(
    self,
    qvariables: Mapping[str, Any],
    *args: Any,
    rngs: Any = None,
    method: Any = None,
    mutable: Any = False,
    capture_intermediates: Any = False,
    **kwargs: Any,
  ) -> Any:
    """`module.apply`, quantized. Works under jit, grad, vmap and inside larger modules; semantics are Flax's.

    Args:
      qvariables: {"params": ..., "quant": ..., other collections}.
      *args: for the module's method.
      rngs: as in Flax; "quantize" feeds stochastic rounding.
      method: as in Flax.
      mutable: as in Flax; the quantizers are no collection of their own here.
      capture_intermediates: as in Flax.
      **kwargs: for the module's method.

    Returns:
      The result, or (result, updated collections) where something is mutable.
    """
    variables, params = _mounted(qvariables)
    with nn.intercept_methods(quantizing):
      result = self.module.apply(
        {**variables, "params": params},
        *args,
        rngs=rngs,
        method=method,
        mutable=mutable,
        capture_intermediates=capture_intermediates,
        **kwargs,
      )
    if mutable is False and not capture_intermediates:
      return result
    y, updates = result
    if "params" in updates:
      updates = {**updates, "params": tree.unmount(updates["params"])[0]}
    return y, updates

  def run(
    self, qvariables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, rngs: Any, method: Any, mutable: Any
  ) -> tuple[Any, dict[str, Any]]:
    """One calibration step: (what `apply` returns, the quantizer tree with its statistics)."""
    variables, params = _mounted(qvariables)
    with nn.intercept_methods(quantizing):
      y, updates = self.module.apply(
        {**variables, "params": params}, *args, rngs=rngs, method=method, mutable=with_params(mutable), **kwargs
      )
    plain, quant = tree.unmount(updates["params"])
    if mutable is False or mutable is None:
      return y, quant
    shown = {name: value for name, value in updates.items() if name != "params" or asks_for_params(mutable)}
    return (y, {**shown, "params": plain} if "params" in shown else shown), quant


def _mounted(qvariables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  variables = {name: value for name, value in qvariables.items() if name not in ("params", "quant")}
  return variables, tree.mount(qvariables.get("params", {}), qvariables.get("quant", {}))
