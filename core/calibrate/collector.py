"""Statistics of the layers of a model: what is shown of their inputs, by the tensor that they read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from core.calibrate.statistics import Accumulator

Group = tuple[str, ...]


class Collector:
  """Statistics of layers by the tensor they read: layers that are shown together share one accumulator."""

  def __init__(self, names: Iterable[str]) -> None:
    self._wanted = tuple(names)
    self.accumulators: dict[Group, Accumulator] = {}
    self._group_of: dict[str, Group] = {}

  def __call__(self, names: Group, x: np.ndarray, reference: np.ndarray | None = None) -> None:
    _check_finite(names, x)
    group = self._group_of.get(names[0])
    if group is None:
      group = names
      self.accumulators[group] = Accumulator(self._wanted)
      self._group_of |= dict.fromkeys(names, group)
    elif group != names:
      raise ValueError(
        f"layers {', '.join(sorted(set(group) ^ set(names)))} read one input with {names[0]!r} in some batches and another in others; "
        "calibrate with batches of one kind"
      )
    self.accumulators[group].add(x, reference)

  def groups(self, names: Sequence[str]) -> list[Group]:
    """The groups that these layers form, in their order; layers that were never shown stand alone."""
    found: dict[Group, None] = {}
    for name in names:
      members = tuple(n for n in self._group_of.get(name, (name,)) if n in names)
      found[members] = None
    return list(found)

  def result(self, name: str) -> dict[str, Any]:
    """The statistics of one layer.

    Raises:
      ValueError: one of them overflowed; names it.
    """
    group = self._group_of.get(name)
    found = {"tokens": 0} if group is None else self.accumulators[group].result()
    for kind, value in found.items():
      if not np.isfinite(value).all():
        raise ValueError(
          f"the statistic {kind!r} of layer {name!r} overflows float32: its inputs are finite, but too large; scale them down, or look for "
          "what makes them so large"
        )
    return found


def _check_finite(names: Group, x: np.ndarray) -> None:
  if not np.isfinite(x).all():
    nan = int(np.isnan(x).sum())
    raise ValueError(
      f"calibration data of layer {names[0]!r} holds {nan} NaN and {int((~np.isfinite(x)).sum()) - nan} infinite of {x.size} values; "
      "look for an overflow before this layer, or calibrate in float32 or bfloat16"
    )
