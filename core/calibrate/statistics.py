"""Statistics of a layer's input, gathered batch by batch on the host. Order of batches only changes the rounding of
sums, and which tokens are samples where there are more than `SAMPLES`.

| name | shape | what |
|---|---|---|
| tokens | int | rows seen |
| amax | [K] float32 | largest magnitude of each channel |
| mean_abs | [K] float64 | mean magnitude over all tokens |
| mean | [K] float64 | mean |
| hessian | [K, K] float32, or float64 from float64 inputs | mean over tokens of x x^T |
| cross | [K, K] float32 | mean over tokens of y x^T, y the input that the float model has at the same place |
| samples | [S, K] float32 | up to `SAMPLES` tokens, spread evenly over what came |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

SAMPLES = 512
NAMES = ("tokens", "amax", "mean_abs", "mean", "hessian", "cross", "samples")


class Accumulator:
  """Running statistics of one tensor.

  Args:
    names: which of `NAMES` to keep.
    samples: how many tokens "samples" keeps at most.

  Raises:
    ValueError: an unknown name.
  """

  def __init__(self, names: Iterable[str], samples: int = SAMPLES) -> None:
    self.names = tuple(dict.fromkeys(names))
    unknown = sorted(set(self.names) - set(NAMES))
    if unknown:
      raise ValueError(f"unknown statistics {', '.join(unknown)}; allowed are {', '.join(NAMES)}")
    self.tokens = 0
    self.limit = samples
    self._sums: dict[str, np.ndarray] = {}
    self._rows: list[np.ndarray] = []
    self._stride = 1  # one row in `_stride` is kept
    self._kept = 0

  def add(self, x: np.ndarray, reference: np.ndarray | None = None) -> None:
    """One batch.

    Args:
      x: [T, K] float32 or float64, finite.
      reference: [T, K], the float model's input at the same place, for "cross".
    """
    if not len(x):
      return
    first = self.tokens
    with np.errstate(over="ignore"):  # whoever takes the result looks whether it is finite
      self._add(x, reference, first)

  def _add(self, x: np.ndarray, reference: np.ndarray | None, first: int) -> None:
    self.tokens += len(x)
    if "amax" in self.names:
      found = np.abs(x).max(axis=0)
      self._sums["amax"] = np.maximum(self._sums["amax"], found) if "amax" in self._sums else found
    if "mean_abs" in self.names:
      self._plus("mean_abs", np.abs(x).sum(axis=0, dtype=np.float64))
    if "mean" in self.names:
      self._plus("mean", x.sum(axis=0, dtype=np.float64))
    if "hessian" in self.names:
      self._plus("hessian", x.T @ x)
    if "cross" in self.names:
      self._plus("cross", (x if reference is None else reference).T @ x)
    if "samples" in self.names:
      self._sample(x, first)

  def _plus(self, name: str, value: np.ndarray) -> None:
    if name in self._sums:
      self._sums[name] += value
    else:
      self._sums[name] = value

  def _sample(self, x: np.ndarray, first: int) -> None:
    """Keep the tokens whose number is a multiple of the stride; when there are too many, every second of them is dropped."""
    start = -first % self._stride
    self._rows.append(x[start :: self._stride].copy())
    self._kept += len(self._rows[-1])
    while self._kept > self.limit:
      kept = np.concatenate(self._rows)[::2]
      self._rows, self._stride, self._kept = [kept], self._stride * 2, len(kept)

  def result(self) -> dict[str, Any]:
    """The statistics by name. Without tokens only {"tokens": 0}."""
    if not self.tokens:
      return {"tokens": 0}
    found: dict[str, Any] = {"tokens": self.tokens}
    for name, value in self._sums.items():
      found[name] = value if name == "amax" else value / np.asarray(self.tokens, value.dtype)
    if "samples" in self.names:
      found["samples"] = np.concatenate(self._rows)
    return found
