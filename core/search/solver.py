"""The choice: one format per group, least total score, every limit kept. Exact, and the same whatever the order of the groups.

Scores become whole numbers on a grid of 2^-50 of their largest possible sum (below their own rounding error), costs likewise, so that sums
have no order and ties are ties. HiGHS finds a solution; a dynamic program over the groups, pruned by that solution and by the bounds of
the linear relaxation, proves it or finds the better one, and settles ties: least score, then least cost (limit by limit, in their order),
then the formats that come first in the alphabet, group by group in the alphabet.

References: Kellerer, Pferschy, Pisinger, 2004, "Knapsack Problems", chapter 11 (the multiple-choice knapsack problem).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from core.search.program import Program, states_of

Table = Mapping[str, Mapping[str, float]]
GRID_BITS = 50


@dataclasses.dataclass(frozen=True)
class Limit:
  """An upper limit on a sum over the groups.

  Attributes:
    name: as the user wrote it.
    table: group -> format -> cost.
    bound: the largest value of sum / unit.
    unit: what the sum is divided by (the number of weights, for bits per weight).
  """

  name: str
  table: Table
  bound: float
  unit: float = 1.0

  def value(self, assignment: Mapping[str, str]) -> float:
    """sum / unit of an assignment."""
    return math.fsum(self.table[g][f] for g, f in assignment.items()) / self.unit if self.unit else 0.0

  def least(self) -> float:
    """The least that any assignment needs."""
    return math.fsum(min(row.values()) for row in self.table.values()) / self.unit if self.unit else 0.0

  def most(self) -> float:
    """The most that any assignment needs."""
    return math.fsum(max(row.values()) for row in self.table.values()) / self.unit if self.unit else 0.0

  def check(self) -> None:
    """Raises:
    ValueError: no assignment keeps within the limit; names the least possible.
    """
    if self.least() > self.bound * (1 + 1e-12):
      raise ValueError(
        f"{self.name} of {self.bound:g} cannot be reached: the least possible is {_up(self.least()):.7g}, with every group in its cheapest "
        "format; allow more, add a smaller format, or disable fewer layers"
      )


def _up(value: float, digits: int = 7) -> float:
  """Rounded up to so many digits, so that the number printed is one that can be reached."""
  if value <= 0:
    return value
  step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
  return math.ceil(value / step) * step


@dataclasses.dataclass(frozen=True)
class Solution:
  """What the solver found.

  Attributes:
    assignment: group -> format, sorted by group.
    objective: sum of the chosen scores.
    proven: the dynamic program ran to its end; otherwise (too many states) the solution is HiGHS's own, optimal to its tolerance.
  """

  assignment: dict[str, str]
  objective: float
  proven: bool = True


def solve(scores: Table, limits: Sequence[Limit]) -> Solution:
  """The assignment of least total score within the limits.

  Args:
    scores: group -> format -> score, finite; the formats of a group are its choices.
    limits: limits over the same groups and formats.

  Raises:
    ValueError: a score that is not finite, or limits that cannot all be kept.
  """
  names = sorted(scores)
  if not names:
    return Solution({}, 0.0)
  formats = [sorted(scores[name]) for name in names]
  for name, row in scores.items():
    for choice, score in row.items():
      if not math.isfinite(score):
        raise ValueError(f"the score of {name!r} in format {choice!r} is {score}; scores must be finite")
  for limit in limits:
    limit.check()
  points = [[scores[n][f] for f in row] for n, row in zip(names, formats, strict=True)]
  cost_rows = [[[limit.table[n][f] for f in row] for n, row in zip(names, formats, strict=True)] for limit in limits]
  program = Program(
    on_grid(points)[0],
    [on_grid(rows)[0] for rows in cost_rows],
    [_whole_bound(rows, limit) for rows, limit in zip(cost_rows, limits, strict=True)],
  )
  chosen, proven = states_of(program, _highs(program, limits), _prices(program) if len(limits) > 1 else ())
  assignment = {n: row[i] for n, row, i in zip(names, formats, chosen, strict=True)}
  return Solution(assignment, math.fsum(scores[n][f] for n, f in assignment.items()), proven)


def on_grid(rows: Sequence[Sequence[float]]) -> tuple[list[np.ndarray], float]:
  """Numbers as multiples of a power of two, so small that their sums stay below 2^50; whole numbers stay exact where they fit.

  Returns:
    (int64 arrays, the multiple of 1 that stands for one unit).
  """
  largest = math.fsum(max(abs(value) for value in row) for row in rows)
  scale = 2.0 ** (GRID_BITS - math.frexp(largest)[1]) if largest > 0 else 1.0
  return [np.array([round(value * scale) for value in row], np.int64) for row in rows], scale


def _whole_bound(rows: Sequence[Sequence[float]], limit: Limit) -> int:
  # A sum of rounded numbers may pass its bound by half a step each; the relative part is the rounding of the bound itself.
  _, scale = on_grid(rows)
  slack = len(rows) if any(value * scale != round(value * scale) for row in rows for value in row) else 0
  return math.floor(limit.bound * limit.unit * scale * (1 + 1e-12)) + slack


def _highs(program: Program, limits: Sequence[Limit]) -> list[int]:
  """HiGHS's solution, as a place per group.

  Raises:
    ValueError: the limits cannot all be kept.
    ModuleNotFoundError: scipy is missing.
  """
  try:
    from scipy import optimize, sparse
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("auto_quantize solves with scipy; install it with `pip install scipy` or the extra 'search'") from error
  sizes = [len(row) for row in program.scores]
  groups = np.repeat(np.arange(len(sizes)), sizes)
  total = len(groups)
  one_each = sparse.csr_array((np.ones(total), (groups, np.arange(total))), shape=(len(sizes), total))
  objective = np.concatenate([row - row.min() for row in program.scores]).astype(float)
  # HiGHS stops at an absolute gap of 1e-6: the scores are scaled so that this is next to nothing.
  objective *= 2.0**20 / max(objective.max(), 1.0)
  ends = np.cumsum(sizes)
  chosen = None
  for factor in (1.0, 1 - 2e-6):  # the second where rounding let the first pass a limit
    rules = [optimize.LinearConstraint(one_each, 1, 1)]
    for costs, bound in zip(program.costs, program.bounds, strict=True):
      rules.append(optimize.LinearConstraint(np.concatenate(costs).astype(float)[None] / max(bound, 1), -np.inf, factor))
    result = optimize.milp(
      objective, constraints=rules, integrality=np.ones(total), bounds=optimize.Bounds(0, 1), options={"mip_rel_gap": 0}
    )
    if result.x is not None:
      chosen = [int(np.argmax(result.x[end - size : end])) for end, size in zip(ends, sizes, strict=True)]
      if program.is_feasible(chosen):
        return chosen
  if chosen is None:
    named = ", ".join(f"{limit.name} <= {limit.bound:g} (alone at least {_up(limit.least()):.7g})" for limit in limits)
    raise ValueError(f"the limits cannot all be kept at once: {named}; allow more of one of them")
  return chosen


def _prices(program: Program) -> list[float]:
  """What one unit of every limit is worth in scores: the dual solution of the linear relaxation."""
  from scipy import optimize

  sizes = [len(row) for row in program.scores]
  scores = np.concatenate(program.scores).astype(float)
  top, units = max(float(scores.max()), 1.0), np.maximum(np.array(program.bounds, float), 1.0)
  costs = np.stack([np.concatenate(rows).astype(float) for rows in program.costs]) / units[:, None]
  equal = np.repeat(np.eye(len(sizes)), sizes, axis=1)
  bounds = np.array(program.bounds, float) / units
  result = optimize.linprog(scores / top, A_ub=costs, b_ub=bounds, A_eq=equal, b_eq=np.ones(len(sizes)), method="highs")
  return [] if result.x is None else (-result.ineqlin.marginals * top / units).tolist()
