"""The report of a calibration as people read it: one line per layer and algorithm. Both backends print through this."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("layer", "method", "chosen", "rank", "error before", "error after", "gain dB", "kept")
_CHOSEN = ("alpha", "clip", "multiplier")
_NUMBERS = range(3, 7)  # columns that are aligned to the right


def print_calibration_report(rows: Sequence[Mapping[str, Any]]) -> None:
  """Print what `quantize(..., report=rows)` or `calibrate(..., report=rows)` filled: a rich table on a terminal, plain columns otherwise.

  One line per layer and algorithm: what was chosen (alpha of a scale's search, mean clip ratio, mean multiplier of amax), rank of a
  low-rank branch, error before and after (as the algorithm measures it: of outputs or of weights), gain = 10 log10(before / after) dB, and
  why a layer keeps what it had. The last line counts, with the gain of the summed errors of each method.

  Args:
    rows: dicts with "layer" and "method"; all other keys are optional.

  Raises:
    ValueError: a row without "layer" or "method".
  """
  for row in rows:
    missing = [key for key in ("layer", "method") if key not in row]
    if missing:
      raise ValueError(f"a row of the report lacks {' and '.join(missing)}: {dict(row)!r}; give the list that quantize(report=...) filled")
  last = _last_line(rows)
  if sys.stdout.isatty():
    _print_table(rows, last)
  else:
    print("\n".join([*_lines(rows), last]))


def gain_db(before: float | None, after: float | None) -> float | None:
  """10 log10(before / after) dB; None where there is no such number, inf where nothing is left of an error."""
  if before is None or after is None or not before > 0:
    return None
  return math.inf if after <= 0 else 10 * math.log10(before / after)


def _number(value: Any, form: str = ".4g") -> str:
  return "" if value is None else format(float(value), form)


def _cells(row: Mapping[str, Any]) -> list[str]:
  chosen = ", ".join(f"{key} {_number(row[key])}" for key in _CHOSEN if row.get(key) is not None)
  before, after = row.get("error_before"), row.get("error")
  rank = "" if row.get("rank") is None else str(row["rank"])
  kept = str(row.get("kept") or row.get("note") or "")
  gain = _number(gain_db(before, after), ".2f")
  return [str(row["layer"]), str(row["method"]), chosen, rank, _number(before), _number(after), gain, kept]


def _last_line(rows: Sequence[Mapping[str, Any]]) -> str:
  kept = sum(bool(row.get("kept")) for row in rows)
  text = f"{len(rows)} lines" + (f", {kept} kept" if kept else "")
  for method in dict.fromkeys(str(row["method"]) for row in rows):
    measured = [row for row in rows if row["method"] == method and None not in (row.get("error_before"), row.get("error"))]
    gain = gain_db(sum(row["error_before"] for row in measured), sum(row["error"] for row in measured))
    if gain is not None:
      text += f"; {method}: {gain:.2f} dB over {len(measured)}"
  return text


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  table = [list(COLUMNS), *(_cells(row) for row in rows)]
  widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]

  def aligned(line: list[str]) -> str:
    parts = [cell.rjust(widths[i]) if i in _NUMBERS else cell.ljust(widths[i]) for i, cell in enumerate(line)]
    return "  ".join(parts).rstrip()

  return [aligned(line) for line in table]


def _print_table(rows: Sequence[Mapping[str, Any]], last: str) -> None:
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  table = Table()
  for i, column in enumerate(COLUMNS):
    table.add_column(column, overflow="fold", justify="right" if i in _NUMBERS else "left")
  for row in rows:
    table.add_row(*(Text(cell) for cell in _cells(row)), style="dim" if row.get("kept") else None)
  console = Console()
  console.print(table)
  console.print(Text(last))
