"""What verifying found: checks of one client, clients of one artefact, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core import files

EQUAL, WITHIN, EXPLAINED, DIFFERS, NOT_CHECKED = "equal", "within", "explained", "differs", "not checked"
AGREE = (EQUAL, WITHIN, EXPLAINED)
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class NotRun(Exception):
  """A client cannot say anything of this artefact. The message completes "not run: "."""


@dataclasses.dataclass(frozen=True)
class Check:
  """One thing that a client was asked.

  Attributes:
    name: what: "codes", "weights", "inputs", "log-probabilities", ...
    status: "equal", "within" (a tolerance that the note names), "explained" (outputs differ, and so do codes that fell otherwise at a tie),
      "differs", or "not checked".
    compared: number of values compared.
    differing: how many of them differ.
    largest: largest difference, where values are compared by size.
    first: the first names with a difference.
    note: what a reader has to know: the tolerance and its reason, or why it was not checked.
  """

  name: str
  status: str
  compared: int = 0
  differing: int = 0
  largest: float | None = None
  first: tuple[str, ...] = ()
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one client found.

  Attributes:
    client: its name.
    checks: in the order they were made.
    reason: why it was not run, or why it could not go on.
    failed: whether it could not go on, which is a failure.
    seconds: wall time.
  """

  client: str
  checks: tuple[Check, ...] = ()
  reason: str = ""
  failed: bool = False
  seconds: float = 0.0

  @property
  def status(self) -> str:
    """ "failed" if anything differs; "passed" if something was compared and nothing differs; else "not run"."""
    if self.failed or any(check.status == DIFFERS for check in self.checks):
      return FAILED
    return PASSED if any(check.status in AGREE for check in self.checks) else NOT_RUN

  def bad(self) -> dict[str, Check]:
    """The checks that found a difference."""
    return {check.name: check for check in self.checks if check.status == DIFFERS}


@dataclasses.dataclass(frozen=True)
class Report:
  """An artefact beside the model that it was made from.

  Attributes:
    artefact: the folder or file.
    layout: "compressed-tensors", "modelopt", "gguf" or "onnx".
    outcomes: one per client, in the order they were asked for.
  """

  artefact: str
  layout: str
  outcomes: tuple[Outcome, ...]

  @property
  def passed(self) -> bool:
    """Whether at least one client ran, and all that ran agree."""
    states = [outcome.status for outcome in self.outcomes]
    return PASSED in states and FAILED not in states

  def __getitem__(self, client: str) -> Outcome:
    for outcome in self.outcomes:
      if outcome.client == client:
        return outcome
    raise KeyError(f"client {client!r} was not asked; asked were {', '.join(o.client for o in self.outcomes)}")

  def to_dict(self) -> dict[str, Any]:
    """Plain data for JSON."""
    outcomes = [dataclasses.asdict(outcome) | {"status": outcome.status} for outcome in self.outcomes]
    return {"artefact": self.artefact, "layout": self.layout, "passed": self.passed, "clients": outcomes}

  def write(self, path: str | Path) -> Path:
    """Write the report as JSON; the file is there complete or not at all."""
    return write_json(path, self.to_dict())

  def lines(self) -> list[list[str]]:
    """Cells of the table, the heading first."""
    found = [["client", "check", "compared", "differ", "largest", "result"]]
    for outcome in self.outcomes:
      for check in outcome.checks:
        counts = [f"{check.compared:,}", f"{check.differing:,}"] if check.compared else ["-", "-"]
        largest = "-" if check.largest is None else f"{check.largest:.2g}"
        found.append([outcome.client, check.name, *counts, largest, check.status])
      found.append([outcome.client, "", "-", "-", f"{outcome.seconds:.1f} s", outcome.status])
    return found

  def notes(self) -> list[str]:
    """A line for every reason and for the first names that differ."""
    found = []
    for outcome in self.outcomes:
      if outcome.reason:
        found.append(f"{outcome.client} {outcome.status}: {outcome.reason}")
      for check in outcome.checks:
        where = f"first in {', '.join(check.first)}" if check.first else ""
        text = "; ".join(part for part in (where, check.note) if part)
        if text:
          found.append(f"{outcome.client}, {check.name}: {text}")
    return found

  def __str__(self) -> str:
    verdict = "passed" if self.passed else "NOT passed"
    return "\n".join([f"{self.artefact} ({self.layout}): {verdict}", *aligned(self.lines(), left=2), *self.notes()])

  def show(self) -> None:
    """Print the table, by rich on a terminal, and the notes."""
    show(self.lines(), [*self.notes(), "passed" if self.passed else "NOT passed"], f"{self.artefact} ({self.layout})", left=2)


def write_json(path: str | Path, value: Any) -> Path:
  """Write plain data beside the path, then rename."""
  return files.write(path, json.dumps(value, indent=2) + "\n")


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
  """A table as text; the first `left` columns stand at the left."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return [
    "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines
  ]


def show(lines: Sequence[Sequence[str]], notes: Iterable[str], title: str, left: int) -> None:
  """Print a table and notes: by rich where it is installed and the output is a terminal, else as aligned text."""
  try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
  except ModuleNotFoundError:
    Console = None
  if Console is None or not sys.stdout.isatty():
    print("\n".join([title, *aligned(lines, left), *notes]), flush=True)
    return
  table = Table(title=Text(title), title_justify="left")
  for i, heading in enumerate(lines[0]):
    table.add_column(heading, justify="left" if i < left else "right", overflow="fold")
  colours = {FAILED: "red", DIFFERS: "red", "missed": "red", PASSED: "green", "caught": "green"}
  for line in lines[1:]:
    table.add_row(*(Text(cell, style=colours.get(cell, "")) for cell in line))
  console = Console()
  console.print(table)
  for note in notes:
    console.print(Text(note))
