"""Calibration algorithms side by side: quality against seconds, in either backend.

  python -m experiments.algorithm_study --model=smollm2 --formats=int4_g64,nvfp4 --algorithms=max,awq_lite,gptq,gptq_best

Writes algorithm_study.csv, .md, .json, layers.csv and algorithm_study.png: perplexity and KL of every format and algorithm over the CPU
and wall seconds of its calibration. --write_table=docs/algorithms.md also puts the table into that file, between two marks. Formats and
recipes are data in `experiments/recipes.py`; algorithms may also be written with options, such as gptq:act_order=true or svdquant+gptq.
An encoder has no perplexity: it gets the cosine of its embeddings to the float model's.
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import algorithm_figure, cli, evaluate, manifest, recipes, report, setup
from experiments.cli import flag
from experiments.report import Column

TEXTS = ("first", "second")
MEASURES = (*evaluate.MEASURES, "delta_nll_second", "kl_second")
BY = ("backend", "format", "algorithm")


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, minilm, or a Hugging Face folder (Llama or BERT architecture)")
  backend: str = flag("torch", "where to run", ("torch", "jax", "both"))
  formats: tuple[str, ...] = flag(("int4_g64", "nvfp4"), "formats of experiments/recipes.py, or preset names")
  algorithms: tuple[str, ...] = flag(("max", "mse", "awq_lite", "gptq"), "methods, methods with options, or recipes")
  calib_samples: int = flag(16, "number of calibration windows")
  calib_tokens: int = flag(256, "tokens in each calibration window")
  eval_samples: int = flag(8, "number of evaluation windows of each text")
  eval_tokens: int = flag(256, "tokens in each evaluation window")
  batch_samples: int = flag(4, "windows that run at once")
  text_file: str = flag("", "a UTF-8 file in place of Python's documentation, for calibration and evaluation")
  second_text: str = flag("python-docstrings", "second evaluation text", ("python-docs", "python-docstrings", "none"))
  second_text_file: str = flag("", "a UTF-8 file in place of --second_text")
  seeds: tuple[int, ...] = flag((0,), "each draws other calibration windows")
  share_scales: bool = flag(True, "siblings (q/k/v, gate/up) share tensor-level scales")
  out: str = flag("results/algorithm_study", "folder of the results; empty writes nothing")
  write_table: str = flag("", "Markdown file that gets the table between two marks, appended where they are missing; empty writes none")


COLUMNS = (
  Column("format", "format"),
  Column("algorithm", "algorithm"),
  Column("backend", "backend"),
  Column("seed", "seed"),
  Column("perplexity", "perplexity", ".3f"),
  Column("delta_nll", "added NLL", "+.5f"),
  Column("delta_nll_se", "+-", ".5f"),
  Column("kl", "KL", ".5f"),
  Column("top1", "top-1", ".1%"),
  Column("delta_nll_second", "added NLL, second text", "+.5f"),
  Column("kl_second", "KL, second text", ".5f"),
  Column("cosine", "cosine", ".5f"),
  Column("cosine_min", "least", ".5f"),
  Column("cpu_seconds", "calib CPU s", ".1f"),
  Column("calibrate_seconds", "calib s", ".1f"),
  Column("peak_mib", "peak MiB", ".0f"),
)


def cpu_seconds() -> float:
  """CPU seconds of this process so far, all threads."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def run(options: Options) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """(one row per backend, format, algorithm and seed, the float model first; one row per layer of each).

  Raises:
    ValueError: an unknown format or algorithm, an empty flag, or a text that is too short.
    FileNotFoundError: no such file for the table.
  """
  for name in ("formats", "algorithms", "seeds"):
    if not getattr(options, name):
      raise ValueError(f"--{name} is empty; name one or more, separated by commas")
  if options.write_table and not Path(options.write_table).is_file():
    raise FileNotFoundError(f"--write_table={options.write_table}: no such file; make it first, the table goes into it")
  algorithms = recipes.algorithms(options.algorithms)
  configs = [(f, name, recipes.config(f, algorithm)) for f in options.formats for name, algorithm in algorithms.items()]
  texts = [setup.open_text(options.model, "python-docs", options.text_file)]
  if options.second_text_file or options.second_text != "none":
    texts.append(setup.open_text(options.model, options.second_text, options.second_text_file))
  windows = [setup.in_batches(t.cut("evaluation", options.eval_samples, options.eval_tokens), options.batch_samples) for t in texts]
  calibration = {seed: texts[0].cut("calibration", options.calib_samples, options.calib_tokens, seed) for seed in options.seeds}
  wanted = setup.backends(options.backend)
  rows: list[dict[str, Any]] = []
  layers: list[dict[str, Any]] = []
  with report.progress(len(wanted) * (1 + len(configs) * len(options.seeds)), "loading") as progress:
    for backend in wanted:
      progress.step(f"{backend}: float")
      study = _Study(options, backend, windows)
      rows.append({"model": options.model, "backend": backend, "format": "float", **study.float_figures()})
      for format_name, name, config in configs:
        for seed, ids in calibration.items():
          progress.step(f"{backend}: {format_name} {name}")
          found, own = study.row(config, ids)
          rows.append({"model": options.model, "backend": backend, "format": format_name, "algorithm": name, "seed": seed, **found})
          layers += [{"backend": backend, "format": format_name, "algorithm": name, "seed": seed, **one} for one in own]
  if options.out:
    facts = {
      "options": dataclasses.asdict(options),
      "texts": [{"source": t.source, "sha256": t.sha256} for t in texts],
      "calibration": {str(seed): setup.describe_windows(ids) for seed, ids in calibration.items()},
      "algorithms": algorithms,
    }
    write(Path(options.out), rows, layers, manifest.manifest(cli.command("experiments.algorithm_study", options), **facts))
  if options.write_table:
    write_table(Path(options.write_table), options, rows)
  return rows, layers


class _Study:
  """One backend's float model and its scores."""

  def __init__(self, options: Options, backend: str, windows: Sequence[list[np.ndarray]]) -> None:
    self._options, self._windows = options, windows
    self._measure = evaluate.score if setup.is_language_model(options.model) else evaluate.embed
    self._model = setup.load(backend, options.model)
    self._references = [evaluate.Reference() for _ in windows]
    self._base = [self._measure(self._model, w, keep=r) for w, r in zip(windows, self._references, strict=True)]

  def float_figures(self) -> dict[str, Any]:
    return evaluate.figures(self._base[0], None) if "nll" in self._base[0] else {}

  def row(self, config: dict[str, Any], ids: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, what calibration says of each layer) of one configuration."""
    layers: list[dict[str, Any]] = []
    rules = None if self._options.share_scales else ()
    before = cpu_seconds()
    with evaluate.Meter() as meter:
      quantized = self._model.quantize(config, setup.in_batches(ids, self._options.batch_samples), rules, layers)
    found: dict[str, Any] = {"cpu_seconds": cpu_seconds() - before, "calibrate_seconds": meter.seconds, "peak_mib": meter.peak_mib}
    quantized.fold()
    for text, windows, reference, base in zip(TEXTS, self._windows, self._references, self._base, strict=False):
      figures = evaluate.figures(self._measure(quantized, windows, reference), base)
      found |= {key if text == "first" else f"{key}_second": value for key, value in figures.items()}
    return found, layers


def write(folder: Path, rows: list[dict[str, Any]], layers: list[dict[str, Any]], facts: dict[str, Any]) -> None:
  """algorithm_study.csv, .md, .json and .png, and layers.csv."""
  manifest.write_csv(folder / "algorithm_study.csv", [{**row, "commit": facts["commit"]} for row in rows])
  if layers:
    manifest.write_csv(folder / "layers.csv", layers)
  manifest.write_json(folder / "algorithm_study.json", {**facts, "rows": rows, "over_seeds": evaluate.over_seeds(rows, BY, MEASURES)})
  manifest.write_text(folder / "algorithm_study.md", report.markdown(rows, COLUMNS) + f"\nRepeat with `{facts['command']}`.\n")
  algorithm_figure.draw(folder / "algorithm_study.png", rows)


def write_table(path: Path, options: Options, rows: list[dict[str, Any]]) -> None:
  """Put the table, its notes and its command between the two marks of this model in a Markdown file; what else is in the file stays.

  Raises:
    FileNotFoundError: no such file.
    ValueError: one of the two marks without the other, or out of order.
  """
  begin, end = (f"<!-- {word} algorithm_study {Path(options.model).name} -->" for word in ("begin", "end"))
  text = path.read_text(encoding="utf-8")
  body = f"{report.markdown(rows, COLUMNS)}\n{'. '.join(notes(options, rows))}. `{cli.command('experiments.algorithm_study', options)}`"
  section = f"{begin}\n\n{body}\n\n{end}"
  if begin not in text and end not in text:
    manifest.write_text(path, f"{text.rstrip()}\n\n{section}\n")
    return
  before, found, rest = text.partition(begin)
  _, closed, after = rest.partition(end)
  if not found or not closed:
    raise ValueError(
      f"{path} needs {begin!r} and after it {end!r}, and has one of them alone or the other way round; write both, or neither"
    )
  manifest.write_text(path, before + section + after)


def notes(options: Options, rows: list[dict[str, Any]]) -> list[str]:
  """What a table needs beside it: how many tokens, and over several seeds the mean with its interval."""
  found = [
    f"{options.calib_samples} x {options.calib_tokens} calibration and {options.eval_samples} x {options.eval_tokens} evaluation tokens; "
    "+- is the paired standard error"
  ]
  for entry in evaluate.over_seeds(rows, BY, MEASURES):
    figures = [f"{key} {entry[key]:.4f} +- {entry[f'{key}_ci95']:.4f}" for key in ("perplexity", "kl", "cosine") if key in entry]
    found.append(f"{entry['format']} {entry['algorithm']} {entry['backend']}: {', '.join(figures)} (95 %, {entry['seeds']} seeds)")
  return found


def main(options: Options) -> int:
  rows, _ = run(options)
  beside = notes(options, rows)
  if options.out:
    beside.append(f"written to {options.out}/algorithm_study.csv, .md, .json, .png, layers.csv")
  report.show(rows, COLUMNS, f"Calibration of {options.model}", beside)
  print(f"repeat: {cli.command('experiments.algorithm_study', options)}")
  return 0


if __name__ == "__main__":
  cli.main(Options, main)
