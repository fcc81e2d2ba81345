"""What a quantized model consists of, as a table and as data."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from torch import nn

from torch_backend import groups, statistics
from torch_backend.modules import QuantWeight
from torch_backend.names import walk
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers

COLUMNS = ("name", "format", "state", "amax", "group", "cost_db")


def print_quant_summary(model: nn.Module, output_dir: str | pathlib.Path | None = None) -> list[dict[str, Any]]:
  """Print one line per quantizer: format, state, amax, its group of siblings and what sharing their scale costs in SQNR.

  A table on a terminal, plain text otherwise.

  Args:
    model: a quantized model.
    output_dir: also write the plain text to `quant_summary.txt` in this directory.

  Returns:
    One dict per TensorQuantizer: name, format, enabled, state, amax_min, amax_max, amax_shape, group, cost_db.
  """
  rows = summary(model)
  enabled = sum(row["enabled"] for row in rows)
  sharing = [row["cost_db"] for row in rows if row["cost_db"] is not None]
  last = f"{len(rows)} quantizers, {enabled} enabled"
  if sharing:
    last += (
      f"; {len(sharing)} weights share a tensor scale with siblings, which costs them {sum(sharing) / len(sharing):.3f} dB SQNR on average"
    )
  text = "\n".join([*_lines(rows), last])
  if output_dir is not None:
    folder = pathlib.Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quant_summary.txt").write_text(text + "\n", encoding="utf-8")
  if sys.stdout.isatty():
    _print_table(rows, last)
  else:
    print(text)
  return rows


def summary(model: nn.Module) -> list[dict[str, Any]]:
  """The data of `print_quant_summary`, without printing."""
  return [_row(one, module) for _, quantizer, module in walk(model) for one in tensor_quantizers(quantizer)]


def _row(quantizer: TensorQuantizer, module: nn.Module) -> dict[str, Any]:
  amax = quantizer.amax
  known = None if amax is None or amax.is_meta else amax
  return {
    "name": quantizer.name,
    "format": quantizer.config.describe() if quantizer.is_enabled else "",
    "enabled": quantizer.is_enabled,
    "state": _state(quantizer),
    "amax_min": None if known is None else float(known.min()),
    "amax_max": None if known is None else float(known.max()),
    "amax_shape": tuple(amax.shape) if amax is not None else None,
    "group": quantizer.group if quantizer.own_tensor_amax is not None else None,
    "cost_db": groups.cost_db(module, quantizer) if isinstance(module, QuantWeight) else None,
  }


def _state(quantizer: TensorQuantizer) -> str:
  if not quantizer.is_enabled:
    return "folded" if quantizer.is_folded else "off"
  if quantizer.amax is not None:
    return "constant" if quantizer.config.constant_amax is not None else "calibrated"
  return "not calibrated" if quantizer.config.needs_calibration else "dynamic"


def _cells(row: dict[str, Any]) -> list[str]:
  amax = ""
  if row["amax_max"] is not None:
    amax = statistics.describe_range(row["amax_min"], row["amax_max"], row["amax_shape"])
  return [row["name"], row["format"], row["state"], amax, row["group"] or "", "" if row["cost_db"] is None else f"{row['cost_db']:.3f}"]


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
