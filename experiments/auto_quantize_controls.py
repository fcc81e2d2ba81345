"""What a search has to beat: every layer in one format, and random assignments that use the same budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.search import state as states
from core.search.spaces import NONE


def objective(scores: Mapping[str, Mapping[str, float]], assignment: Mapping[str, str]) -> float:
  """Sum of the scores of an assignment."""
  return math.fsum(scores[group][choice] for group, choice in assignment.items())


def _entry(state: Mapping[str, Any], kind: str, assignment: Mapping[str, str], **facts: Any) -> dict[str, Any]:
  plan = states.plan_of(state)
  return {
    "kind": kind,
    **facts,
    "effective_bits": plan.effective_bits(assignment),
    "objective": objective(state["scores"], assignment),
    "config": states.config_of(plan, assignment),
  }


def uniform(state: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One entry per format, every group in it that may have it; the others keep what they can be at the fewest bits."""
  bits = state["bits"]
  found = []
  for name in state["formats"]:
    if name == NONE or all(name not in choices for choices in state["choices"].values()):
      continue
    chosen = {g: name if name in choices else min(choices, key=lambda c, g=g: bits[g][c]) for g, choices in state["choices"].items()}
    found.append(_entry(state, f"all {name}", chosen))
  return found


def random(state: Mapping[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
  """Random assignments with the bits of the searched one: groups in random order take a random format of more bits while the budget lasts.

  The rounds go on while anything fits, so the bits are those of the search but for less than what the smallest upgrade costs.
  """
  plan = states.plan_of(state)
  bits = plan.total_bits()
  budget = math.fsum(bits[group][choice] for group, choice in state["assignment"].items())
  found = []
  for seed in seeds:
    chosen = _random(bits, budget, np.random.default_rng(seed))
    found.append(_entry(state, "random", chosen, seed=seed, budget=state["constraints"]["effective_bits"]))
  return found


def _random(bits: Mapping[str, Mapping[str, float]], budget: float, rng: np.random.Generator) -> dict[str, str]:
  groups = list(bits)
  chosen = {group: min(row, key=lambda choice, row=row: row[choice]) for group, row in bits.items()}
  used = math.fsum(bits[group][choice] for group, choice in chosen.items())
  changed = True
  while changed:
    changed = False
    for group in (groups[i] for i in rng.permutation(len(groups))):
      now = bits[group][chosen[group]]
      better = [choice for choice, cost in bits[group].items() if cost > now and used - now + cost <= budget]
      if better:
        choice = better[int(rng.integers(len(better)))]
        used, chosen[group], changed = used - now + bits[group][choice], choice, True
  return chosen
