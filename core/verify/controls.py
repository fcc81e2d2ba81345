"""Controls: faulty copies of an artefact, and which client catches which fault."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.verify import driver, faults, onnx_faults
from core.verify.job import Job, Simulation
from core.verify.report import NOT_RUN, Outcome, Report, aligned, show, write_json

CAUGHT, MISSED = "caught", "missed"


@dataclasses.dataclass(frozen=True)
class Row:
  """One fault.

  Attributes:
    fault: its name.
    text: what is wrong.
    applies: whether this artefact can have it.
    needs: what an artefact must have for that.
    cells: client -> "caught", "missed" or "not run".
    by: client -> the checks that caught it.
  """

  fault: str
  text: str
  applies: bool
  needs: str
  cells: dict[str, str]
  by: dict[str, tuple[str, ...]]

  @property
  def caught(self) -> bool:
    return CAUGHT in self.cells.values()


@dataclasses.dataclass(frozen=True)
class Controls:
  """A matrix of faults and clients.

  Attributes:
    clean: the report of the artefact itself.
    rows: one per fault.
  """

  clean: Report
  rows: tuple[Row, ...]

  @property
  def passed(self) -> bool:
    """Whether some fault applies, and each that does is caught by a client."""
    able = [row for row in self.rows if row.applies]
    return bool(able) and all(row.caught for row in able)

  def lines(self) -> list[list[str]]:
    """Cells of the matrix, the heading first."""
    clients = [outcome.client for outcome in self.clean.outcomes]
    found = [["fault", *clients], ["(none)", *(outcome.status for outcome in self.clean.outcomes)]]
    for row in self.rows:
      found.append([row.fault, *(_cell(row, client) for client in clients)])
    return found

  def notes(self) -> list[str]:
    """What does not apply, and what nobody caught."""
    found = [f"{row.fault} does not apply: it needs {row.needs}" for row in self.rows if not row.applies]
    return [*found, *(f"NOT CAUGHT by any client: {row.fault} ({row.text})" for row in self.rows if row.applies and not row.caught)]

  def __str__(self) -> str:
    return "\n".join([*aligned(self.lines(), left=1), *self.notes()])

  def show(self) -> None:
    """Print the matrix and the notes."""
    show(self.lines(), self.notes(), f"faults in {self.clean.artefact} ({self.clean.layout})", left=1)

  def to_dict(self) -> dict[str, Any]:
    """Plain data for JSON."""
    return {"passed": self.passed, "clean": self.clean.to_dict(), "faults": [dataclasses.asdict(row) for row in self.rows]}

  def write(self, path: str | Path) -> Path:
    """Write the matrix as JSON; the file is there complete or not at all."""
    return write_json(path, self.to_dict())


def _cell(row: Row, client: str) -> str:
  if not row.applies:
    return "-"
  by = row.by.get(client)
  return f"{row.cells[client]} ({', '.join(by)})" if by else row.cells[client]


def controls(
  simulation: Simulation, artefact: str | Path, clients: Sequence[str] = ("numpy",), prompts: Any = None, **options: Any
) -> Controls:
  """Ask every client about the artefact and about copies of it with one fault each. Arguments and errors as `verify`."""
  job, layout = driver.job_of(simulation, artefact, clients, prompts, **options)
  clean = driver.ask(job, layout, clients)
  rows = []
  for fault, place in _faulty(job):
    if place is None:
      rows.append(Row(fault.name, fault.text, False, fault.needs, {}, {}))
      continue
    report = driver.ask(job.at(place), layout, clients)
    found = {name: _judged(clean[name], report[name]) for name in clients}
    cells, by = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    rows.append(Row(fault.name, fault.text, True, fault.needs, cells, by))  # type: ignore[arg-type]
  return Controls(clean, tuple(rows))


def _faulty(job: Job) -> Iterator[tuple[faults.Fault | onnx_faults.OnnxFault, Path | None]]:
  """Every fault, and a copy of the artefact with it, which is gone when the next one is asked for."""
  if job.place.suffix == ".onnx":
    for fault in onnx_faults.FAULTS:
      with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        target = Path(folder) / "faulty" / job.place.name
        yield fault, target if onnx_faults.write_faulty(job.place, fault, target) else None
    return
  content = faults.open_content(job.place)
  for fault in faults.FAULTS:
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
      target = Path(folder) / "faulty"
      yield fault, target if faults.write_faulty(job.place, content, fault, target) else None


def _judged(clean: Outcome, faulty: Outcome) -> tuple[str, tuple[str, ...]]:
  """Whether a client that ran on the artefact finds more on the copy, and by which checks."""
  if clean.status == NOT_RUN or clean.failed:
    return NOT_RUN, ()
  if faulty.failed or faulty.status == NOT_RUN:
    return CAUGHT, ("cannot read it",)
  before = clean.bad()
  more = tuple(name for name, check in faulty.bad().items() if name not in before or check.differing > before[name].differing)
  return (CAUGHT, more) if more else (MISSED, ())
