"""Post-training quantization of a model in either backend or in both: one row per backend, configuration and seed.

  python -m experiments.ptq --model=smollm2 --backend=both --configs=INT8_DEFAULT_CFG,NVFP4_DEFAULT_CFG --out=results/ptq

Writes ptq.csv, ptq.md and ptq.json (rows and everything needed to repeat them). Perplexity, KL and agreement are measured on the same token
windows in both backends; an encoder has none, it gets the cosine between the float model's embeddings and the quantized one's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import core
from experiments import calibration_runs, cli, evaluate, manifest, report, setup
from experiments.cli import flag
from experiments.report import Column


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, minilm, or a Hugging Face folder (Llama or BERT architecture)")
  backend: str = flag("both", "where to run", ("torch", "jax", "both"))
  configs: tuple[str, ...] = flag(
    ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"), "comma-separated preset names and paths of YAML or JSON files"
  )
  algorithm: tuple[str, ...] = flag(
    (),
    "comma-separated calibration algorithms (gptq:act_order=true) or recipes (experiments/recipes.py) in place of the configs' own",
  )
  layerwise: bool = flag(False, "calibrate block by block, each on what the quantized blocks before it return")
  checkpoint_dir: str = flag("", "folder where an interrupted calibration goes on; one configuration at a time")
  calib_samples: int = flag(8, "number of calibration windows")
  calib_tokens: int = flag(128, "tokens in each calibration window")
  eval_samples: int = flag(8, "number of evaluation windows")
  eval_tokens: int = flag(128, "tokens in each evaluation window")
  batch_samples: int = flag(4, "windows that run at once")
  text: str = flag("python-docs", "text source", ("python-docs",))
  text_file: str = flag("", "a UTF-8 file in place of --text")
  seeds: tuple[int, ...] = flag((0,), "comma-separated seeds; each draws other calibration windows, the evaluation windows stay")
  share_scales: bool = flag(True, "siblings (q/k/v, gate/up) share tensor-level FP8 and NVFP4 scales, as serving engines do")
  jit: bool = flag(False, "compile the JAX model for each configuration: worth it from some 10,000 evaluation tokens")
  out: str = flag("results/ptq", "folder for ptq.csv, ptq.md and ptq.json; empty writes nothing")


COLUMNS = (
  Column("config", "config"),
  Column("algorithm", "algorithm"),
  Column("backend", "backend"),
  Column("seed", "seed"),
  Column("perplexity", "perplexity", ".3f"),
  Column("delta_nll", "added NLL", "+.5f"),
  Column("delta_nll_se", "+-", ".5f"),
  Column("kl", "KL", ".5f"),
  Column("top1", "top-1", ".1%"),
  Column("cosine", "cosine", ".5f"),
  Column("cosine_min", "least", ".5f"),
  Column("weight_sqnr_db", "weight SQNR dB", ".2f"),
  Column("effective_bits", "bits", ".3f"),
  Column("calibrate_seconds", "calib s", ".1f"),
  Column("evaluate_seconds", "eval s", ".1f"),
  Column("peak_mib", "peak MiB", ".0f"),
)


def run(options: Options) -> list[dict[str, Any]]:
  """Quantize and measure.

  Args:
    options: flags.

  Returns:
    One row per backend, configuration and seed, the float model first; the figures of `COLUMNS` and their standard errors.

  Raises:
    ValueError: an unknown configuration, or a text that is too short.
  """
  configs = calibration_runs.with_algorithms(
    setup.read_configs(options.configs), options.algorithm, options.layerwise, options.checkpoint_dir
  )
  if not options.seeds:
    raise ValueError("--seeds is empty; name one or more whole numbers")
  text = setup.open_text(options.model, options.text, options.text_file)
  calibration = {seed: text.cut("calibration", options.calib_samples, options.calib_tokens, seed) for seed in options.seeds}
  evaluation = text.cut("evaluation", options.eval_samples, options.eval_tokens)
  rows, layers = [], []
  wanted = setup.backends(options.backend)
  with report.progress(len(wanted) * (1 + len(configs) * len(options.seeds)), "loading") as progress:
    for backend in wanted:
      rows += _backend_rows(options, backend, configs, calibration, evaluation, progress, layers)
  order = ["float", *(c.name for c in configs)]
  rows.sort(key=lambda row: order.index(calibration_runs.name_of(row)))
  if options.out:
    facts = {
      "options": dataclasses.asdict(options),
      "text": {"source": text.source, "sha256": text.sha256},
      "calibration": {str(seed): setup.describe_windows(windows) for seed, windows in calibration.items()},
      "evaluation": setup.describe_windows(evaluation),
      "configs": {c.name: c.full for c in configs},
    }
    if layers:
      manifest.write_csv(Path(options.out) / "ptq_layers.csv", layers)
    write(Path(options.out), rows, manifest.manifest(cli.command("experiments.ptq", options), **facts), spread(rows))
  return rows


def _backend_rows(
  options: Options,
  backend: str,
  configs: list[setup.Config],
  calibration: dict[int, np.ndarray],
  evaluation: np.ndarray,
  progress: report.Progress,
  layers: list[dict[str, Any]],
) -> list[dict[str, Any]]:
  language = setup.is_language_model(options.model)
  measure = evaluate.score if language else evaluate.embed
  batches = setup.in_batches(evaluation, options.batch_samples)
  with evaluate.Meter() as meter:
    progress.step(f"{backend}: float")
    model = setup.load(backend, options.model, jit=options.jit)
  rows = []
  with evaluate.Reference() as reference:
    with evaluate.Meter() as meter:
      base = measure(model, batches, keep=reference)
    float_figures = evaluate.figures(base, None) if language else {}
    rows.append(_row(options, backend, "float", None, float_figures, meter, None, {}))
    for config in configs:
      for seed, windows in calibration.items():
        progress.step(f"{backend}: {config.name}")
        with evaluate.Meter() as calibrating:
          rules = None if options.share_scales else ()
          found: list[dict[str, Any]] = []
          quantized = model.quantize(config.value, setup.in_batches(windows, options.batch_samples), rules, found)
        layers += [{"backend": backend, "config": config.name, "seed": seed, **row} for row in found]
        weights = weight_figures(quantized)
        quantized.fold()
        with evaluate.Meter() as meter:
          scores = measure(quantized, batches, reference)
        rows.append(_row(options, backend, config.name, seed, evaluate.figures(scores, base), meter, calibrating, weights))
        del quantized
  return rows


def _row(
  options: Options,
  backend: str,
  config: str,
  seed: int | None,
  figures: dict[str, Any],
  evaluating: evaluate.Meter,
  calibrating: evaluate.Meter | None,
  weights: dict[str, Any],
) -> dict[str, Any]:
  peaks = [m.peak_mib for m in (evaluating, calibrating) if m is not None and m.peak_mib is not None]
  return {
    "model": options.model,
    "backend": backend,
    "config": config.partition(calibration_runs.BETWEEN)[0],
    "algorithm": config.partition(calibration_runs.BETWEEN)[2] or None,
    "seed": seed,
    **figures,
    **weights,
    "calibrate_seconds": None if calibrating is None else calibrating.seconds,
    "evaluate_seconds": evaluating.seconds,
    "peak_mib": max(peaks) if peaks else None,
  }


def weight_figures(quantized: Any) -> dict[str, Any]:
  """SQNR over all quantized weights together, and their bits per element with scales; None without quantized weights.

  Of a sequence of formats on one weight the one with the fewest bits is what is stored.
  """
  signal = noise = bits = 0.0
  numel = 0
  for weight in quantized.weights():
    before, after = (np.asarray(w, np.float64) for w in (weight.before, weight.after))
    signal += float(np.sum(before**2))
    noise += float(np.sum((before - after) ** 2))
    bits += before.size * min(core.effective_bits(leaf.spec, before.shape) for leaf in weight.leaves)
    numel += before.size
  if not numel:
    return {"weight_sqnr_db": None, "effective_bits": None, "quantized_weights": 0}
  # Without noise the weights lie on their grid already (GPTQ and its like), and there is nothing left to compare them with.
  sqnr = 10 * np.log10(signal / noise) if noise > 0 and signal > 0 else None
  return {"weight_sqnr_db": None if sqnr is None else float(sqnr), "effective_bits": bits / numel, "quantized_weights": numel}


def spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Mean over seeds with a 95 % interval, for every backend, configuration and algorithm that ran with more than one seed."""
  return evaluate.over_seeds([{**row, "config": calibration_runs.name_of(row)} for row in rows], ("backend", "config"))


