"""One configuration in both backends: what must be equal, counted; what cannot be, measured beside its floor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import carrier, floor, on_jax, on_torch, setup
from experiments.carrier import Comparison, Count, Leaves, precision
from experiments.quantities import Codes, Leaf, Weight, differing

__all__ = ["Settings", "compare_config", "precision"]

ADAPTERS = {"torch": on_torch, "jax": on_jax}
FLOAT32_AMAX_LIMIT = 1e-3  # relative; two float32 forward passes differ by some 1e-6 to 1e-4 in single activations
FLOAT64_CODE_LIMIT = 1e-7  # share of codes: an activation within 1e-13 of a rounding boundary may still fall on either side
FLOAT64_LOGIT_LIMIT = 1e-9


class Settings(NamedTuple):
  """How to compare.

  Attributes:
    carrier: "float32" or "float64".
    floor_orders: number of other summation orders.
    seed: of these orders.
    group_rules: as in `quantize`.
  """

  carrier: str
  floor_orders: int
  seed: int
  group_rules: Sequence[str] | None


def compare_config(
  config: setup.Config,
  floats: Mapping[str, Any],
  calibration: list[np.ndarray],
  windows: list[np.ndarray],
  settings: Settings,
) -> dict[str, Any]:
  """Quantize in both backends and compare.

  Args:
    config: the configuration.
    floats: "torch" and "jax" -> float model.
    calibration: batches for calibration.
    windows: batches to run on.
    settings: how.

  Returns:
    Figures, "rows" per quantizer, "layers" (distance of outputs), and "failures": what had to be equal and is not, in words.
  """
  models = {name: model.quantize(config.value, calibration, settings.group_rules) for name, model in floats.items()}
  return compare_models(config.name, models["torch"], models["jax"], windows, settings)


def compare_models(name: str, first: Any, second: Any, windows: list[np.ndarray], settings: Settings) -> dict[str, Any]:
  """Compare a model quantized in torch with one quantized in JAX; see `compare_config`."""
  start = time.perf_counter()
  leaves: tuple[Leaves, Leaves] = (first.leaves(), second.leaves())
  failures = compare_names(first, second, leaves)
  common = [n for n in leaves[0] if n in leaves[1] and len(leaves[0][n]) == len(leaves[1][n])]
  rows = {n: state_row(n, leaves[0][n], leaves[1][n]) for n in common}
  for weight, other in pairs(first.weights(), second.weights()):
    compare_weight(rows[weight.name], weight, other)
  activations = {n for n in common if rows[n]["kind"] == "activation"}
  if settings.carrier == "float64":
    failures += share_amax(second, leaves, activations, rows)
    leaves = (leaves[0], second.leaves())
  first.fold()
  second.fold()
  checker = SameInput(leaves, first.quantizers(), second.quantizers(), rows) if settings.carrier == "float32" else None
  torch_run = carrier.Run(first, on_torch, leaves[0])
  permuted = [torch_run._replace(model=floor.Permuted(first, settings.seed + order)) for order in range(settings.floor_orders)]
  own, *floors = carrier.compare(torch_run, [carrier.Run(second, on_jax, leaves[1]), *permuted], windows, checker)
  if settings.carrier == "float64":
    for quantizer, count in own.quantizers.items():
      rows[quantizer] |= count_fields(count)
  failures += judge(rows, own, settings.carrier)
  return {
    "config": name,
    "failures": failures,
    "quantizers": len(common),
    **totals(rows),
    **own_run_figures(own),
    **floor_figures(floors, own),
    "seconds": time.perf_counter() - start,
    "rows": list(rows.values()),
    "layers": [{"name": n, "max_abs_diff": d.largest, "rms_diff": d.rms, "relative_rms_diff": d.relative} for n, d in own.layers.items()],
  }


def compare_names(first: Any, second: Any, leaves: tuple[Leaves, Leaves]) -> list[str]:
  """Failures for quantizers that only one model has, or has switched on, and for other specifications."""
  failures = []
  for what, ones, others in (
    ("exist", set(first.quantizers()), set(second.quantizers())),
    ("are enabled", set(leaves[0]), set(leaves[1])),
  ):
    for where, left in (("torch", ones - others), ("JAX", others - ones)):
      if left:
        failures.append(f"{len(left)} quantizers {what} only in {where}: {shorten(sorted(left))}")
  other_specs = [
    n for n in leaves[0] if n in leaves[1] and [leaf.config for leaf in leaves[0][n]] != [leaf.config for leaf in leaves[1][n]]
  ]
  if other_specs:
    failures.append(f"{len(other_specs)} quantizers have other specifications: {shorten(other_specs)}")
  return failures


def state_row(name: str, ones: Sequence[Leaf], others: Sequence[Leaf]) -> dict[str, Any]:
  """What is known of a quantizer before it has quantized anything."""
  weight = name.endswith("weight_quantizer")
  return {
    "name": name,
    "kind": "weight" if weight else "activation",
    "format": ", ".join(leaf.config.describe() for leaf in ones),
    "spec_equal": [leaf.config for leaf in ones] == [leaf.config for leaf in others],
    "amax_equal": all(same_state(a, b) for a, b in zip(ones, others, strict=True)),
    "amax_relative_diff": max(amax_distance(a, b) for a, b in zip(ones, others, strict=True)),
    **count_fields(Count()),
    "values_differing": 0,
    "same_input_amax_differing": 0,
  }


def same_state(a: Leaf, b: Leaf) -> bool:
  """Whether the calibrated state is equal, bit for bit."""
  for one, other in ((a.amax, b.amax), (a.tensor_amax, b.tensor_amax)):
    if (one is None) != (other is None) or (one is not None and other is not None and differing(one, other)):
      return False
  return True


def amax_distance(a: Leaf, b: Leaf) -> float:
  """Largest relative difference of the calibrated state; infinity where the shapes differ or only one has it."""
  largest = 0.0
  for one, other in ((a.amax, b.amax), (a.tensor_amax, b.tensor_amax)):
    if one is None and other is None:
      continue
    if one is None or other is None or one.shape != other.shape:
      return float("inf")
    difference = np.abs(one.astype(np.float64) - other)
    largest = max(largest, float(np.max(difference / np.maximum(np.abs(one), np.finfo(np.float32).tiny), initial=0.0)))
  return largest


def pairs(ones: Iterator[Weight], others: Iterator[Weight]) -> Iterator[tuple[Weight, Weight]]:
  """Weights of one name, from two iterators in the order of names; those that only one has are skipped."""
  one, other = next(ones, None), next(others, None)
  while one is not None and other is not None:
    if one.name == other.name:
      yield one, other
      one, other = next(ones, None), next(others, None)
    elif one.name < other.name:
      one = next(ones, None)
    else:
      other = next(others, None)


def compare_weight(row: dict[str, Any], weight: Weight, other: Weight) -> None:
  """Codes, scales and values of one weight; its codes must also decode to the values that the model computes with."""
  count = Count()
  codes = on_torch.encode(weight.before, weight.leaves), on_jax.encode(other.before, other.leaves)
  count.add(*codes)
  row |= count_fields(count)
  row["values_differing"] = differing(on_torch.numpy_of(weight.after), np.asarray(other.after))
  decoded = (
    on_torch.numpy_of(on_torch.decode(codes[0], weight.leaves[-1].spec, weight.after)),
    np.asarray(on_jax.decode(codes[1], other.leaves[-1].spec, other.after)),
  )
  row["replayed_differing"] = differing(decoded[0], on_torch.numpy_of(weight.after)) + differing(decoded[1], np.asarray(other.after))


def share_amax(second: Any, leaves: tuple[Leaves, Leaves], activations: set[str], rows: dict[str, dict[str, Any]]) -> list[str]:
  """With a float64 carrier both calibrations must agree; where they do not, JAX takes torch's state, and that is a failure."""
  wrong = [name for name in sorted(activations) if not rows[name]["amax_equal"]]
  if wrong:
    second.adopt({name: leaves[0][name] for name in wrong})
    return [f"amax of {len(wrong)} activation quantizers differs (torch's was taken for both): {shorten(wrong)}"]
  return []


