"""Quantized values in the place of weights, once and for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_backend import tree, weights
from jax_backend.apply import QuantModule
from jax_backend.edit import is_quantized
from jax_backend.quantizer import FOLDED


def fold_weight(qmodule: QuantModule, qvariables: Mapping[str, Any]) -> dict[str, Any]:
  """Replace every weight by its quantized values, so that evaluation does not compute them again. Outputs stay bit for bit.

  A compressed weight is decompressed.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables; they are not changed.

  Returns:
    New variables: weights folded, their quantizers in mode "folded" (off for good; `quantize` again to start over).

  Raises:
    ValueError: the variables have no quantizers.
  """
  if not is_quantized(qvariables):
    raise ValueError("these variables have no quantizers; call quantize(module, variables, config, forward_loop) first")
  params = qvariables.get("params", {})
  done = {(path, name): q for path, name, q in tree.items(qvariables.get("quant", {}))}
  for path, name, quantizer, weight in weights.each(qvariables):
    if quantizer.leaves[0].packed is not None:
      params = tree.inserted(params, (*path, str(quantizer.param)), weights.from_front(weights.unpacked(quantizer), quantizer.stack))
      done[path, name] = quantizer.map(lambda q: q.replace(mode=FOLDED, packed=None))
    elif quantizer.is_enabled:
      folded = weights.from_front(weights.quantized(quantizer, weight), quantizer.stack)
      params = tree.replaced(params, (*path, str(quantizer.param)), folded)
      done[path, name] = quantizer.map(lambda q: q.replace(mode=FOLDED))
  return {**qvariables, "params": params, "quant": tree.build(done)}
