"""Tables and progress on a terminal; plain aligned text where the output goes to a file."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
  """One column: key in the row, heading, and how a value is written (a format such as ".3f", or a function)."""

  key: str
  heading: str
  form: str | Callable[[Any], str] = ""


def cell(value: Any, form: str | Callable[[Any], str]) -> str:
  """One value as text; "-" where there is none."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "-"
  return form(value) if callable(form) else format(value, form)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[list[str]]:
  """Headings and cells; columns that are empty in every row are left out."""
  shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
  return [[c.heading for c in shown], *([cell(row.get(c.key), c.form) for c in shown] for row in rows)]


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
  """The table as Markdown."""
  heading, *lines = table(rows, columns)
  rule = ["---" if i < 2 else "---:" for i in range(len(heading))]
  return "\n".join("| " + " | ".join(line) + " |" for line in [heading, rule, *lines]) + "\n"


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], title: str = "", notes: Sequence[str] = ()) -> None:
  """Print a table: rich on a terminal, aligned text otherwise."""
  lines = table(rows, columns)
  if sys.stdout.isatty():
    _show_rich(lines, title, notes)
    return
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  if title:
    print(f"\n{title}")
  for line in lines:
    print("  ".join(text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))).rstrip())
  for note in notes:
    print(note)
  sys.stdout.flush()


def _show_rich(lines: Sequence[Sequence[str]], title: str, notes: Sequence[str]) -> None:
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  drawn = Table(title=Text(title) if title else None, title_justify="left")
  for i, heading in enumerate(lines[0]):
    drawn.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
  for line in lines[1:]:
    drawn.add_row(*(Text(text) for text in line))
  console = Console()
  console.print(drawn)
  for note in notes:
    console.print(Text(note))


class Progress:
  """Steps of a run on standard error: a bar on a terminal, a line a step elsewhere."""

  def __init__(self, total: int, bar: Any = None, task: Any = None) -> None:
    self._total, self._bar, self._task = total, bar, task
    self._step, self._start = 0, time.perf_counter()

  def step(self, text: str) -> None:
    """Say what comes next and count one step."""
    self._step += 1
    if self._bar is not None:
      self._bar.update(self._task, advance=1, description=text)
    else:
      print(f"[{self._step}/{self._total}] {time.perf_counter() - self._start:4.0f} s  {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(total: int, text: str) -> Iterator[Progress]:
  """A bar of that many steps, or lines where standard error is no terminal."""
  if not sys.stderr.isatty():
    yield Progress(total)
    return
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
  from rich.progress import Progress as Bar

  parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
  with Bar(*parts, console=Console(stderr=True), transient=True) as bar:
    # One step ahead of its work: the first `step` names the first piece of work, which is not done yet.
    yield Progress(total, bar, bar.add_task(text, total=total, completed=-1))
