"""The solver against exhaustive search, ties included, and its indifference to order."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from core.search import program
from core.search.solver import Limit, solve

FORMATS = ("a4", "b8", "none")


def exhaustive(scores, limits):
  """The best of all assignments in exact rationals: least score, then least cost limit by limit, then formats in the alphabet."""
  names = sorted(scores)
  best = None
  for chosen in itertools.product(*(sorted(scores[n]) for n in names)):
    costs = tuple(sum(Fraction(limit.table[n][f]) for n, f in zip(names, chosen, strict=True)) for limit in limits)
    if all(cost <= Fraction(limit.bound) * Fraction(limit.unit) for cost, limit in zip(costs, limits, strict=True)):
      key = (sum(Fraction(scores[n][f]) for n, f in zip(names, chosen, strict=True)), costs, chosen)
      best = key if best is None or key < best else best
  return None if best is None else dict(zip(names, best[2], strict=True))


def table(rng, groups, draw):
  return {f"layers.{i}": {f: draw(rng, f) for f in FORMATS} for i in range(groups)}


DRAWS = {
  "lognormal": lambda rng, f: 0.0 if f == "none" else rng.lognormvariate(0, 3),
  "few whole numbers": lambda rng, f: float(rng.randint(0, 3)),
  "all equal": lambda rng, f: 1.0,
  "halves": lambda rng, f: rng.randint(0, 8) / 8,
  "twelve decades": lambda rng, f: 10.0 ** rng.randint(-8, 3),
}
COSTS = {
  "bits": lambda rng, f: {"a4": 4.5, "b8": 8.0, "none": 16.0}[f] * 64,
  "whole": lambda rng, f: float(rng.randint(1, 6)),
  "any": lambda rng, f: rng.uniform(0, 1),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("cost", COSTS)
def test_equals_exhaustive_search(draw, cost):
  rng = random.Random(f"{draw} {cost}")
  for turn in range(10):
    groups = 8 if turn == 0 else rng.randint(1, 6)
    scores, costs = table(rng, groups, DRAWS[draw]), table(rng, groups, COSTS[cost])
    low, high = (sum(pick(row.values()) for row in costs.values()) for pick in (min, max))
    bound = float(round(rng.uniform(low, high))) if cost != "any" else rng.uniform(low, high)
    limits = [Limit("cost", costs, max(bound, low))]
    found = solve(scores, limits)
    assert found.proven
    assert found.assignment == exhaustive(scores, limits)


def test_two_limits_equal_exhaustive_search():
  rng = random.Random(5)
  kept = 0
  for _ in range(40):
    groups = rng.randint(2, 6)
    scores = table(rng, groups, DRAWS[rng.choice(list(DRAWS))])
    limits = []
    for name in ("bits", "latency"):
      costs = table(rng, groups, COSTS["whole"])
      low, high = (sum(pick(row.values()) for row in costs.values()) for pick in (min, max))
      limits.append(Limit(name, costs, float(rng.randint(int(low), int(high)))))
    expected = exhaustive(scores, limits)
    if expected is None:
      with pytest.raises(ValueError, match=r"cannot all be kept at once: bits <= .*latency"):
        solve(scores, limits)
    else:
      kept += 1
      assert solve(scores, limits).assignment == expected
  assert kept > 20


def test_the_order_of_groups_and_formats_changes_nothing():
  rng = random.Random(9)
  for draw in DRAWS.values():
    scores, costs = table(rng, 30, draw), table(rng, 30, COSTS["bits"])
    found = []
    for _ in range(4):
      names = list(scores)
      rng.shuffle(names)
      mixed = {n: dict(sorted(scores[n].items(), key=lambda _: rng.random())) for n in names}
      found.append(solve(mixed, [Limit("bits", {n: costs[n] for n in names}, 30 * 64 * 7.0)]))
    assert all(other == found[0] for other in found)


def test_ties_go_to_the_smaller_cost_and_then_to_the_alphabet():
  scores = {"x": {"b": 1.0, "a": 1.0}, "w": {"b": 1.0, "a": 1.0}}
  equal = {name: {"a": 2.0, "b": 2.0} for name in scores}
  assert solve(scores, [Limit("cost", equal, 4.0)]).assignment == {"w": "a", "x": "a"}
  cheaper = {name: {"a": 2.0, "b": 1.0} for name in scores}
  assert solve(scores, [Limit("cost", cheaper, 4.0)]).assignment == {"w": "b", "x": "b"}
  assert solve(
    {"x": {"a": 2.0, "b": 1.0}, "w": {"a": 2.0, "b": 1.0}}, [Limit("cost", {n: {"a": 0.0, "b": 1.0} for n in "xw"}, 1.0)]
  ).assignment == {
    "w": "a",
    "x": "b",
  }


def test_a_model_of_many_layers_is_solved_and_proven():
  """120 groups of four formats with sizes and bits as SmolLM2 has them."""
  rng = random.Random(0)
  sizes = [552_960, 331_776, 1_769_472, 884_736]
  bits = {"int4": 4.125, "nvfp4": 4.5, "fp8": 8.0, "none": 16.0}
  costs = {f"{i:03}": {f: sizes[i % 4] * b + 32 for f, b in bits.items()} for i in range(120)}
  scores = {n: {f: 0.0 if f == "none" else rng.lognormvariate(0, 2) * 4.0 ** -bits[f] for f in bits} for n in costs}
  numel = float(sum(sizes[i % 4] for i in range(120)))
  objectives = []
  for budget in (4.3, 4.8, 5.0, 6.0, 8.0):
    found = solve(scores, [Limit("effective_bits", costs, budget, numel)])
    assert found.proven
    objectives.append(found.objective)
  assert objectives == sorted(objectives, reverse=True)


def test_two_limits_on_many_layers():
  """A proof, or the word that there is none; the limits are kept either way."""
  rng = random.Random(3)
  bits = {"int4": 4.125, "nvfp4": 4.5, "fp8": 8.0, "none": 16.0}
  costs = {f"{i:02}": {f: 1e6 * (1 + i % 4) * b + 32 for f, b in bits.items()} for i in range(60)}
  latency = {n: {f: float(rng.randint(1, 20)) for f in bits} for n in costs}
  scores = {n: {f: 0.0 if f == "none" else rng.lognormvariate(0, 2) * 4.0 ** -bits[f] for f in bits} for n in costs}
  limits = [Limit("effective_bits", costs, 6.0, 1e6 * sum(1 + i % 4 for i in range(60))), Limit("latency", latency, 60 * 7.0)]
  found = solve(scores, limits)
  assert all(limit.value(found.assignment) <= limit.bound * (1 + 1e-12) for limit in limits)
  assert found.objective >= solve(scores, limits[:1]).objective


def test_a_stopped_proof_is_said(monkeypatch):
  monkeypatch.setattr(program, "MOST_STATES", 0)
  rng = random.Random(1)
  scores, costs = table(rng, 8, DRAWS["lognormal"]), table(rng, 8, COSTS["any"])
  limits = [Limit("cost", costs, sum(sum(row.values()) / 3 for row in costs.values()))]
  found = solve(scores, limits)
  assert not found.proven
  assert limits[0].value(found.assignment) <= limits[0].bound * (1 + 1e-6)  # HiGHS's own tolerance


def test_errors():
  costs = {"x": {"a": 4.0, "b": 8.0}}
  with pytest.raises(ValueError, match=r"effective_bits of 3.9 cannot be reached: the least possible is 4, "):
    solve({"x": {"a": 1.0, "b": 0.0}}, [Limit("effective_bits", costs, 3.9)])
  with pytest.raises(ValueError, match=r"score of 'x' in format 'b' is nan"):
    solve({"x": {"a": 1.0, "b": float("nan")}}, [Limit("cost", costs, 9.0)])
  assert solve({}, []).assignment == {}
