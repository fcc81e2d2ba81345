"""What a quantized model consists of, as a table and as data."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import core
from core import model_table
from jax_backend import groups, tree, weights
from jax_backend.edit import quantizers
from jax_backend.quantizer import FOLDED, Quantizer, SequentialQuantizer


def print_quant_summary(qvariables: Mapping[str, Any], output_dir: str | pathlib.Path | None = None) -> list[dict[str, Any]]:
  """Print one line per quantizer: format, state, amax, its group of siblings and what sharing their scale costs in SQNR.

  A table on a terminal, plain text otherwise.

  Args:
    qvariables: variables of a quantized model.
    output_dir: also write the plain text to `quant_summary.txt` in this directory.

  Returns:
    One dict per Quantizer: name, format, enabled, state, amax_min, amax_max, amax_shape, group, cost_db.
  """
  rows = summary(qvariables)
  model_table.show(rows, output_dir)
  return rows


def summary(qvariables: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The data of `print_quant_summary`, without printing."""
  costs = _costs(qvariables)
  sharing = _sharing(qvariables)
  rows = []
  for name, quantizer in quantizers(qvariables).items():
    for i, one in enumerate(quantizer.leaves):
      full = f"{name}.{i}" if isinstance(quantizer, SequentialQuantizer) else name
      rows.append(_row(full, one, costs.get(full), one.group in sharing))
  return rows


def _row(name: str, quantizer: Quantizer, cost: float | None, shares: bool) -> dict[str, Any]:
  amax = None if quantizer.amax is None else np.asarray(quantizer.amax)
  return {
    "name": name,
    "format": quantizer.config.describe() if quantizer.is_enabled else "",
    "enabled": quantizer.is_enabled,
    "state": _state(quantizer),
    "amax_min": None if amax is None else float(amax.min()),
    "amax_max": None if amax is None else float(amax.max()),
    "amax_shape": None if amax is None else tuple(amax.shape),
    "group": quantizer.group if shares else None,
    "cost_db": cost,
  }


def _state(quantizer: Quantizer) -> str:
  if quantizer.packed is not None:
    return "compressed"
  if not quantizer.is_enabled:
    return "folded" if quantizer.mode == FOLDED else "off"
  if quantizer.amax is not None:
    return "constant" if quantizer.config.constant_amax is not None else "calibrated"
  return "not calibrated" if quantizer.config.needs_calibration else "dynamic"


def _sharing(qvariables: Mapping[str, Any]) -> set[str]:
  """Groups of which at least two quantizers share a scale."""
  every = [q for quantizer in quantizers(qvariables).values() for q in quantizer.leaves if q.group is not None and groups.shares_scale(q)]
  return {str(group) for group, count in collections.Counter(q.group for q in every).items() if count > 1}


def _costs(qvariables: Mapping[str, Any]) -> dict[str, float]:
  """Weight quantizer name -> what sharing its siblings' scale costs, in dB of SQNR."""
  sharing = _sharing(qvariables)
  costs = {}
  for path, name, quantizer, weight in weights.each(qvariables):
    first = quantizer.leaves[0]
    if first.group in sharing and groups.shares_scale(first) and first.packed is None:
      full = tree.full_name(path, name)
      alone = weights.calibrate(first.with_amax(None), weight, full)
      own, shared = (np.asarray(weights.quantized(q, weight).astype(jnp.float32)) for q in (alone, first))
      before = np.asarray(weight.astype(jnp.float32))
      key = f"{full}.0" if isinstance(quantizer, SequentialQuantizer) else full
      costs[key] = float(core.sqnr_db(before, own)) - float(core.sqnr_db(before, shared))
  return costs
