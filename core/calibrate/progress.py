"""A progress bar with the time left, on a terminal; nothing otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Step = Callable[[str], None]


@contextlib.contextmanager
def progress(total: int, title: str) -> Iterator[Step]:
  """Yields a function to call with the name of what comes next, `total` times.

  Args:
    total: number of steps.
    title: what is running.
  """
  if not sys.stderr.isatty():
    yield lambda name: None
    return
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

  columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
  with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
    task = bar.add_task(title, total=total)
    done = -1

    def step(name: str) -> None:
      nonlocal done
      done += 1
      bar.update(task, completed=done, description=f"{title}: {name}")

    yield step
