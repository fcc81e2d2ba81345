"""python -m benchmarks.gpu --out=results/gpu : the specification and the speed table on a GPU.

Needs Python 3.11+, numpy and rich, and of torch and jax whichever has a GPU build here; twinquant itself need not be installed (run it in
the repository's root). Exit status: 0 all bits equal, 1 some differ or a part failed, 2 no GPU was found.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SHARDS = {("torch", False): 1, ("torch", True): 5, ("jax", False): 3, ("jax", True): 3}  # processes of the conformance run


def main(arguments: list[str] | None = None) -> int:
  """Probe, conformance, speed; print and write."""
  options = _parser().parse_args(arguments)
  out = Path(options.out).resolve()
  (out / "parts").mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()
  found = {f: Part(out, "probe", f, options.device, 90).start().finish() for f in ("torch", "jax")}
  usable = [f for f, facts in found.items() if facts and "missing" not in facts]
  if not usable:
    reasons = "; ".join(f"{f}: {(facts or {}).get('missing', 'the probe did not answer')}" for f, facts in found.items())
    print(f"benchmarks.gpu: no GPU found, nothing was run ({reasons}). Run it where torch or jax has a CUDA build and a GPU.")
    return 2
  result: dict[str, Any] = {"facts": facts(found, sys.argv[1:] if arguments is None else arguments)}
  if not options.skip_conformance:
    result["conformance"] = run_conformance(options, out, usable)
  if not options.skip_speed:
    result["speed"] = run_speed(options, out, usable)
  result["seconds"] = round(time.perf_counter() - start, 1)
  (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
  with (out / "gpu.txt").open("w") as text:
    for console in (Console(width=150), Console(file=text, width=150)):
      show(console, result)
  print(f"written: {out / 'gpu.json'}, {out / 'gpu.txt'}")
  return int(not all_equal(result))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Conformance vectors and speed on a GPU.")
  parser.add_argument("--out", default="results/gpu", help="folder for gpu.json and gpu.txt")
  parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the run without a GPU")
  parser.add_argument("--rows", type=int, default=8192)
  parser.add_argument("--cols", type=int, default=8192)
  parser.add_argument("--dtype", default="bfloat16,float32")
  parser.add_argument("--formats", default="targets", help="all, targets, or keys of benchmarks/cases.py")
  parser.add_argument("--rounds", type=int, default=20)
  parser.add_argument("--cases_per_file", type=int, default=1000, help="at most so many conformance cases of each file")
  parser.add_argument("--conformance_seconds", type=float, default=110.0, help="all runtimes at once; what is not reached is counted")
  parser.add_argument("--speed_seconds", type=float, default=75.0, help="for each framework")
  parser.add_argument("--skip_conformance", action="store_true")
  parser.add_argument("--skip_speed", action="store_true")
  return parser


@dataclasses.dataclass
class Part:
  """One process of `benchmarks.gpu_parts` and its file."""

  folder: Path
  part: str
  framework: str
  device: str
  seconds: float
  label: str = ""
  extra: tuple[str, ...] = ()
  process: subprocess.Popen | None = None

  @property
  def path(self) -> Path:
    return self.folder / "parts" / f"{self.part}_{self.framework}{self.label}.json"

  def start(self) -> Part:
    """Begin, in the background."""
    self.path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", self.part, f"--framework={self.framework}", f"--device={self.device}"]
    command += [f"--out={self.path}", f"--seconds={self.seconds}", *self.extra]
    # processes share the device: jax would otherwise take three quarters of its memory at its first array
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with self.path.with_suffix(".log").open("w") as log:
      self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    self.deadline = time.perf_counter() + 1.3 * self.seconds + 45
    return self

  def finish(self) -> dict[str, Any] | None:
    """Wait (a compilation may outlast the part's time; one that does by far is ended) and read what was written."""
    assert self.process is not None
    try:
      status = self.process.wait(max(self.deadline - time.perf_counter(), 1.0))
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
      status = 0  # what it reports is what it reached; a runtime that reached nothing counts as failed
    content = json.loads(self.path.read_text()) if self.path.exists() else None
    if status and content is not None:
      content["status"] = status
    if content is None:
      print(f"benchmarks.gpu: {self.path.stem} wrote nothing (status {status}); its output is in {self.path.with_suffix('.log')}")
    return content


def facts(found: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
  """Machine, versions, commit, command."""
  try:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    commit = None
  return {
    "command": " ".join(["python -m benchmarks.gpu", *arguments]),
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit,
    "python": platform.python_version(),
    "cores": os.cpu_count(),
    "load": round(os.getloadavg()[0], 2),
    "frameworks": found,
  }


def run_conformance(options: argparse.Namespace, out: Path, frameworks: Sequence[str]) -> list[dict[str, Any]]:
  """Every runtime at once, each in several processes; one summary per runtime."""
  sys.path.insert(0, str(ROOT))
  from core.conformance import vectors_io

  names, parts = vectors_io.names(), []
  for (framework, compiled), shards in SHARDS.items():
    if framework not in frameworks:
      continue
    for shard in range(shards):
      extra = [f"--files={','.join(names[shard::shards])}", f"--cases_per_file={options.cases_per_file}", *["--compiled"] * compiled]
      label = f"{'_compiled' * compiled}_{shard}"
      parts.append(Part(out, "conformance", framework, options.device, options.conformance_seconds, label, tuple(extra)).start())
  merged: dict[str, dict[str, Any]] = {}
  for part in parts:
    content = part.finish()
    runtime = content["runtime"] if content else part.framework + " (no report)"
    row = merged.setdefault(
      runtime,
      {"runtime": runtime, "cases": 0, "available": 0, "compared": 0, "mismatches": 0, "failures": [], "errors": [], "files": []},
    )
    if content is None:
      row["errors"].append(f"{part.path.stem}: no report")
      continue
    for entry in content["files"]:
      for field in ("cases", "available", "compared", "mismatches"):
        row[field] += entry[field]
    for field in ("failures", "errors", "files"):
      row[field] += content[field]
    if "status" in content:
      row["errors"].append(f"{part.path.stem}: status {content['status']}")
  return list(merged.values())


def run_speed(options: argparse.Namespace, out: Path, frameworks: Sequence[str]) -> list[dict[str, Any]]:
  """One framework after the other, alone on the device."""
  extra = tuple(f"--{name}={getattr(options, name)}" for name in ("rows", "cols", "dtype", "formats", "rounds"))
  found = []
  for framework in frameworks:
    content = Part(out, "speed", framework, options.device, options.speed_seconds, extra=extra).start().finish()
    found.append(content or {"framework": framework, "rows": [], "errors": ["no report"]})
  return found


def all_equal(result: dict[str, Any]) -> bool:
  """No mismatch, no failed part, and results alike on every runtime."""
  conformance = result.get("conformance", ())
  good = all(row["cases"] and not row["mismatches"] and not row["errors"] for row in conformance)
  rows = [row for part in result.get("speed", ()) for row in part["rows"]]
  return good and all(row["equals_numpy"] is not False for row in rows) and not differing(rows)


def differing(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Formats whose results have different bits on different runtimes."""
  seen: dict[tuple[str, str], set[int]] = {}
  for row in rows:
    if row["bits"] is not None:
      seen.setdefault((row["format"], row["dtype"]), set()).add(row["bits"])
  return [f"{key} in {dtype}" for (key, dtype), bits in seen.items() if len(bits) > 1]


def show(console: Console, result: dict[str, Any]) -> None:
  """Tables."""
  about = result["facts"]
  console.print(
    f"{about['command']}\n{about['time']}, commit {about['commit']}, {about['cores']} cores, load {about['load']}", highlight=False
  )
  for name, found in about["frameworks"].items():
    console.print(f"{name}: {', '.join(f'{k} {v}' for k, v in (found or {'missing': 'no answer'}).items())}", highlight=False)
  if "conformance" in result:
    _show_conformance(console, result["conformance"])
  rows = [row for part in result.get("speed", ()) for row in part["rows"]]
  for dtype in dict.fromkeys(row["dtype"] for row in rows):
    _show_speed(console, dtype, result["speed"][0].get("shape"), [row for row in rows if row["dtype"] == dtype])
  for part in result.get("speed", ()):
    for line in part["errors"]:
      console.print(f"{part['framework']}: {line}", highlight=False, markup=False)
  if rows:
    different = differing(rows)
    console.print(f"bits across the runtimes: {'DIFFERENT for ' + ', '.join(different) if different else 'equal for every format'}")


def _show_conformance(console: Console, conformance: Sequence[dict[str, Any]]) -> None:
  table = Table(title="Conformance vectors")
  for name in ("runtime", "cases run", "of", "values compared", "mismatches", "failed"):
    table.add_column(name, justify="left" if name == "runtime" else "right")
  for row in conformance:
    numbers = (row["cases"], row["available"], row["compared"], row["mismatches"], len(row["errors"]))
    table.add_row(row["runtime"], *(f"{n:,}" for n in numbers), style="bold red" if row["mismatches"] or row["errors"] else None)
  console.print(table)
  for row in conformance:
    for line in (*row["failures"][:10], *row["errors"][:10]):
      console.print(f"{row['runtime']}: {line}", highlight=False, markup=False)


def _show_speed(console: Console, dtype: str, shape: Sequence[int] | None, rows: Sequence[dict[str, Any]]) -> None:
  table = Table(title=f"fake_quantize, {dtype}, {shape}: ratio to a copy (microseconds, GB/s read and written)")
  table.add_column("format")
  names = list(dict.fromkeys(row["runtime"] for row in rows if row["format"] != "copy"))
  for name in names:
    table.add_column(name, justify="right")
  table.add_column("first rows equal numpy", justify="right")
  copies = {row["runtime"]: row for row in rows if row["format"] == "copy"}
  line = {name: copies.get("jax" if name == "jit" else "torch") for name in names}
  table.add_row("copy", *(_cell(line[name]) for name in names), "")
  for key in dict.fromkeys(row["format"] for row in rows if row["format"] != "copy"):
    found = {row["runtime"]: row for row in rows if row["format"] == key}
    checks = {row["equals_numpy"] for row in found.values()}
    table.add_row(key, *(_cell(found.get(name)) for name in names), "no" if False in checks else "yes" if True in checks else "")
  console.print(table)


def _cell(row: dict[str, Any] | None) -> str:
  if row is None:
    return ""
  return f"{row['ratio']:.2f} ({row['seconds'] * 1e6:.0f} us, {row['gigabytes_per_second']:.0f})"


if __name__ == "__main__":
  sys.exit(main())
