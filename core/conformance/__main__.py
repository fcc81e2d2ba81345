"""python -m core.conformance --backend=numpy|torch|jax [--compiled] [--device=cpu|cuda] [--files=a,b] : run the published vectors."""

from __future__ import annotations

import argparse
import sys
import time

from core.conformance import runner, vectors_io

SHOWN_FAILURES = 20


def main(arguments: list[str] | None = None) -> int:
  """Run the vectors, print one row per file; 0 if every value is equal, else 1."""
  parser = argparse.ArgumentParser(
    prog="python -m core.conformance", description="Run the conformance vectors of SPEC.md on this installation."
  )
  parser.add_argument("--backend", choices=runner.BACKENDS, default="numpy")
  parser.add_argument("--compiled", action="store_true", help="torch.compile or jax.jit every case (minutes for torch)")
  parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
  parser.add_argument("--files", help=f"comma-separated; default all of: {', '.join(vectors_io.names())}")
  options = parser.parse_args(arguments)
  runtime = runner.Runtime(options.backend, options.compiled, options.device)
  start, results = time.perf_counter(), []
  for result in runner.run(runtime, options.files.split(",") if options.files else None):
    results.append(result)
  show(runtime, results, time.perf_counter() - start)
  return int(any(r.mismatches for r in results))


def show(runtime: runner.Runtime, results: list[runner.FileResult], seconds: float) -> None:
  """One row per file (a rich table on a terminal, plain columns elsewhere), then the first differences."""
  rows: list[tuple[str, ...]] = [(r.name, str(r.cases), str(r.compared), str(r.mismatches), r.title) for r in results]
  rows.append(("total", *(str(sum(getattr(r, f) for r in results)) for f in ("cases", "compared", "mismatches")), f"{seconds:.1f} s"))
  head = ("file", "cases", "compared", "mismatches", "content")
  print(f"conformance: {runtime.name} on {runtime.device}")
  if sys.stdout.isatty() and _rich_table(head, rows):
    return _failures(results)
  widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
  for row in [head, *rows]:
    print("  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]))
  return _failures(results)


def _failures(results: list[runner.FileResult]) -> None:
  failures = [line for r in results for line in r.failures]
  for line in failures[:SHOWN_FAILURES]:
    print("MISMATCH", line)
  if len(failures) > SHOWN_FAILURES:
    print(f"... and {len(failures) - SHOWN_FAILURES} more")


def _rich_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> bool:
  try:
    from rich.console import Console
    from rich.table import Table
  except ImportError:
    return False
  table = Table()
  for i, name in enumerate(head):
    table.add_column(name, justify="right" if i in (1, 2, 3) else "left")
  for row in rows:
    table.add_row(*row, style=None if row[3] == "0" else "bold red")
  Console().print(table)
  return True


if __name__ == "__main__":
  sys.exit(main())
