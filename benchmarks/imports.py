"""python -m benchmarks.imports : what importing costs, in fresh interpreters, over the frameworks that a package needs anyway."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Import:
  """One package over what it stands on.

  Attributes:
    package: name.
    over: modules that are imported before, not counted.
    target: allowed seconds over them, or None.
  """

  package: str
  over: tuple[str, ...]
  target: float | None = None


IMPORTS = (
  Import("core", ("numpy",), 0.1),
  Import("torch_backend", ("torch",), 0.3),
  Import("jax_backend", ("jax", "flax.linen"), 0.3),
)
PEERS = (Import("modelopt.torch.quantization", ("torch",)), Import("torchao", ("torch",)), Import("qwix", ("jax", "flax.linen")))


def seconds(entry: Import, repeats: int = 3) -> tuple[float, float]:
  """(over, package): least seconds of `repeats` fresh interpreters for what it stands on, and for the package over that.

  Raises:
    subprocess.CalledProcessError: the import fails.
  """
  before = [f"import {name}" for name in entry.over]
  lines = ["import time", "a = time.perf_counter()", *before, "b = time.perf_counter()", f"import {entry.package}"]
  code = ";".join([*lines, "print(b - a, time.perf_counter() - b)"])
  runs = []
  for _ in range(repeats):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    runs.append(tuple(float(word) for word in done.stdout.split()[-2:]))
  return min(run[0] for run in runs), min(run[1] for run in runs)


def main(arguments: list[str] | None = None) -> int:
  """Print the table."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description="Import times in fresh interpreters.")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--no-peers", action="store_true")
  options = parser.parse_args(arguments)
  table = Table(title=f"Import times, seconds, least of {options.repeats} fresh interpreters")
  for name in ("package", "over", "those take", "the package adds", "target", "verdict"):
    table.add_column(name, justify="left" if name in ("package", "over") else "right")
  for entry in IMPORTS if options.no_peers else (*IMPORTS, *PEERS):
    try:
      over, added = seconds(entry, options.repeats)
    except subprocess.CalledProcessError as error:
      table.add_row(entry.package, ", ".join(entry.over), "", "does not import: " + error.stderr.strip().splitlines()[-1][:60], "", "")
      continue
    verdict = "" if entry.target is None else "met" if added <= entry.target else "missed"
    target = "" if entry.target is None else f"{entry.target:.1f}"
    table.add_row(entry.package, ", ".join(entry.over), f"{over:.2f}", f"{added:.3f}", target, verdict)
  Console(width=120).print(table)
  return 0


if __name__ == "__main__":
  sys.exit(main())
