"""The result of a search as plain data that JSON can hold, and what can be asked of it later: other budgets, configurations, the front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from core.search import configs, spaces
from core.search.costs import Counting, read_cost_model
from core.search.host import SearchLayer
from core.search.plan import OPTIONS, Plan
from core.search.solver import Solution, solve

VERSION = 1
KIND = "auto_quantize"
State = dict[str, Any]


def make_state(plan: Plan, constraints: Mapping[str, Any], scored: Mapping[str, Any], **facts: Any) -> State:
  """Solve, and put everything down.

  Args:
    plan: the problem.
    constraints: as the user wrote them.
    scored: what `scores.table` returned.
    facts: method, seed, batches and the like.
  """
  solution = solve(scored["scores"], plan.limits(constraints))
  return {
    "kind": KIND,
    "version": VERSION,
    **facts,
    **_outcome(plan, constraints, solution),
    "groups": {group: list(members) for group, members in plan.groups.items()},
    "choices": {group: list(names) for group, names in plan.choices.items()},
    "scores": scored["scores"],
    "layer_scores": scored["layer_scores"],
    "bits": bits_per_weight(plan),
    "weights": plan.weights(),
    "formats": spaces.to_plain(plan.formats),
    "layers": {layer.name: _layer(layer) for layer in plan.layers},
    "counting": {**dataclasses.asdict(plan.counting), "excluded": list(plan.counting.excluded)},
    "costs": plan.tables,
  }


def _outcome(plan: Plan, constraints: Mapping[str, Any], solution: Solution) -> State:
  return {
    "constraints": {**constraints},
    "assignment": solution.assignment,
    "objective": solution.objective,
    "effective_bits": plan.effective_bits(solution.assignment),
    "weight_bytes": plan.weight_bytes(solution.assignment),
    "limits": {limit.name: limit.value(solution.assignment) for limit in plan.limits(constraints)},
    "proven": solution.proven,
  }


def bits_per_weight(plan: Plan) -> dict[str, dict[str, float]]:
  """Group -> format -> bits per weight, whatever a cost model makes of the group."""
  numel = {layer.name: layer.copies * math.prod(layer.shape) for layer in plan.layers}
  return {g: {f: bits / sum(numel[m] for m in plan.groups[g]) for f, bits in row.items()} for g, row in plan.total_bits(False).items()}


def _layer(layer: SearchLayer) -> dict[str, Any]:
  found = dataclasses.asdict(layer)
  del found["name"]
  return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def plan_of(state: Mapping[str, Any]) -> Plan:
  """The problem that a state was the answer to.

  Raises:
    ValueError: it is no search_state.
  """
  if not isinstance(state, Mapping) or state.get("kind") != KIND or state.get("version") != VERSION:
    raise ValueError(
      f"this is no search_state of auto_quantize of version {VERSION}; pass the second value that auto_quantize returned, or that value "
      "read back from JSON"
    )
  layers = tuple(
    SearchLayer(name, tuple(row["shape"]), tuple(row["quantizers"]), tuple(row["classes"]), row["copies"])
    for name, row in state["layers"].items()
  )
  counting = Counting(**{**state["counting"], "excluded": tuple(state["counting"]["excluded"])})
  groups = {group: tuple(members) for group, members in state["groups"].items()}
  choices = {group: tuple(names) for group, names in state["choices"].items()}
  return Plan(layers, spaces.from_plain(state["formats"]), groups, choices, counting, dict(state["costs"]))


def with_constraints(state: Mapping[str, Any], constraints: Mapping[str, Any]) -> State:
  """The state of the same scores under other constraints.

  Raises:
    ValueError: no search_state, or constraints that cannot be met.
  """
  plan = plan_of(state)
  if any(key in constraints for key in OPTIONS):
    plan = dataclasses.replace(plan, counting=read_cost_model(constraints, plan.counting))
  solution = solve(state["scores"], plan.limits(constraints))
  counting = {**dataclasses.asdict(plan.counting), "excluded": list(plan.counting.excluded)}
  return {**state, **_outcome(plan, constraints, solution), "weights": plan.weights(), "counting": counting}


def get_auto_quantize_config(search_state: Mapping[str, Any], constraints: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """An ordinary configuration that makes the searched model through `quantize`, in PyTorch and in JAX.

  Every format keeps its algorithm. Where the algorithms differ, each runs on its own layers alone (`include`), after max calibration.

  Args:
    search_state: what `auto_quantize` returned, or the same read back from JSON.
    constraints: another budget for the same scores; None takes what was found.

  Returns:
    {"quant_cfg": list of rules, one per quantizer that is on, "algorithm": ...}.

  Raises:
    ValueError: no search_state, or a budget that cannot be met; names the least possible.
  """
  state = search_state if constraints is None else with_constraints(search_state, constraints)
  plan = plan_of(state)
  return config_of(plan, state["assignment"])


def config_of(plan: Plan, assignment: Mapping[str, str]) -> dict[str, Any]:
  """The configuration of an assignment.

  Raises:
    ValueError: an assignment that quantizes nothing, which no configuration says.
  """
  config = configs.compose(configs.of_groups(assignment, plan.groups), plan.layers, plan.formats)
  if len(config["quant_cfg"]) == 1:
    raise ValueError("the assignment leaves every layer unquantized, so there is nothing to quantize; lower the budget, or leave None out")
  return config


def pareto_front(search_state: Mapping[str, Any], budgets: Sequence[float] | int = 33, constraint: str = "effective_bits") -> list[State]:
  """The best assignment for each of several budgets, from one set of scores.

  Args:
    search_state: what `auto_quantize` returned.
    budgets: values of the constraint, or how many of them, evenly from the least possible to the most that is of use.
    constraint: the name of the limit.

  Returns:
    Ascending, without those that repeat the assignment before them: {"budget", "value", "objective", "effective_bits", "weight_bytes",
    "assignment", "proven"}; "value" is what the assignment needs of the budget.

  Raises:
    ValueError: no search_state, a budget that cannot be met, or fewer than two budgets to choose.
  """
  plan = plan_of(search_state)
  if isinstance(budgets, int):
    if budgets < 2:
      raise ValueError(f"budgets is {budgets}; allowed are a number of at least 2, and a list of budgets")
    [limit] = plan.limits({constraint: 1e300})
    least, most = limit.least(), limit.most()
    budgets = [least + (most - least) * i / (budgets - 1) for i in range(budgets)]
  rows: list[State] = []
  for budget in sorted(budgets):
    limits = plan.limits({constraint: budget})
    solution = solve(search_state["scores"], limits)
    if rows and rows[-1]["assignment"] == solution.assignment:
      continue
    rows.append(
      {
        "budget": float(budget),
        "value": limits[0].value(solution.assignment),
        "objective": solution.objective,
        "effective_bits": plan.effective_bits(solution.assignment),
        "weight_bytes": plan.weight_bytes(solution.assignment),
        "assignment": solution.assignment,
        "proven": solution.proven,
      }
    )
  return rows
