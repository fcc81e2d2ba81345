"""Scores of groups from what was measured, batch by batch, with their spread. float64 throughout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from core.search.plan import Plan

Columns = Sequence[tuple[str, str]]
TRACE = "trace"
METHODS = ("gradient", "fisher", "kl_div", "hessian", "sqnr")
BY_GRADIENT = ("gradient", "fisher")


def columns(method: str, plan: Plan) -> list[tuple[str, str]]:
  """(layer or group, format) of every number that a batch gives; for "hessian" (layer, "trace")."""
  choices = plan.to_score()
  if method in BY_GRADIENT:
    return [(layer, name) for layer, names in choices.items() for name in names]
  if method == "hessian":
    return [(layer, TRACE) for layer in choices]
  if method == "kl_div":
    found = []
    for group, members in plan.groups.items():
      names = {name for member in members for name in choices.get(member, ())}
      found += [(group, name) for name in plan.choices[group] if name in names]
    return found
  return []


def table(method: str, plan: Plan, rows: Sequence[Sequence[float]], errors: Mapping[str, Any] | None) -> dict[str, Any]:
  """Scores per group and per layer, and what single batches say.

  Args:
    method: how layers were scored.
    plan: the problem.
    rows: per batch, one number per `columns(method, plan)`.
    errors: layer -> format -> (signal, noise) of the weights, for "hessian" and "sqnr".

  Returns:
    "scores": group -> format -> sum over layers and batches; 0 for unquantized ones.
    "layer_scores": layer (for "kl_div": group) -> format -> {"sum", "mean", "std"} over batches; std is that of single batches, 0 for one.
  """
  choices = plan.to_score()
  layers: dict[str, dict[str, list[float]]] = {}
  if method in (*BY_GRADIENT, "kl_div"):
    for place, (unit, name) in enumerate(columns(method, plan)):
      layers.setdefault(unit, {})[name] = [float(row[place]) for row in rows]
  else:
    traces = {layer: [float(row[i]) for row in rows] for i, (layer, _) in enumerate(columns(method, plan))}
    shapes = {layer.name: layer.copies * math.prod(layer.shape) for layer in plan.layers}
    for layer, names in choices.items():
      pairs = {} if errors is None else errors[layer]
      layers[layer] = {n: _by_weights(pairs[n], None if method == "sqnr" else traces[layer], shapes[layer]) for n in names}
  members = {group: [group] if method == "kl_div" else list(names) for group, names in plan.groups.items()}
  # A trace is an estimate and may come out below zero, which no format can profit from.
  sums = {unit: {name: max(math.fsum(values), 0.0) for name, values in row.items()} for unit, row in layers.items()}
  scores = {
    group: {name: math.fsum(sums.get(unit, {}).get(name, 0.0) for unit in members[group]) for name in plan.choices[group]}
    for group in plan.groups
  }
  return {"scores": scores, "layer_scores": {unit: {n: _spread(v) for n, v in row.items()} for unit, row in layers.items()}}


def _by_weights(pair: tuple[float, float], traces: Sequence[float] | None, numel: int) -> list[float]:
  """Per batch, trace / numel * noise / 2, the expected rise of the loss; without traces noise / signal."""
  signal, noise = pair
  if traces is None:
    return [noise / signal if signal > 0 else 0.0]
  return [trace / numel * noise / 2 for trace in traces]


def _spread(values: Sequence[float]) -> dict[str, float]:
  std = statistics.stdev(values) if len(values) > 1 else 0.0
  return {"sum": math.fsum(values), "mean": math.fsum(values) / max(len(values), 1), "std": std}


def probe(seed: int, batch: int, number: int, layer: str, shape: Sequence[int]) -> Callable[[], np.ndarray]:
  """A function that makes a layer's part of a Rademacher vector: +-1, float32, the same in every backend.

  Args:
    seed: of the search.
    batch: number of the batch.
    number: of the probe.
    layer: layer name.
    shape: of the weight in torch's layout, stacked copies in front.
  """

  def make() -> np.ndarray:
    words = [seed, batch, number, *layer.encode()]
    size = math.prod(shape)
    bits = np.unpackbits(np.frombuffer(np.random.default_rng(words).bytes(-(-size // 8)), np.uint8), count=size)
    return (1.0 - 2.0 * bits).astype(np.float32).reshape(tuple(shape))

  return make
