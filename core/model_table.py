"""The summary of a quantized model as people read it: one line per quantizer that does something. Both backends print through this."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

COLUMNS = ("name", "format", "state", "amax", "shares its scale in", "cost_db")


def show(rows: list[dict[str, Any]], output_dir: str | pathlib.Path | None = None) -> None:
  """Print the rows of a backend's `summary`: a rich table on a terminal, plain columns otherwise.

  Quantizers that are off are counted, not listed.

  Args:
    rows: dicts with name, format, enabled, state, amax_min, amax_max, amax_shape, group, cost_db.
    output_dir: also write the plain text to `quant_summary.txt` in this directory.
  """
  listed = [row for row in rows if row["state"] != "off"]
  last = _last_line(rows, len(listed))
  text = "\n".join([*_lines(listed), last])
  if output_dir is not None:
    folder = pathlib.Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quant_summary.txt").write_text(text + "\n", encoding="utf-8")
  if sys.stdout.isatty():
    _print_table(listed, last)
  else:
    print(text)


def describe_range(low: float, high: float, shape: tuple[int, ...] | None) -> str:
  """Smallest and largest amax, and the shape where there is more than one: "[0.11, 2.4] (64, 1)"."""
  if not shape or max(shape) == 1:
    return f"{high:.4g}"
  return f"[{low:.4g}, {high:.4g}] {tuple(shape)}"


def _last_line(rows: list[dict[str, Any]], listed: int) -> str:
  text = f"{len(rows)} quantizers, {sum(row['enabled'] for row in rows)} enabled"
  if listed < len(rows):
    text += f", {len(rows) - listed} off and not listed"
  costs = [row["cost_db"] for row in rows if row["cost_db"] is not None]
  if costs:
    text += f"; {len(costs)} weights share a tensor scale with siblings, which costs them {sum(costs) / len(costs):.3f} dB SQNR on average"
  return text


def _cells(row: dict[str, Any]) -> list[str]:
  amax = "" if row["amax_max"] is None else describe_range(row["amax_min"], row["amax_max"], row["amax_shape"])
  cost = "" if row["cost_db"] is None else f"{row['cost_db']:.3f}"
  # the group is a path; its own last part, "(q_proj|k_proj|v_proj).weight_quantizer", says which siblings these are
  group = (row["group"] or "").rpartition("(")[2].partition(")")[0]
  return [row["name"], row["format"], row["state"], amax, group, cost]


def _lines(rows: list[dict[str, Any]]) -> list[str]:
  table = [list(COLUMNS), *(_cells(row) for row in rows)]
  widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
  return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _print_table(rows: list[dict[str, Any]], last: str) -> None:
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  table = Table()
  for column in COLUMNS:
    table.add_column(column, overflow="fold")
  for row in rows:
    table.add_row(*(Text(cell) for cell in _cells(row)), style=None if row["enabled"] else "dim")
  console = Console()
  console.print(table)
  console.print(Text(last))
