"""What a format costs in a layer: the bits that are stored, scales included; the peer's count; or a table of the user's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import core
from core.config import Resolved, matches_name
from core.config.frozen import check_keys
from core.search.host import SearchLayer
from core.search.spaces import WEIGHT, Format

ACCOUNTINGS = ("stored", "modelopt")
COST_MODELS = ("weight", "active_moe")
EXPERTS = "*experts.*"
# Algorithms that store more than codes and scales: a factor per input channel, and factors of a low-rank branch.
SCALED = ("smoothquant", "awq_lite", "awq_full", "svdquant")
LOW_RANK = "svdquant"


@dataclasses.dataclass(frozen=True)
class Counting:
  """How bits are counted.

  Attributes:
    accounting: "stored" (codes, scales, zero points, tensor scales, factors of the algorithm), or "modelopt": the peer's count, one
      number per format, the least over all its rules.
    unquantized_bits: bits of an unquantized weight, and of factors that an algorithm stores.
    active_expert_ratio: share of the experts that a token meets; their layers count that much. None counts all alike.
    excluded: patterns of layers that count nothing.
  """

  accounting: str = "stored"
  unquantized_bits: int = 16
  active_expert_ratio: float | None = None
  excluded: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self.accounting not in ACCOUNTINGS:
      raise ValueError(f"accounting is {self.accounting!r}; allowed are {', '.join(map(repr, ACCOUNTINGS))}")
    if self.unquantized_bits not in (16, 32):
      raise ValueError(f"unquantized_bits is {self.unquantized_bits!r}; allowed are 16 and 32")
    ratio = self.active_expert_ratio
    if ratio is not None and not 0 < ratio <= 1:
      raise ValueError(f"active_moe_expert_ratio is {ratio!r}; allowed is a number above 0 and at most 1, such as 2 / 8")

  def weight(self, layer: SearchLayer) -> float:
    """How much a layer counts."""
    if any(matches_name(pattern, layer.name) for pattern in self.excluded):
      return 0.0
    if self.active_expert_ratio is not None and matches_name(EXPERTS, layer.name + "."):
      return self.active_expert_ratio
    return 1.0


def read_cost_model(constraints: Mapping[str, Any], counting: Counting) -> Counting:
  """ModelOpt's "cost_model" and "cost" among the constraints.

  Raises:
    ValueError: unknown names, or a ratio out of range.
  """
  model, options = constraints.get("cost_model", "weight"), constraints.get("cost") or {}
  if model not in COST_MODELS:
    raise ValueError(f"constraints['cost_model'] is {model!r}; allowed are {', '.join(map(repr, COST_MODELS))}")
  check_keys("constraints['cost']", options, ("active_moe_expert_ratio", "excluded_module_name_patterns"))
  ratio = options.get("active_moe_expert_ratio")
  if (model == "active_moe") != (ratio is not None):
    raise ValueError(
      f"cost_model {model!r} with active_moe_expert_ratio {ratio!r}; 'active_moe' needs the ratio (experts per token / experts), 'weight' "
      "takes none"
    )
  excluded = tuple(options.get("excluded_module_name_patterns") or ())
  return dataclasses.replace(counting, active_expert_ratio=ratio, excluded=excluded)


def stored_bits(layer: SearchLayer, one: Format, counting: Counting) -> float:
  """Bits of a layer's weight in one format, all copies together. A whole number in "stored" accounting."""
  numel = math.prod(layer.shape)
  state = one.resolve(layer)
  if counting.accounting == "modelopt":
    bits = _modelopt_bits(one, layer) if state else 16.0
    return layer.copies * numel * bits
  weight = state.get(WEIGHT)
  total = numel * counting.unquantized_bits if weight is None else min(_weight_bits(weight, layer.shape))
  return layer.copies * (total + _extra_values(layer, one, state) * counting.unquantized_bits)


def _weight_bits(state: Resolved, shape: tuple[int, ...]) -> list[int]:
  """Bits of a weight in each format of its sequence; what is stored is the one with the fewest."""
  return [round(core.effective_bits(config.spec, shape) * math.prod(shape)) for config in state.configs]


def _extra_values(layer: SearchLayer, one: Format, state: Mapping[str, Resolved]) -> int:
  """Numbers that the format's algorithm stores beside the weight: pre_quant_scale [K], low-rank factors [r, K] and [N, r]."""
  if one.config is None or not state or len(layer.shape) != 2:
    return 0
  rows, columns = layer.shape
  count = 0
  for step in one.config.algorithm:
    if step.method in SCALED and (step.method != "smoothquant" or "input_quantizer" in state):
      count += columns
    if step.method == LOW_RANK and WEIGHT in state:
      skipped = any(matches_name(pattern, layer.name) for pattern in step.options.get("skip_layers", ()))
      rank = int(step.options.get("lowrank", 32))
      count += 0 if skipped else min(rank, rows, columns) * (rows + columns)
  return count


def _modelopt_bits(one: Format, layer: SearchLayer) -> float:
  """ModelOpt 0.47: the configuration's effective_bits, else the least over its enabled rules of (effective_bits, or element bits)."""
  assert one.config is not None
  if one.config.effective_bits is not None:
    return one.config.effective_bits
  found = [
    config.effective_bits if config.effective_bits is not None else float(config.spec.element.bits)
    for state in one.resolve(layer).values()
    for config in state.configs
  ]
  return min(found)


def cost_table(
  table: Mapping[str, Mapping[str, float]], layers: Sequence[SearchLayer], formats: Sequence[str], name: str
) -> dict[str, Any]:
  """A user's table for every layer and format.

  Args:
    table: pattern of layer names -> format name -> cost of one layer; the last pattern that matches and has the format counts.
    layers: the layers.
    formats: names of the formats.
    name: the table's name, for messages.

  Returns:
    Layer -> format -> cost; formats that the table says nothing of are left out there.

  Raises:
    ValueError: no number, or a negative or infinite one.
  """
  for pattern, row in table.items():
    if not isinstance(row, Mapping):
      raise ValueError(f"costs[{name!r}][{pattern!r}] is {row!r}; a mapping from format names to numbers is needed")
    for key, value in row.items():
      if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"costs[{name!r}][{pattern!r}][{key!r}] is {value!r}; allowed are finite numbers of at least 0")
  found: dict[str, Any] = {}
  for layer in layers:
    rows = [row for pattern, row in table.items() if matches_name(pattern, layer.name)]
    found[layer.name] = {f: float(row[f]) for f in formats for row in rows if f in row}
  return found
