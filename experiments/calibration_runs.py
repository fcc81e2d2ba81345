"""Configurations crossed with calibration algorithms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from core.config import normalize
from core.config.frozen import thaw
from experiments import recipes
from experiments.setup import Config

BETWEEN = " / "  # between a configuration's name and its algorithm's


def name_of(row: Mapping[str, Any]) -> str:
  """The name of a row's configuration, with the algorithm that took the place of its own."""
  return row["config"] + (BETWEEN + row["algorithm"] if row.get("algorithm") else "")


def with_algorithms(configs: Iterable[Config], names: Iterable[str], layerwise: bool = False, checkpoint_dir: str = "") -> list[Config]:
  """Every configuration with every algorithm.

  Args:
    configs: configurations.
    names: names of recipes or methods; none keeps each configuration's own algorithm.
    layerwise: go block by block.
    checkpoint_dir: where an interrupted run goes on.

  Raises:
    ValueError: an unknown name.
  """
  chosen = recipes.algorithms(names)
  found = []
  for config in configs:
    for label, algorithm in (chosen or {"": None}).items():
      value = dict(config.value)
      if label:
        value["algorithm"] = algorithm
      more = {"layerwise": True} if layerwise else {}
      more |= {"checkpoint_dir": checkpoint_dir} if checkpoint_dir else {}
      if more:
        value["algorithm"] = [{**step.to_dict(), **(more if step.method != "max" else {})} for step in normalize(value).algorithm]
      name = config.name + (BETWEEN + label if label else "")
      found.append(Config(name, value, thaw(normalize(value).to_dict())))
  return found
