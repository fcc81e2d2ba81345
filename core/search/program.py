"""The dynamic program behind `solver`: whole numbers, all undominated ways to fill the first groups, pruned by bounds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

MOST_STATES = 400_000
MOST_STATES_OF_SEVERAL_LIMITS = 20_000  # where ways are compared one by one


@dataclasses.dataclass(frozen=True)
class Program:
  """Scores and costs as whole numbers; formats of a group stand in the order that decides ties.

  Attributes:
    scores: per group, [formats] int64.
    costs: per limit and group, [formats] int64.
    bounds: per limit, the largest sum of its costs.
  """

  scores: Sequence[np.ndarray]
  costs: Sequence[Sequence[np.ndarray]]
  bounds: Sequence[int]

  def is_feasible(self, chosen: Sequence[int]) -> bool:
    return all(sum(int(c[i]) for c, i in zip(costs, chosen, strict=True)) <= b for costs, b in zip(self.costs, self.bounds, strict=True))

  def score(self, chosen: Sequence[int]) -> int:
    return sum(int(s[i]) for s, i in zip(self.scores, chosen, strict=True))


@dataclasses.dataclass
class _Level:
  """Ways to fill the groups so far: [n] scores, [limits, n] costs, and where each came from."""

  scores: np.ndarray
  costs: np.ndarray
  parent: np.ndarray
  choice: np.ndarray


def states_of(program: Program, start: Sequence[int], prices: Sequence[float] = ()) -> tuple[list[int], bool]:
  """The best choice per group.

  Args:
    program: the problem.
    start: a solution that prunes; it may break a limit by a rounding error, then it only serves if nothing else is found.
    prices: of a unit of each limit, not negative, in scores: they make a bound (Lagrange's) of all limits together. () for none.

  Returns:
    (place per group, whether it is proven to be the best). Least score, then least costs in the order of the limits, then the smallest
    places, group by group.
  """
  ceiling = program.score(start) if program.is_feasible(start) else None
  relaxations = [_Relaxation.of(program, k) for k in range(len(program.bounds))]
  rest = np.cumsum([0, *(int(s.min()) for s in reversed(program.scores))])[::-1]
  priced = _Priced.of(program, prices) if len(prices) else None
  limits = len(program.bounds)
  most = MOST_STATES if limits < 2 else min(MOST_STATES, MOST_STATES_OF_SEVERAL_LIMITS)
  level = _Level(np.zeros(1, np.int64), np.zeros((limits, 1), np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))
  levels = []
  for place, scores in enumerate(program.scores):
    grown = _grow(level, scores, [costs[place] for costs in program.costs])
    level = _kept(grown, _alive(grown, program, relaxations, place + 1, int(rest[place + 1]), ceiling))
    if priced is not None and ceiling is not None:
      level = _kept(level, priced.bound(place + 1, level) <= ceiling)
    if len(level.scores) > most or not len(level.scores):
      return list(start), False
    level = _kept(level, _undominated(level))
    levels.append(level)
  order = np.lexsort((*level.costs[::-1], level.scores))
  index = int(order[0])
  chosen = []
  for level in reversed(levels):
    chosen.append(int(level.choice[index]))
    index = int(level.parent[index])
  return chosen[::-1], True


def _grow(level: _Level, scores: np.ndarray, costs: Sequence[np.ndarray]) -> _Level:
  """Every way with every format of the next group. Ways stay in the order of their places, group by group."""
  n, m = len(level.scores), len(scores)
  grown = (
    np.stack([(level.costs[k][:, None] + costs[k][None]).ravel() for k in range(len(costs))]) if costs else np.zeros((0, n * m), np.int64)
  )
  return _Level((level.scores[:, None] + scores[None]).ravel(), grown, np.repeat(np.arange(n), m), np.tile(np.arange(m), n))


def _kept(level: _Level, keep: np.ndarray) -> _Level:
  return _Level(level.scores[keep], level.costs[:, keep], level.parent[keep], level.choice[keep])


def _alive(level: _Level, program: Program, relaxations: Sequence[_Relaxation], done: int, rest: int, ceiling: int | None) -> np.ndarray:
  """Ways that can still keep every limit and reach a score of at most `ceiling`."""
  alive = np.ones(len(level.scores), bool)
  for k, relaxation in enumerate(relaxations):
    alive &= level.costs[k] + relaxation.least[done] <= program.bounds[k]
  if ceiling is None:
    return alive
  alive &= level.scores + rest <= ceiling
  for k, relaxation in enumerate(relaxations):
    alive &= level.scores + relaxation.bound(done, program.bounds[k] - level.costs[k]) <= ceiling
  return alive


def _undominated(level: _Level) -> np.ndarray:
  """Indices, in their order, of the ways that no other one beats in score and every cost; of equal ones the first."""
  n = len(level.scores)
  if not len(level.costs):
    return np.array([int(np.argmin(level.scores))]) if n else np.zeros(0, np.int64)
  order = np.lexsort((np.arange(n), level.scores, *level.costs[::-1]))
  if len(level.costs) == 1:
    scores = level.scores[order]
    before = np.concatenate([[np.iinfo(np.int64).max], np.minimum.accumulate(scores)[:-1]])
    return np.sort(order[scores < before])
  # Sorted by costs, a way can only be beaten by one before it: compare with those kept so far.
  kept: list[int] = []
  rows = np.vstack([level.scores[None], level.costs])[:, order]
  held = np.empty((n, len(rows)), np.int64)
  for i in range(n):
    if not (held[: len(kept)] <= rows[:, i]).all(axis=1).any():
      held[len(kept)] = rows[:, i]
      kept.append(i)
  return np.sort(order[kept])


@dataclasses.dataclass(frozen=True)
class _Priced:
  """Lower bounds of whole scores with every limit at a price: score + sum of price (cost - bound), and the least of that for the rest.

  References: Everett, 1963, "Generalized Lagrange multiplier method".
  """

  prices: np.ndarray
  bounds: np.ndarray
  rest: np.ndarray

  @classmethod
  def of(cls, program: Program, prices: Sequence[float]) -> _Priced:
    rates = np.maximum(np.asarray(prices, float), 0.0)
    least = [
      float(np.min(scores + rates @ np.stack([costs[place] for costs in program.costs]).astype(float)))
      for place, scores in enumerate(program.scores)
    ]
    return cls(rates, np.array(program.bounds, float), np.cumsum([0.0, *least[::-1]])[::-1])

  def bound(self, place: int, level: _Level) -> np.ndarray:
    """[n], a little below the true one for the rounding of floats."""
    paid = self.prices @ level.costs.astype(float)
    budget = float(self.prices @ self.bounds)
    value = level.scores + paid - budget + self.rest[place]
    return value - 2.0 - 1e-11 * (np.abs(paid) + budget + abs(self.rest[place]) + level.scores)


@dataclasses.dataclass(frozen=True)
class _Relaxation:
  """Lower bounds of the score that the last groups add, for a budget: the linear relaxation under one limit.

  Attributes:
    least: [groups + 1] least cost of the groups from each place on.
    budgets, scores: per place, the corners of the bound as a function of the budget, both ascending and descending.
  """

  least: np.ndarray
  budgets: list[np.ndarray]
  scores: list[np.ndarray]

  @classmethod
  def of(cls, program: Program, limit: int) -> _Relaxation:
    """Start every group at its cheapest format, then take the steps of all groups' lower convex hulls, steepest first."""
    costs = program.costs[limit]
    count = len(costs)
    least = np.zeros(count + 1, np.int64)
    budgets, scores = [np.zeros(1)] * (count + 1), [np.zeros(1)] * (count + 1)
    base, steps = 0, []
    for place in range(count - 1, -1, -1):
      hull = _hull(costs[place], program.scores[place])
      least[place] = least[place + 1] + hull[0][0]
      base += hull[0][1]
      steps += [(c1 - c0, s1 - s0) for (c0, s0), (c1, s1) in itertools.pairwise(hull)]
      steps.sort(key=lambda step: step[1] / step[0])
      spread = np.array([(0, 0), *steps], np.int64).cumsum(axis=0)
      budgets[place], scores[place] = (least[place] + spread[:, 0]).astype(float), (base + spread[:, 1]).astype(float)
    return cls(least, budgets, scores)

  def bound(self, place: int, budget: np.ndarray) -> np.ndarray:
    """[n] whole-number lower bound for budgets [n], a little below the relaxation for the rounding of floats."""
    value = np.interp(budget.astype(float), self.budgets[place], self.scores[place])
    return np.floor(value - 2.0 - np.abs(value) * 1e-12).astype(np.int64)


def _hull(costs: np.ndarray, scores: np.ndarray) -> list[tuple[int, int]]:
  """Lower convex hull of (cost, score), from the cheapest point to the one of least score."""
  hull: list[tuple[int, int]] = []
  for cost, score in sorted(zip(costs.tolist(), scores.tolist(), strict=True)):
    if hull and score >= hull[-1][1]:
      continue
    while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (cost - hull[-1][0]) >= (score - hull[-1][1]) * (hull[-1][0] - hull[-2][0]):
      hull.pop()
    hull.append((cost, score))
  return hull
