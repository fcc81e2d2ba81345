"""From a choice per layer to an ordinary configuration that `quantize` takes in either backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import AlgorithmConfig, Entry
from core.config.frozen import thaw
from core.search.host import SearchLayer
from core.search.spaces import Format, Formats


def compose(chosen: Mapping[str, str], layers: Sequence[SearchLayer], formats: Formats) -> dict[str, Any]:
  """A configuration in list form that gives every layer its format and switches everything else off.

  Where the formats' algorithms differ, max calibration comes first and every other algorithm runs on its own layers alone (`include`), in
  the order of the formats.

  Args:
    chosen: layer -> name of its format.
    layers: the layers, in the model's order.
    formats: formats by name.
  """
  entries = [Entry("*", None, None, False)]
  used: dict[tuple[AlgorithmConfig, ...], list[str]] = {one.config.algorithm: [] for one in formats.values() if one.config is not None}
  for layer in layers:
    one = formats.get(chosen.get(layer.name, ""))
    if one is None or one.config is None:
      continue
    on = one.resolve(layer)
    entries += [Entry(f"{layer.name}.{q}" if layer.name else q, None, state.configs, True) for q, state in on.items()]
    if on:
      used[one.config.algorithm].append(layer.name)
  return {"quant_cfg": [entry.to_dict() for entry in entries], "algorithm": _algorithm({a: names for a, names in used.items() if names})}


def _algorithm(used: Mapping[tuple[AlgorithmConfig, ...], Sequence[str]]) -> Any:
  if len(used) == 1:
    steps = [_plain(step) for step in next(iter(used))]
  else:
    steps: list[Any] = ["max"] if used else []
    for algorithm, names in used.items():
      steps += [{**_plain(step), "include": list(names)} for step in algorithm if step.method != "max"]
  return None if not steps else steps[0] if len(steps) == 1 else steps


def _plain(step: AlgorithmConfig) -> dict[str, Any]:
  return {"method": step.method, **thaw(step.options)}


def of_groups(assignment: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
  """Group -> format as layer -> format."""
  return {member: choice for group, choice in assignment.items() for member in groups[group]}


def covering(one: Format, choices: Mapping[str, Sequence[str]], layers: Sequence[SearchLayer], formats: Formats) -> dict[str, Any]:
  """The configuration that gives one format to every layer that may have it."""
  return compose({layer.name: one.name for layer in layers if one.name in choices.get(layer.name, ())}, layers, formats)