def write(folder: Path, rows: list[dict[str, Any]], facts: dict[str, Any], seeds: list[dict[str, Any]]) -> None:
  """ptq.csv (long form, one line a row, with commit and hashes), ptq.md and ptq.json."""
  same = {"commit": facts["commit"], "text_sha256": facts["text"]["sha256"], "evaluation_sha256": facts["evaluation"]["sha256"]}
  manifest.write_csv(folder / "ptq.csv", [{**row, **same} for row in rows])
  manifest.write_json(folder / "ptq.json", {**facts, "rows": rows, "over_seeds": seeds})
  manifest.write_text(folder / "ptq.md", report.markdown(rows, COLUMNS))


def show(options: Options, rows: list[dict[str, Any]]) -> None:
  """Print the table, and the recipe under it."""
  samples = (
    f"{options.calib_samples} x {options.calib_tokens} calibration tokens, {options.eval_samples} x {options.eval_tokens} evaluation tokens"
  )
  notes = [f"{samples} of {options.text_file or options.text}; +- is the paired standard error"]
  if len(options.seeds) > 1:
    for entry in spread(rows):
      key = "perplexity" if "perplexity" in entry else "cosine"
      notes.append(
        f"{entry['config']} {entry['backend']}: {key} {entry[key]:.4f} +- {entry[f'{key}_ci95']:.4f} (95 %, {entry['seeds']} seeds)"
      )
  if options.out:
    notes.append(f"written to {options.out}/ptq.csv, ptq.md, ptq.json")
  report.show(rows, COLUMNS, f"PTQ of {options.model}", notes)


def main(options: Options) -> int:
  show(options, run(options))
  return 0


if __name__ == "__main__":
  cli.main(Options, main)