class SameInput:
  """Hands the torch input of each quantizer to both backends."""

  def __init__(
    self, leaves: tuple[Leaves, Leaves], ones: Mapping[str, Any], others: Mapping[str, Any], rows: dict[str, dict[str, Any]]
  ) -> None:
    self._leaves, self._ones, self._others, self._rows = leaves, ones, others, rows

  def __call__(self, name: str, x: Any, y: Any, codes: Codes) -> None:
    if name not in self._rows:
      return
    row, own = self._rows[name], self._leaves[0][name]
    # JAX's own specification with torch's amax: in float32 the two calibrations differ in the last bits of the activations they saw.
    leaves = tuple(leaf._replace(config=other.config) for leaf, other in zip(own, self._leaves[1][name], strict=True))
    other = on_jax.with_amax(self._others[name], leaves)
    given = on_jax.array(on_torch.numpy_of(x))
    count = Count()
    count.add(codes, on_jax.encode(on_jax.prepare(other, given), leaves))
    for key, value in count_fields(count).items():
      row[key] += value
    row["values_differing"] += differing(on_torch.numpy_of(y), np.asarray(other(given)))
    # The first of a sequence is calibrated on the input itself.
    prepared = on_torch.prepare(self._ones[name], x), on_jax.prepare(other, given)
    found = on_torch.amax_of(prepared[0], own[0].spec), on_jax.amax_of(prepared[1], leaves[0].spec)
    row["same_input_amax_differing"] += differing(*found)


