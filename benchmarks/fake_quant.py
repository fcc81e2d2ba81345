"""python -m benchmarks.fake_quant : fake quantization of one tensor, every format, every runtime, beside a copy and beside the peers.

Everything is timed in one process, interleaved; the table shows the least time of all rounds as a ratio to a copy into a preallocated
output. `clone` (a copy into a new tensor) is shown as well. The run also checks that all of twinquant's runtimes gave the same bits.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import environment, peers, runtimes, timing
from benchmarks.cases import CASES, Case, select
from experiments import manifest

MODULE = "benchmarks.fake_quant"
COPY, CLONE, OURS = "copy", "clone", "twinquant"
NOISE = 1.15  # two figures closer than this are level: what repeated runs of this benchmark differ by


def main(arguments: list[str] | None = None) -> int:
  """Run, print, write; 1 if the runtimes' bits differ."""
  arguments = sys.argv[1:] if arguments is None else arguments
  options = _parser().parse_args(arguments)
  environment.restart(MODULE, arguments, options.fresh_memory)
  cores = environment.use_cores(options.cores)
  environment.torch_threads(cores)
  importlib.import_module("torch._dynamo").config.recompile_limit = 10_000
  wanted = options.runtimes.split(",")
  unknown = [name for name in wanted if name not in runtimes.RUNTIMES]
  if unknown:
    raise ValueError(f"unknown runtime {', '.join(unknown)}; allowed are {', '.join(runtimes.RUNTIMES)}")
  rows: list[dict[str, Any]] = []
  for dtype in options.dtype.split(","):
    rows += measure(options, dtype, wanted, select(options.formats))
  facts = manifest.manifest(f"python -m {MODULE} {' '.join(arguments)}".strip(), memory=environment.memory(), cores_used=cores)
  console = Console(width=170)
  for dtype in options.dtype.split(","):
    show(console, [row for row in rows if row["dtype"] == dtype], f"{dtype}, {options.rows} x {options.cols}")
  console.print(about(facts), highlight=False)
  if options.out:
    manifest.write_csv(f"{options.out}/fake_quant.csv", rows)
    path = manifest.write_json(f"{options.out}/fake_quant.json", {"facts": facts, "rows": rows})
    console.print(f"written: {path}, and .csv", highlight=False)
  different = differing(rows)
  print("bits of the runtimes:", f"DIFFERENT for {', '.join(different)}" if different else "equal for every format")
  return int(bool(different))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Speed of fake quantization, paired with the peers.")
  parser.add_argument("--rows", type=int, default=2048)
  parser.add_argument("--cols", type=int, default=4096)
  parser.add_argument("--dtype", default="float32,bfloat16", help="comma-separated: float32, bfloat16, float16")
  parser.add_argument("--rounds", type=int, default=20)
  parser.add_argument("--seconds", type=float, default=240.0, help="no new round after this time, for each dtype")
  parser.add_argument("--formats", default="all", help=f"all, targets, or some of {', '.join(c.key for c in CASES)}")
  parser.add_argument("--runtimes", default=",".join(runtimes.RUNTIMES))
  parser.add_argument("--no-peers", action="store_true", help="leave out ModelOpt, torchao, qwix and torch's own")
  parser.add_argument("--cores", type=int, default=0, help="use so many cores; 0 is all. On a busy machine 1 is steadier")
  parser.add_argument("--fresh-memory", action="store_true", help="do not tell glibc to reuse freed memory")
  parser.add_argument("--out", help="folder for fake_quant.csv and fake_quant.json")
  return parser


def measure(options: argparse.Namespace, dtype: str, wanted: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
  """One row per candidate."""
  host = np.random.default_rng(0).standard_normal((options.rows, options.cols), np.float32)
  host = runtimes.rounded(host, dtype)
  inputs = {name: runtimes.cast(runtimes.array(host, name), name, dtype) for name in wanted}
  candidates, described, rows = _copies(host, dtype), {}, []
  for case in cases:
    for row, call in [*_ours(case, host, inputs), *([] if options.no_peers else _peers(case, host, dtype))]:
      row |= {"format": case.key, "dtype": dtype, "target": case.target}
      if call is None:
        rows.append(row)
      else:
        label = f"{case.key}/{row['library']}/{row['runtime']}"
        candidates[label], described[label] = call, row
  timings = timing.interleave(candidates, options.rounds, options.seconds)
  base = timings[COPY]
  for label, timed in timings.items():
    row = described.get(label, {"library": label, "runtime": "eager", "format": label, "dtype": dtype})
    ratios = {"ratio": timed.wall / base.wall, "cpu_ratio": timed.cpu / base.cpu if base.cpu else None}
    rows.append(row | ratios | {"milliseconds": timed.wall * 1e3, "cpu_milliseconds": timed.cpu * 1e3, "rounds": timed.rounds})
  return rows


def _copies(host: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
  x = runtimes.cast(runtimes.array(host, runtimes.TORCH), runtimes.TORCH, dtype)
  out = x.clone()
  return {COPY: lambda: out.copy_(x), CLONE: x.clone}


def _ours(case: Case, host: np.ndarray, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], Callable[[], Any]]]:
  found, state = [], case.state(host)
  for runtime, x in inputs.items():
    call = runtimes.waiting(runtimes.build(case, runtime, x, runtimes.move(state, runtime)), runtime)
    found.append(({"library": OURS, "runtime": runtime, "bits": runtimes.digest(call())}, call))
  return found


