"""python -m benchmarks.compressed : a model as floats, simulated, and compressed: bytes, bits per weight, seconds of a forward pass.

Simulated is as in evaluation: eager torch keeps the quantized weights, jax.jit computes them in every call (folded ones are the column
"folded"). The three are interleaved. The logits of the compressed model must be those of the simulated one, bit for bit; they are compared
and a difference is an error.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import environment, timing
from core.compression import CompressionReport
from experiments import manifest

MODULE = "benchmarks.compressed"
FLOAT, FAKE, FOLDED, COMPRESSED = FORMS = ("float", "simulated", "folded", "compressed")


def main(arguments: list[str] | None = None) -> int:
  """Run, print, write."""
  arguments = sys.argv[1:] if arguments is None else arguments
  options = _parser().parse_args(arguments)
  environment.restart(MODULE, arguments, False)
  cores = environment.use_cores(options.cores)
  environment.torch_threads(cores)
  rows: list[dict[str, Any]] = []
  for family in options.families.split(","):
    for preset in options.presets.split(","):
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows.append({"preset": preset, "runtime": family, **{"torch": torch_row, "jax": jax_row}[family](options, preset)})
      gc.collect()
  facts = manifest.manifest(f"python -m {MODULE} {' '.join(arguments)}".strip(), memory=environment.memory(), cores_used=cores)
  console = Console(width=150)
  console.print(table(rows))
  console.print(
    f"{facts['command']}\n{facts['time']}, commit {facts['commit']}, {cores} of {facts['machine']['cores']} cores used, "
    f"load {facts['machine']['load']}",
    highlight=False,
  )
  if options.out:
    manifest.write_csv(f"{options.out}/compressed.csv", rows)
    console.print(f"written: {manifest.write_json(f'{options.out}/compressed.json', {'facts': facts, 'rows': rows})}", highlight=False)
  return 0 if all(row["equal"] for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="What compressed weights take and cost.")
  parser.add_argument("--model", default="smollm2")
  parser.add_argument("--presets", default="NVFP4_DEFAULT_CFG", help="comma-separated preset names")
  parser.add_argument("--families", default="torch,jax")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--tokens", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--cores", type=int, default=1, help="use so many cores; 0 is all. On a busy machine 1 is steadier")
  parser.add_argument("--out", help="folder for compressed.csv and compressed.json")
  return parser


def table(rows: list[dict[str, Any]]) -> Table:
  """One line per preset and runtime."""
  columns = (
    "preset",
    "runtime",
    "weights",
    "bits per weight",
    "model MB",
    "as floats MB",
    *(f"{form} s" for form in FORMS),
    "logits equal",
  )
  made = Table()
  for column in columns:
    made.add_column(column, justify="left" if column in columns[:2] else "right")
  for row in rows:
    sizes = (f"{row['weights']:,}", f"{row['bits_per_weight']:.4f}", f"{row['bytes'] / 1e6:.1f}", f"{row['float_bytes'] / 1e6:.1f}")
    times = (f"{row[form]:.2f}" if form in row else "" for form in FORMS)
    made.add_row(row["preset"], row["runtime"], *sizes, *times, f"{row['compared']:,}" if row["equal"] else "NO")
  return made


def _row(report: CompressionReport, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
  """Figures of one model; the calls are warmed up, compared and timed."""
  fake, compressed = (np.asarray(calls[form](), np.float32) for form in (FAKE, COMPRESSED))
  for form in (FLOAT, FOLDED):
    if form in calls:
      calls[form]()
  timings = timing.interleave(calls, rounds)
  return {
    "weights": sum(w.numel for w in report.compressed),
    "bits_per_weight": report.bits_per_weight,
    "bytes": report.total_bytes,
    "float_bytes": report.float_bytes,
    "equal": fake.tobytes() == compressed.tobytes(),
    "compared": fake.size,
    **{form: timed.wall for form, timed in timings.items()},
  }


def _tokens(options: argparse.Namespace) -> np.ndarray:
  return np.random.default_rng(0).integers(100, 40_000, (options.batch, options.tokens))


def torch_row(options: argparse.Namespace, preset: str) -> dict[str, Any]:
  """Eager torch."""
  import copy

  import torch

  import torch_backend
  from experiments import models

  ids = torch.from_numpy(_tokens(options))
  model, _ = models.load_torch(options.model)
  model.eval()

  def call(which: Any) -> Callable[[], Any]:
    def run() -> Any:
      with torch.no_grad():
        return which(ids).logits

    return run

  fake = torch_backend.quantize(copy.deepcopy(model), torch_backend.preset(preset), lambda m: m(ids))
  compressed = torch_backend.compress(copy.deepcopy(fake))
  calls = {FLOAT: call(model), FAKE: call(fake), COMPRESSED: call(compressed)}
  return _row(torch_backend.compression_report(compressed), calls, options.rounds)


def jax_row(options: argparse.Namespace, preset: str) -> dict[str, Any]:
  """jax.jit."""
  import jax

  import jax_backend
  from experiments import models

  ids = jax.numpy.asarray(_tokens(options))
  module, variables, _ = models.load_jax(options.model)
  qmodule, fake = jax_backend.quantize(module, variables, jax_backend.preset(preset), lambda m: m(ids))
  compressed = jax_backend.compress(qmodule, fake)
  folded = jax_backend.fold_weight(qmodule, fake)
  run, plain = jax.jit(qmodule.apply), jax.jit(module.apply)

  def call(apply: Any, held: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(apply(held, ids))

  calls = {FLOAT: call(plain, variables), FAKE: call(run, fake), FOLDED: call(run, folded), COMPRESSED: call(run, compressed)}
  return _row(jax_backend.compression_report(compressed), calls, options.rounds)


if __name__ == "__main__":
  sys.exit(main())