def judge(rows: Mapping[str, dict[str, Any]], own: Comparison, kind: str) -> list[str]:
  """What had to be equal and is not."""
  failures = []
  weights = [row for row in rows.values() if row["kind"] == "weight"]
  activations = [row for row in rows.values() if row["kind"] == "activation"]
  exact = [(weights, key) for key in ("codes_differing", "scales_differing", "values_differing", "replayed_differing")]
  if kind == "float32":
    exact += [(activations, key) for key in ("codes_differing", "scales_differing", "values_differing", "same_input_amax_differing")]
  for group, key in exact:
    wrong = [row["name"] for row in group if row.get(key)]
    if wrong:
      count = sum(row.get(key, 0) for row in group)
      failures.append(f"{count} {group[0]['kind']} {key.replace('_', ' ')}, in {len(wrong)} quantizers: {shorten(wrong)}")
  unequal = [row["name"] for row in weights if not row["amax_equal"]]
  unequal += [row["name"] for row in activations if kind == "float32" and row["amax_relative_diff"] > FLOAT32_AMAX_LIMIT]
  if unequal:
    failures.append(f"calibrated amax differs in {len(unequal)} quantizers: {shorten(unequal)}")
  if own.replayed:
    failures.append(f"{own.replayed} activation codes do not decode to what the quantizers returned")
  if own.untold:
    failures.append(f"activation quantizers that only one model ran: {shorten(sorted(own.untold))}")
  return failures + (judge_float64(own) if kind == "float64" else [])


def judge_float64(own: Comparison) -> list[str]:
  """At most one code or scale in 10^7 differs; where none does the logits agree."""
  failures, total = [], own.total
  for what, count, compared in (("codes", total.differing, total.compared), ("scales", total.scales_differing, total.scales_compared)):
    if count > FLOAT64_CODE_LIMIT * compared:
      failures.append(f"{count} of {compared} activation {what} differ, more than one in 10^7")
  if total.differing == total.scales_differing == 0 and own.logits.largest > FLOAT64_LOGIT_LIMIT:
    failures.append(f"no code differs, yet logits are {own.logits.largest:.3g} apart; allowed is {FLOAT64_LOGIT_LIMIT}")
  return failures


def count_fields(count: Count) -> dict[str, int]:
  """The fields of a row that hold counts."""
  return {
    "codes_compared": count.compared,
    "codes_differing": count.differing,
    "scales_compared": count.scales_compared,
    "scales_differing": count.scales_differing,
  }


def totals(rows: Mapping[str, dict[str, Any]]) -> dict[str, int]:
  """Sums over the weight and the activation quantizers."""
  return {
    f"{kind}_{key}": sum(row[key] for row in rows.values() if row["kind"] == kind)
    for kind in ("weight", "activation")
    for key in count_fields(Count())
  }


def own_run_figures(own: Comparison) -> dict[str, Any]:
  """Figures of the two models running on their own."""
  return {
    "own_run_codes_compared": own.total.compared,
    "own_run_codes_differing": own.total.differing,
    "logits_max_abs_diff": own.logits.largest,
    "logits_rms_diff": own.logits.rms,
    "layers_max_abs_diff": max((d.largest for d in own.layers.values()), default=0.0),
  }


def floor_figures(found: Sequence[Comparison], own: Comparison) -> dict[str, Any]:
  """The same figures for torch against itself, the largest over the orders of summation, and how far the backends are apart in units of it
  (about 1 where they agree as well as one does with itself); None without an order."""
  largest = max((c.logits.rms for c in found), default=0.0)
  return {
    "logits_rms_over_floor": own.logits.rms / largest if largest else None,
    "floor_codes_differing": max((c.total.differing for c in found), default=None),
    "floor_logits_max_abs_diff": max((c.logits.largest for c in found), default=None),
    "floor_logits_rms_diff": max((c.logits.rms for c in found), default=None),
  }


def shorten(names: Sequence[str]) -> str:
  """The first names of a list."""
  return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