def _peers(case: Case, host: np.ndarray, dtype: str) -> list[tuple[dict[str, Any], Callable[[], Any] | None]]:
  return [({"library": p.name, "runtime": p.form, "error": p.error}, p.call) for p in peers.peers(case, host, dtype)]


def differing(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Formats whose results have different bits on different runtimes of twinquant."""
  seen: dict[tuple[str, str], set[int]] = {}
  for row in rows:
    if row["library"] == OURS:
      seen.setdefault((row["format"], row["dtype"]), set()).add(row["bits"])
  return [f"{key} in {dtype}" for (key, dtype), bits in seen.items() if len(bits) > 1]


def verdict(runtime: str, rows: Sequence[dict[str, Any]]) -> str:
  """How twinquant on one runtime stands against its target and against the best peer (for eager torch: the best eager one)."""
  own = next((row for row in rows if row["library"] == OURS and row["runtime"] == runtime), None)
  if own is None:
    return ""
  eager = runtime == runtimes.TORCH
  rivals = [row for row in rows if row["library"] != OURS and "ratio" in row and (not eager or row["runtime"] == "eager")]
  words = []
  if own["target"] and not eager:
    words.append("target met" if own["ratio"] <= own["target"] else f"over target x{own['ratio'] / own['target']:.2f}")
  if rivals:
    quotient = own["ratio"] / min(row["ratio"] for row in rivals)
    words.append(f"peer x{quotient:.2f}" + (" slower" if quotient > NOISE else " level" if quotient > 1 / NOISE else ""))
  return ", ".join(words)


def show(console: Console, rows: Sequence[dict[str, Any]], what: str) -> None:
  """Two tables: twinquant with verdicts, and the peers."""
  copies = {row["format"]: row for row in rows if row["library"] in (COPY, CLONE)}
  base = ", ".join(f"{name} {row['milliseconds']:.2f} ms ({row['ratio']:.2f})" for name, row in copies.items())
  table = Table(title=f"twinquant, {what}: wall time over a copy (CPU time over the copy's); {base}")
  columns = ("numpy", "torch", "compile", "jit")
  for name in ("format", *columns, "target", "best peer", "best eager peer", "compile:", "jit:", "eager:"):
    table.add_column(name, justify="right" if name in columns else "left")
  keys = [case.key for case in CASES if any(row["format"] == case.key for row in rows)]
  for key in keys:
    mine = [row for row in rows if row["format"] == key]
    cells = {row["runtime"]: f"{row['ratio']:.2f} ({row['cpu_ratio']:.2f})" for row in mine if row["library"] == OURS}
    target = next((f"{row['target']}" for row in mine if row["target"]), "")
    verdicts = (verdict(name, mine) for name in (runtimes.COMPILE, runtimes.JIT, runtimes.TORCH))
    table.add_row(key, *(cells.get(name, "") for name in columns), target, _best(mine), _best(mine, "eager"), *verdicts)
  console.print(table)
  _show_peers(console, rows, keys, what)


def _best(rows: Sequence[dict[str, Any]], form: str | None = None) -> str:
  rivals = [row for row in rows if row["library"] != OURS and "ratio" in row and form in (None, row["runtime"])]
  if not rivals:
    return ""
  best = min(rivals, key=lambda row: row["ratio"])
  return f"{best['library']} {best['runtime']} {best['ratio']:.2f}"


def _show_peers(console: Console, rows: Sequence[dict[str, Any]], keys: Sequence[str], what: str) -> None:
  found = [row for row in rows if row["library"] not in (OURS, COPY, CLONE)]
  if not found:
    return
  labels = list(dict.fromkeys((row["library"], row["runtime"]) for row in found))
  table = Table(title=f"peers, {what}: wall time over a copy")
  for name in ("format", *(f"{library} {form}" for library, form in labels)):
    table.add_column(name, justify="left" if name == "format" else "right")
  for key in keys:
    cells = {(r["library"], r["runtime"]): f"{r['ratio']:.2f}" if "ratio" in r else "fails" for r in found if r["format"] == key}
    if cells:
      table.add_row(key, *(cells.get(label, "") for label in labels))
  console.print(table)
  for row in found:
    if row.get("error") and row["runtime"] == "eager":
      console.print(f"{row['format']}: {row['library']} fails: {row['error']}", highlight=False, markup=False)


def about(facts: dict[str, Any]) -> str:
  """One paragraph on where the figures come from."""
  machine, versions = facts["machine"], facts["versions"]
  libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
  return (
    f"{facts['command']}\n{facts['time']}, commit {facts['commit']}, {facts['cores_used']} of {machine['cores']} cores used, "
    f"load {machine['load']}, freed memory {facts['memory']}\n{libraries}"
  )


if __name__ == "__main__":
  sys.exit(main())
