"""python -m benchmarks.tables DIR : the results that the benchmarks wrote into DIR, as Markdown for docs/performance.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import fake_quant, model_forward
from benchmarks.cases import CASES


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; the first column to the left, the others to the right."""
  lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
  return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def fake_quant_tables(content: dict[str, Any]) -> str:
  """twinquant with verdicts, then the peers, for each dtype."""
  parts = []
  for dtype in dict.fromkeys(row["dtype"] for row in content["rows"]):
    rows = [row for row in content["rows"] if row["dtype"] == dtype]
    parts += [f"### {dtype}", _own(rows), _peers(rows)]
  return "\n\n".join(parts)


def _own(rows: Sequence[dict[str, Any]]) -> str:
  runtimes = ("numpy", "torch", "compile", "jit")
  out = []
  for case in CASES:
    mine = [row for row in rows if row["format"] == case.key]
    if mine:
      cells = {r["runtime"]: f"{r['ratio']:.2f} ({r['cpu_ratio']:.2f})" for r in mine if r["library"] == fake_quant.OURS}
      verdicts = [fake_quant.verdict(name, mine) for name in ("compile", "jit", "torch")]
      out.append([case.title, *(cells.get(name, "") for name in runtimes), "" if case.target is None else str(case.target), *verdicts])
  return markdown(("format", *runtimes, "target", "compile", "jit", "eager"), out)


def _peers(rows: Sequence[dict[str, Any]]) -> str:
  found = [row for row in rows if row["library"] not in (fake_quant.OURS, fake_quant.COPY, fake_quant.CLONE)]
  labels = list(dict.fromkeys((row["library"], row["runtime"]) for row in found))
  out = []
  for case in CASES:
    cells = {(r["library"], r["runtime"]): f"{r['ratio']:.2f}" if "ratio" in r else "fails" for r in found if r["format"] == case.key}
    if cells:
      out.append([case.title, *(cells.get(label, "") for label in labels)])
  return markdown(("format", *(f"{library} {form}" for library, form in labels)), out)


def model_forward_table(content: dict[str, Any]) -> str:
  """One row per preset."""
  rows = content["rows"]
  names = [name for name in model_forward.RUNTIMES if any(row["runtime"] == name for row in rows)]
  out = []
  for preset in dict.fromkeys(row["preset"] for row in rows):
    found = {row["runtime"]: row for row in rows if row["preset"] == preset}
    target = model_forward.target_of(preset)
    cells = [f"{found[name]['ratio']:.2f} ({found[name]['cpu_ratio']:.2f})" if name in found else "" for name in names]
    out.append([preset, *cells, "" if target is None else str(target), model_forward.verdict(found, target)])
  return markdown(("preset", *names, "target", "verdict"), out)


def main(arguments: list[str] | None = None) -> int:
  """Print what is there."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.tables")
  parser.add_argument("folder")
  folder = Path(parser.parse_args(arguments).folder)
  found = False
  for name, table in (("fake_quant", fake_quant_tables), ("model_forward", model_forward_table)):
    path = folder / f"{name}.json"
    if path.is_file():
      content, found = json.loads(path.read_text()), True
      print(f"```\n{fake_quant.about(content['facts'])}\n```\n\n{table(content)}\n")
  if not found:
    print(f"neither fake_quant.json nor model_forward.json is in {folder}; run the benchmarks with --out={folder}")
  return int(not found)


if __name__ == "__main__":
  sys.exit(main())
