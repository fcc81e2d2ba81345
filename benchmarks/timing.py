"""Interleaved measurement: every round runs every candidate once, and the least of all rounds counts.

A busy machine slows whatever runs at that moment; interleaved, it cannot slow one candidate and spare its neighbour for the whole run.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass
class Timing:
  """Least times of one candidate, in seconds.

  Attributes:
    wall: elapsed.
    cpu: of all threads of this process.
    rounds: how often it ran.
  """

  wall: float = float("inf")
  cpu: float = float("inf")
  rounds: int = 0

  def add(self, wall: float, cpu: float) -> None:
    """One more round."""
    self.wall, self.cpu, self.rounds = min(self.wall, wall), min(self.cpu, cpu), self.rounds + 1


SLOW = 20.0

Measure = Callable[[Callable[[], Any]], tuple[float, float]]


def once(function: Callable[[], Any]) -> tuple[float, float]:
  """Wall and CPU seconds of one call that returns when its work is done."""
  cpu, wall = time.process_time(), time.perf_counter()
  result = function()
  elapsed = time.perf_counter() - wall, time.process_time() - cpu
  del result
  return elapsed


def interleave(
  candidates: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = float("inf"), measure: Measure = once
) -> dict[str, Timing]:
  """Time all candidates, round by round, in another order each time: what one leaves behind (spinning threads, a full cache) does not
  always meet the same next one. Candidates that take far longer than the quickest run in every third round only.

  Args:
    candidates: functions without arguments, warm (compiled) already.
    rounds: number of rounds.
    seconds: no new round begins after this time; the first always runs.
    measure: times one call.

  Returns:
    Least times per candidate.
  """
  timings, order = {name: Timing() for name in candidates}, random.Random(0)
  names, end = list(candidates), time.perf_counter() + seconds
  for done in range(rounds):
    if done and time.perf_counter() > end:
      break
    order.shuffle(names)
    quickest = min(t.wall for t in timings.values())
    for name in names:
      if done % 3 == 0 or timings[name].wall < SLOW * quickest:
        timings[name].add(*measure(candidates[name]))
  return timings
