"""A search as people read it: the choice per group with scores and their spread, as a table and as CSV."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import files
from core.search.state import plan_of


def rows_of(search_state: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One row per layer and format, in the model's order.

  Returns:
    {"layer", "group", "format", "chosen", "score" (of the layer, or of its group for "kl_div"), "mean", "std" (over batches), "bits" (per
    weight of the group), "weights" (of the layer)}.
  """
  plan = plan_of(search_state)
  group_of = {member: group for group, members in plan.groups.items() for member in members}
  rows = []
  for layer in plan.layers:
    group = group_of[layer.name]
    measured = search_state["layer_scores"].get(layer.name) or search_state["layer_scores"].get(group) or {}
    for name in plan.choices[group]:
      spread = measured.get(name, {"sum": 0.0, "mean": 0.0, "std": 0.0})
      rows.append(
        {
          "layer": layer.name,
          "group": group,
          "format": name,
          "chosen": search_state["assignment"][group] == name,
          "score": spread["sum"],
          "mean": spread["mean"],
          "std": spread["std"],
          "bits": search_state["bits"][group][name],
          "weights": layer.copies * math.prod(layer.shape),
        }
      )
  return rows


def write_csv(search_state: Mapping[str, Any], path: str | Path) -> None:
  """Write `rows_of` as CSV, in one step."""
  rows = rows_of(search_state)
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else ["layer"], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  files.write(path, buffer.getvalue())


def print_auto_quantize_summary(search_state: Mapping[str, Any], csv_path: str | Path | None = None) -> None:
  """Print one line per layer: what was chosen, its bits, and the score of every format with its spread over batches.

  A rich table on a terminal, plain columns otherwise. A score reads "sum (+- std of a batch, in % of the mean)".

  Args:
    search_state: what `auto_quantize` returned.
    csv_path: also write every layer and format to this file.
  """
  columns, lines = _table(search_state)
  notes = _notes(search_state)
  if csv_path is not None:
    write_csv(search_state, csv_path)
  if sys.stdout.isatty():
    _print_table(columns, lines, notes)
    return
  widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
  for line in (columns, *lines):
    print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
  print("\n".join(notes))


def _table(state: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  formats = list(dict.fromkeys(name for names in state["choices"].values() for name in names))
  lines: dict[str, list[str]] = {}
  for row in rows_of(state):
    line = lines.setdefault(row["layer"], [row["layer"], "", "", *[""] * len(formats)])
    line[3 + formats.index(row["format"])] = _score(row)
    if row["chosen"]:
      line[1:3] = [row["format"], f"{row['bits']:.3f}"]
  return ["layer", "chosen", "bits", *formats], list(lines.values())


def _score(row: Mapping[str, Any]) -> str:
  if not row["score"] and not row["std"]:
    return "0"
  spread = f" (+-{100 * row['std'] / abs(row['mean']):.0f} %)" if row["std"] and row["mean"] else ""
  return f"{row['score']:.3g}{spread}"


def _notes(state: Mapping[str, Any]) -> list[str]:
  counts: dict[str, int] = {}
  for choice in state["assignment"].values():
    counts[choice] = counts.get(choice, 0) + 1
  limits = ", ".join(f"{name} {value:.6g} of {state['constraints'][name]:g}" for name, value in state["limits"].items())
  what = f"{len(state['layers'])} layers in {len(state['groups'])} groups: " + ", ".join(f"{n} {name}" for name, n in counts.items())
  scored = f"scored by {state['method']}" + (f" over {state['batches']} batches" if state["batches"] else " of the weights")
  notes = [f"{what}; {limits}; {state['effective_bits']:.4f} bits per weight ({state['counting']['accounting']})"]
  notes.append(f"{scored}; objective {state['objective']:.6g}")
  if not state["proven"]:
    notes.append("the solver stopped before its proof: the assignment is HiGHS's, optimal to its tolerance")
  return notes


def _print_table(columns: list[str], lines: list[list[str]], notes: list[str]) -> None:
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  table = Table()
  for column in columns:
    table.add_column(column, overflow="fold")
  for line in lines:
    table.add_row(*(Text(cell) for cell in line))
  console = Console()
  console.print(table)
  for note in notes:
    console.print(Text(note))
