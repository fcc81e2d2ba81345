"""Calibration algorithms of twinquant beside those of NVIDIA ModelOpt: same model, tokens, configuration; every run in its own process.

  python -m benchmarks.algorithms --backends=torch,jax

Two tables. "Algorithms": for each configuration that both run, twinquant must be no worse: on both texts its negative log-likelihood per
token may exceed ModelOpt's by at most twice the standard error of the paired difference. "Four bits": our own configurations, whose NLL
added over float and whose KL must stay within given ratios of their rival's on the first text, of the calibration's kind, and below it on
the second; the rival is the best of ModelOpt's four-bit integer runs, or one run. Exit status 1 where a limit is missed or a run fails.
Runs of both sides are kept (`--refresh` repeats them); ours are repeated whenever our source changes.

CPU seconds are those of the calibration alone, all threads, compilation included. ModelOpt's NVFP4 runs have no ratio: see
`benchmarks.modelopt_cpu`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from benchmarks import algorithm_runs as runs
from benchmarks import algorithm_tables as tables
from benchmarks import modelopt_algorithms as peer
from benchmarks.algorithm_cases import CASES, OWN, Case, choose
from experiments import cli, manifest, report, setup
from experiments.cli import flag

MODULE = "benchmarks.algorithms"


@dataclasses.dataclass(frozen=True)
class Options(runs.Settings):
  """Flags."""

  algorithms: tuple[str, ...] = flag((), "names of runs that both sides do; empty takes all")
  own: tuple[str, ...] = flag((), "names of our own four-bit configurations; empty takes all")
  backends: tuple[str, ...] = flag(("torch",), "torch, jax")
  share_scales: bool = flag(False, "siblings (q/k/v, gate/up) share tensor-level scales, which ModelOpt's runs do not")
  tables: str = flag("results/algorithms", "folder of the tables; empty writes none")
  worker: str = flag("", "internal: BACKEND:NAME, calibrate this one in this process")


def path_of(options: Options, inputs: runs.Inputs, backend: str, case: Case) -> Path:
  """Where our run of a case is kept, without a suffix."""
  facts = {"config": case.config(), "share_scales": options.share_scales, "source": source_digest(backend)}
  return Path(options.out) / f"{backend}-{case.name}-{runs.key(inputs, **facts)}"


def source_digest(backend: str) -> str:
  """SHA-256 of the source that a run of this backend executes."""
  found = hashlib.sha256()
  root = Path(__file__).resolve().parent.parent
  for path in sorted(p for folder in ("core", f"{backend}_backend") for p in (root / folder).rglob("*.py")):
    found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
  return found.hexdigest()


def work(options: Options) -> int:
  """Calibrate and score one case in this process."""
  backend, name = options.worker.split(":")
  inputs = runs.read_inputs(options)
  case = choose([name])[0]
  path = path_of(options, inputs, backend, case)
  model = setup.load(backend, options.model, jit=True)
  rules = None if options.share_scales else ()
  arrays, figures = runs.measure(options, inputs, lambda batches: model.quantize(case.config(), batches, group_rules=rules))
  runs.keep(path, arrays, {"side": backend, "name": case.name, "config": case.config(), **figures, "inputs": inputs.facts})
  return 0


def own_results(options: Options, inputs: runs.Inputs, cases: list[Case]) -> dict[tuple[str, str], runs.Run]:
  """(backend, name) -> run, of every case that ran; those that are not kept run first, one after the other."""
  found = {}
  with report.progress(len(cases) * len(options.backends), "twinquant") as progress:
    for backend in options.backends:
      for case in cases:
        progress.step(f"{backend} {case.name}")
        path = path_of(options, inputs, backend, case)
        command = cli.command(MODULE, dataclasses.replace(options, algorithms=(), own=(), worker=f"{backend}:{case.name}"))
        run = runs.obtain(options, inputs, path, command)
        if run is not None:
          found[backend, case.name] = run
  return found


def compare(options: Options, inputs: runs.Inputs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """(rows of "Algorithms", rows of "Four bits").

  Raises:
    ImportError: ModelOpt is not installed.
    ValueError: an unknown name.
  """
  both = choose(options.algorithms) if options.algorithms else [case for case in CASES if case.peer]
  own = choose(options.own) if options.own else list(OWN)
  # The best of ModelOpt's four-bit runs is the best of all of them, also where only some are compared.
  rivals = {case.rival for case in own}
  needed = [case for case in CASES if case in both or case.name in rivals or ("" in rivals and case.int4 and case.peer)]
  try:
    theirs = peer.results(options, inputs, needed)
    ours = own_results(options, inputs, [*both, *own])
  finally:
    runs.drop_logits(options, inputs)
  base = runs.float_run(options, inputs, logits=False)
  pairs = [
    tables.pair(case, backend, ours.get((backend, case.name)), theirs.get(case.name), base) for backend in options.backends for case in both
  ]
  rows = {case.name: tables.row(case.name, *theirs[case.name], base) for case in needed if case.name in theirs}
  best = {"": tables.best([rows[case.name] for case in needed if case.int4 and case.name in rows])}
  best |= {name: tables.best([row]) for name, row in rows.items()}
  four = [
    tables.against_best(case, backend, ours.get((backend, case.name)), best.get(case.rival, {}), base)
    for backend in options.backends
    for case in own
  ]
  return pairs, four


def main(options: Options) -> int:
  setup.only(options.backends, setup.BACKENDS, "backend")
  runs.language_model(options.model)
  if options.worker:
    return work(options)
  inputs = runs.read_inputs(options)
  try:
    pairs, four = compare(options, inputs)
  except ImportError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  tokens = options.eval_samples * (options.eval_tokens - 1)
  report.show(pairs, tables.PAIRS, f"Algorithms: twinquant beside ModelOpt, {options.model}, {tokens} predicted tokens of each text")
  if four:
    report.show(four, tables.FOUR, "Four bits: ratios to ModelOpt's best INT4 run or to its SVDQuant; below 1 is better")
  if options.tables:
    write(options, inputs, pairs, four)
  return 0 if all(row["passed"] for row in (*pairs, *four)) else 1


def write(options: Options, inputs: runs.Inputs, pairs: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
  """algorithms.json, .md, and one CSV for each table."""
  folder = Path(options.tables)
  facts = manifest.manifest(cli.command(MODULE, options), options=dataclasses.asdict(options), inputs=inputs.facts)
  configs = {case.name: case.config() for case in choose([row["name"] for row in (*pairs, *four)])}
  manifest.write_json(folder / "algorithms.json", {**facts, "configs": configs, "algorithms": pairs, "four_bits": four})
  manifest.write_csv(folder / "algorithms.csv", pairs)
  text = f"## Algorithms\n\n{report.markdown(pairs, tables.PAIRS)}"
  if four:
    manifest.write_csv(folder / "four_bits.csv", four)
    text += f"\n## Four bits\n\n{report.markdown(four, tables.FOUR)}"
  manifest.write_text(folder / "algorithms.md", f"{text}\nRepeat with `{facts['command']}`.\n")


if __name__ == "__main__":
  cli.main(Options, main)
