"""Counting what differs."""

from __future__ import annotations

import numpy as np

from core.verify.report import DIFFERS, EQUAL, NOT_CHECKED, WITHIN, Check

SHOWN = 3


class Tally:
  """Counts differences of one check over many tensors.

  Args:
    name: of the check.
    note: for the report.
  """

  def __init__(self, name: str, note: str = "") -> None:
    self.name, self.note = name, note
    self.compared = self.differing = 0
    self.largest: float | None = None
    self.first: list[str] = []

  def bits(self, name: str, expected: np.ndarray | None, found: np.ndarray | None) -> None:
    """Two arrays that must be the same, shape, type and bits."""
    if expected is None and found is None:
      return
    if expected is None or found is None:
      self.wrong(f"{name} ({'not expected' if expected is None else 'missing'})")
      return
    if expected.shape != found.shape or expected.dtype != found.dtype:
      self.wrong(f"{name} ({found.dtype} {list(found.shape)} for {expected.dtype} {list(expected.shape)})", max(expected.size, 1))
      return
    width = np.dtype(f"u{expected.dtype.itemsize}")
    differ = np.ascontiguousarray(expected).view(width) != np.ascontiguousarray(found).view(width)
    self.count(name, expected.size, int(differ.sum()))

  def values(self, name: str, expected: np.ndarray, found: np.ndarray) -> None:
    """Two float32 arrays of equal values; the zeros' signs do not matter."""
    if expected.shape != found.shape:
      self.wrong(f"{name} ({list(found.shape)} for {list(expected.shape)})", max(expected.size, 1))
      return
    differ = ~((expected == found) | (np.isnan(expected) & np.isnan(found)))
    self.count(name, expected.size, int(differ.sum()))
    if differ.any():
      self.size(float(np.max(np.abs(expected.astype(np.float64) - found)[differ])))

  def size(self, difference: float) -> None:
    """A difference's size."""
    self.largest = difference if self.largest is None or np.isnan(difference) else max(self.largest, difference)

  def count(self, name: str, compared: int, differing: int) -> None:
    """What was compared elsewhere."""
    self.compared += compared
    if differing:
      self.differing += differing
      self._remember(f"{name} ({differing:,} of {compared:,})")

  def wrong(self, what: str, count: int = 1) -> None:
    """Something that is wrong as a whole."""
    self.compared += count
    self.differing += count
    self._remember(what)

  def _remember(self, text: str) -> None:
    if len(self.first) < SHOWN:
      self.first.append(text)

  def check(self, within: bool = False, note: str = "") -> Check:
    """The result.

    Args:
      within: whether what differs stays within the tolerance that the note names.
      note: further note.
    """
    status = EQUAL if not self.differing else WITHIN if within else DIFFERS
    if not self.compared:
      status = NOT_CHECKED
    text = "; ".join(part for part in (self.note, note) if part)
    return Check(self.name, status, self.compared, self.differing, self.largest, tuple(self.first), text)
