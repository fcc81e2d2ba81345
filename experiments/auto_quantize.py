r"""Mixed precision: one search, all budgets, evaluated beside the uniform formats and random assignments of the same budget.

  python -m experiments.auto_quantize --model=smollm2 --backend=both --formats=NVFP4_DEFAULT_CFG,FP8_DEFAULT_CFG --effective_bits=4.8 \
    --budgets=4.6,5,6,8

Layers are scored once per backend; every budget is solved from the same scores, its configuration goes through plain `quantize`, and the
model is measured. Writes auto_quantize.csv, .md and .json (rows and search_states), scores-BACKEND.csv, and three figures: sensitivity
(layer x format), chosen formats along the depth, and perplexity over bits. With --scores=FOLDER an interrupted search goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.search import report as search_report
from core.search import state as states
from experiments import auto_quantize_controls as controls
from experiments import auto_quantize_figure, cli, evaluate, manifest, report, setup
from experiments.cli import flag
from experiments.report import Column


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, or a Hugging Face folder of Llama architecture")
  backend: str = flag("both", "where to run", ("torch", "jax", "both"))
  formats: tuple[str, ...] = flag(
    ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"), "preset names and paths of YAML or JSON files; none leaves a layer as it is"
  )
  effective_bits: float = flag(4.8, "budget of the search, in stored bits per weight")
  budgets: tuple[str, ...] = flag(("4.6", "5", "6", "8"), "further budgets, solved from the same scores; those out of reach are left out")
  method: str = flag("gradient", "of the scores", ("gradient", "fisher", "kl_div", "hessian", "sqnr"))
  accounting: str = flag("stored", "stored bits with scales, or ModelOpt's count", ("stored", "modelopt"))
  disabled_layers: tuple[str, ...] = flag((), "patterns of layers that stay as they are")
  random_seeds: tuple[int, ...] = flag((0, 1, 2), "random assignments of the budget of --effective_bits, as controls")
  calib_samples: int = flag(16, "number of windows that calibrate and score")
  calib_tokens: int = flag(128, "tokens in each of them")
  eval_samples: int = flag(16, "number of evaluation windows")
  eval_tokens: int = flag(128, "tokens in each evaluation window")
  batch_samples: int = flag(4, "windows that run at once")
  text: str = flag("python-docs", "text source", ("python-docs",))
  text_file: str = flag("", "a UTF-8 file in place of --text")
  seed: int = flag(0, "of the calibration windows")
  jit: bool = flag(False, "compile the JAX model for each evaluation")
  scores: str = flag("", "folder where an interrupted search goes on; empty keeps none")
  out: str = flag("results/auto_quantize", "folder of the results; empty writes nothing")


COLUMNS = (
  Column("kind", "model"),
  Column("backend", "backend"),
  Column("budget", "budget", ".3g"),
  Column("seed", "seed"),
  Column("effective_bits", "bits", ".4f"),
  Column("objective", "score", ".4g"),
  Column("perplexity", "perplexity", ".3f"),
  Column("delta_nll", "added NLL", "+.5f"),
  Column("delta_nll_se", "+-", ".5f"),
  Column("kl", "KL", ".5f"),
  Column("top1", "top-1", ".1%"),
  Column("calibrate_seconds", "calib s", ".1f"),
  Column("search_seconds", "search s", ".1f"),
  Column("peak_mib", "peak MiB", ".0f"),
)


def read_formats(options: Options) -> dict[str, Any]:
  """Formats by name; None for the choice to leave a layer unquantized.

  Raises:
    ValueError: none given, or an unknown name.
  """
  names = [name for name in options.formats if name != "none"]
  found: dict[str, Any] = {config.name: config.value for config in setup.read_configs(names)}
  return found | ({"none": None} if "none" in options.formats else {})


def budgets_of(options: Options) -> list[float]:
  """The further budgets, ascending.

  Raises:
    ValueError: one that is no number.
  """
  try:
    return sorted({float(budget) for budget in options.budgets} - {options.effective_bits})
  except ValueError as error:
    raise ValueError(f"--budgets={','.join(options.budgets)}: numbers of bits per weight are needed, such as 4.6,5,6") from error


def run(options: Options) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
  """Search and measure.

  Args:
    options: flags.

  Returns:
    (rows, backend -> search_state). Rows are "float", "search" (one per budget), "uniform" and "random".

  Raises:
    ValueError: an unknown format, a budget out of reach, a model that predicts no tokens, or a text that is too short.
  """
  if not setup.is_language_model(options.model):
    raise ValueError(f"--model={options.model} predicts no tokens, so there is no loss to score layers by; give a Llama checkpoint")
  formats = read_formats(options)
  budgets_of(options)
  text = setup.open_text(options.model, options.text, options.text_file)
  calibration = text.cut("calibration", options.calib_samples, options.calib_tokens, options.seed)
  evaluation = text.cut("evaluation", options.eval_samples, options.eval_tokens)
  rows: list[dict[str, Any]] = []
  found: dict[str, dict[str, Any]] = {}
  for backend in setup.backends(options.backend):
    study = _Study(options, backend, formats, calibration, evaluation)
    own, found[backend] = study.run()
    rows += own
  if options.out:
    facts = {
      "options": dataclasses.asdict(options),
      "text": {"source": text.source, "sha256": text.sha256},
      "calibration": setup.describe_windows(calibration),
      "evaluation": setup.describe_windows(evaluation),
    }
    write(options, rows, found, manifest.manifest(cli.command("experiments.auto_quantize", options), **facts))
  return rows, found


class _Study:
  """One backend: its float model, one search, and the models made of it."""

  def __init__(self, options: Options, backend: str, formats: dict[str, Any], calibration: np.ndarray, evaluation: np.ndarray) -> None:
    self._options, self._backend, self._formats = options, backend, formats
    self._calibration = setup.in_batches(calibration, options.batch_samples)
    self._evaluation = setup.in_batches(evaluation, options.batch_samples)
    self._model = setup.load(backend, options.model, jit=options.jit)
    self._reference = evaluate.Reference()

  def run(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, search_state)."""
    options = self._options
    with self._reference as reference:
      self._base = evaluate.score(self._model, self._evaluation, keep=reference)
      rows = [{"kind": "float", **self._row(), **evaluate.figures(self._base, None)}]
      with evaluate.Meter() as meter:
        quantized, state = self._search()
      searched = {"search_seconds": meter.seconds, "peak_mib": meter.peak_mib}
      rows.append({**self._solved(state, options.effective_bits), **searched, **self._measure(quantized)})
      del quantized
      wanted = [*self._budgets(state), *controls.uniform(state), *controls.random(state, options.random_seeds)]
      with report.progress(len(wanted), f"{self._backend}: models") as progress:
        for entry in wanted:
          progress.step(f"{self._backend}: {entry['kind']} {entry.get('budget') or ''}")
          rows.append({**self._row(), **self._made(entry)})
    return rows, state

  def _row(self) -> dict[str, Any]:
    return {"backend": self._backend, "model": self._options.model}

  def _search(self) -> tuple[Any, dict[str, Any]]:
    options = self._options
    checkpoint = Path(options.scores) / f"{self._backend}-{options.method}.json" if options.scores else None
    return self._model.auto_quantize(
      self._calibration,
      {"effective_bits": options.effective_bits},
      self._formats,
      method=options.method,
      accounting=options.accounting,
      disabled_layers=list(options.disabled_layers) or None,
      checkpoint=checkpoint,
      seed=options.seed,
    )

  def _solved(self, state: dict[str, Any], budget: float) -> dict[str, Any]:
    found = {key: state[key] for key in ("effective_bits", "objective")}
    return {"kind": "search", **self._row(), "budget": budget, **found}

  def _budgets(self, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of the other budgets, ascending; those that no assignment meets are left out with a word."""
    found = []
    for budget in budgets_of(self._options):
      try:
        solved = states.with_constraints(state, {"effective_bits": budget})
      except ValueError as error:
        print(f"budget {budget:g} left out: {error}")
        continue
      found.append({**self._solved(solved, budget), "config": states.get_auto_quantize_config(solved)})
    return found

  def _made(self, entry: dict[str, Any]) -> dict[str, Any]:
    """The row of a model that plain `quantize` makes of a configuration."""
    with evaluate.Meter() as meter:
      quantized = self._model.quantize(entry["config"], self._calibration)
    figures = {"calibrate_seconds": meter.seconds, "peak_mib": meter.peak_mib}
    return {**{key: value for key, value in entry.items() if key != "config"}, **figures, **self._measure(quantized)}

  def _measure(self, quantized: Any) -> dict[str, Any]:
    quantized.fold()
    return evaluate.figures(evaluate.score(quantized, self._evaluation, self._reference), self._base)


def agreement(found: dict[str, dict[str, Any]], budgets: Sequence[float] = ()) -> list[str]:
  """Whether the backends chose alike, in words: in the search, and under other budgets that their scores can meet."""
  if len(found) < 2:
    return []
  said = []
  searched = found["torch"]["constraints"]["effective_bits"]
  for budget in sorted({searched, *budgets}):
    try:
      one, other = (states.with_constraints(found[backend], {"effective_bits": budget}) for backend in setup.BACKENDS)
    except ValueError:
      continue
    said.append(f"{budget:g} bits: {_agreement(one, other)}")
  return said


def _agreement(one: dict[str, Any], other: dict[str, Any]) -> str:
  differing = [group for group in one["assignment"] if one["assignment"][group] != other["assignment"][group]]
  if not differing:
    return f"both backends chose the same format for all {len(one['assignment'])} groups"
  lost = controls.objective(one["scores"], other["assignment"]) / one["objective"] - 1
  where = f"in {len(differing)} of {len(one['assignment'])} groups"
  return f"the backends chose differently {where}; by torch's scores JAX's choice is {lost:+.2e} of the objective"


def write(options: Options, rows: list[dict[str, Any]], found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
  """auto_quantize.csv, .md and .json, scores-BACKEND.csv, and the figures."""
  folder = Path(options.out)
  manifest.write_csv(folder / "auto_quantize.csv", [{**row, "commit": facts["commit"]} for row in rows])
  manifest.write_json(
    folder / "auto_quantize.json", {**facts, "rows": rows, "search_states": found, "agreement": agreement(found, budgets_of(options))}
  )
  manifest.write_text(folder / "auto_quantize.md", report.markdown(rows, COLUMNS) + f"\nRepeat with `{facts['command']}`.\n")
  for backend, state in found.items():
    search_report.write_csv(state, folder / f"scores-{backend}.csv")
    auto_quantize_figure.draw(folder, backend, state, [row for row in rows if row["backend"] == backend])


def main(options: Options) -> int:
  rows, found = run(options)
  for state in found.values():
    search_report.print_auto_quantize_summary(state)
  notes = [
    *agreement(found, budgets_of(options)),
    f"{options.eval_samples} x {options.eval_tokens} evaluation tokens; +- is the paired standard error",
  ]
  if options.out:
    notes.append(f"written to {options.out}")
  report.show(rows, COLUMNS, f"Mixed precision of {options.model} ({options.method} scores)", notes)
  print(f"repeat: {cli.command('experiments.auto_quantize', options)}")
  return 0


if __name__ == "__main__":
  cli.main(Options, main)
