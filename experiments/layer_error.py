"""What quantization does to every layer: its weight, its output alone, and its output behind all the quantized layers before it.

  python -m experiments.layer_error --model=smollm2 --config=INT4_AWQ_CFG

"alone" feeds the float model's input to the one quantized layer; "accumulated" is the layer's output in the quantized model. Errors are
relative: |y - y_q|^2 / |y|^2 over all evaluation tokens. Algorithms that move factors or rotations between layers have no such error: a
layer of theirs has another function than the float model's. Writes layer_error.csv, .json and .png (both along depth).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from core import metrics
from core.config import normalize
from experiments import algorithm_figure, calibration_runs, cli, evaluate, manifest, report, setup
from experiments.cli import flag
from experiments.report import Column


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, minilm, or a Hugging Face folder (Llama or BERT architecture)")
  backend: str = flag("torch", "where to run", ("torch", "jax"))
  config: str = flag("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "preset name, or path of a YAML or JSON file")
  algorithm: str = flag("", "calibration algorithm or recipe in place of the config's own")
  calib_samples: int = flag(8, "number of calibration windows")
  calib_tokens: int = flag(128, "tokens in each calibration window")
  eval_samples: int = flag(4, "number of evaluation windows")
  eval_tokens: int = flag(128, "tokens in each evaluation window")
  batch_samples: int = flag(4, "windows that run at once")
  text_file: str = flag("", "a UTF-8 file in place of Python's documentation")
  seed: int = flag(0, "of the calibration windows")
  share_scales: bool = flag(True, "siblings (q/k/v, gate/up) share tensor-level scales")
  out: str = flag("results/layer_error", "folder of the results; empty writes nothing")


COLUMNS = (
  Column("layer", "layer"),
  Column("weight_sqnr_db", "weight SQNR dB", ".2f"),
  Column("alone_error", "alone: error", ".2e"),
  Column("alone_sqnr_db", "SQNR dB", ".2f"),
  Column("alone_cosine", "cosine", ".6f"),
  Column("accumulated_error", "accumulated: error", ".2e"),
  Column("accumulated_sqnr_db", "SQNR dB", ".2f"),
  Column("accumulated_cosine", "cosine", ".6f"),
)


# They leave the model's function as it is and change that of its layers, so that a layer has no counterpart in the float model.
MOVERS = ("cross_layer_equalization", "fold_pre_quant_scale", "rotate")


class _Sums:
  """Running sums of y^2, z^2, y z and (y - z)^2."""

  def __init__(self) -> None:
    self.yy = self.zz = self.yz = self.dd = 0.0

  def add(self, y: Any, z: Any) -> None:
    a, b = (np.asarray(v, np.float64).ravel() for v in (y, z))
    self.yy += float(a @ a)
    self.zz += float(b @ b)
    self.yz += float(a @ b)
    self.dd += float((a - b) @ (a - b))

  def figures(self, prefix: str) -> dict[str, float | None]:
    """Relative error, SQNR and cosine; None where the float output is all zero."""
    if not self.yy:
      return {f"{prefix}_{key}": None for key in ("error", "sqnr_db", "cosine")}
    error = self.dd / self.yy
    return {
      f"{prefix}_error": error,
      f"{prefix}_sqnr_db": -10 * float(np.log10(error)) if error else None,
      f"{prefix}_cosine": self.yz / float(np.sqrt(self.yy * self.zz)) if self.zz else 0.0,
    }


def run(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """(one row per layer in the model's order, figures of the whole model).

  Raises:
    ValueError: an unknown configuration, an algorithm that is unknown or one of `MOVERS`, or a text that is too short.
  """
  config = calibration_runs.with_algorithms(setup.read_configs([options.config]), [options.algorithm] if options.algorithm else [])[0]
  _check(config)
  text = setup.open_text(options.model, "python-docs", options.text_file)
  calibration = text.cut("calibration", options.calib_samples, options.calib_tokens, options.seed)
  windows = setup.in_batches(text.cut("evaluation", options.eval_samples, options.eval_tokens), options.batch_samples)
  model = setup.load(options.backend, options.model)
  layers: list[dict[str, Any]] = []
  rules = None if options.share_scales else ()
  quantized = model.quantize(config.value, setup.in_batches(calibration, options.batch_samples), rules, layers)
  before = {w.name: np.asarray(w.before, np.float64) for w in model_weights(model, config, calibration)}
  after = {w.name: np.asarray(w.after, np.float64) for w in quantized.weights()}
  names = list(dict.fromkeys(name.rpartition(".")[0] for name in quantized.leaves()))
  sums = {name: (_Sums(), _Sums()) for name in names}
  scores: dict[str, list[Any]] = {"float": [], "quantized": []}
  with report.progress(len(windows), "layers") as progress:
    for ids in windows:
      progress.step("batch")
      base, expected = model.layer_io(ids, names)
      result, behind = quantized.layer_io(ids, names)
      for name, (alone, accumulated) in sums.items():
        if name in expected and name in behind:
          alone.add(expected[name][1], quantized.alone(name, expected[name][0]))
          accumulated.add(expected[name][1], behind[name][1])
      scores["float"].append(base)
      scores["quantized"].append(result)
  rows = []
  for name in sorted(names, key=_depth):
    weight = f"{name}.weight_quantizer"
    changed = any(row["layer"] == name and ("alpha" in row or "rank" in row) for row in layers)
    sqnr = metrics.sqnr_db(before[weight], after[weight]) if weight in after and weight in before and not changed else None
    alone, accumulated = sums[name]
    rows.append({"layer": name, "weight_sqnr_db": sqnr, **alone.figures("alone"), **accumulated.figures("accumulated")})
  whole = _whole(options, windows, scores)
  if options.out:
    facts = {"options": dataclasses.asdict(options), "text": {"source": text.source, "sha256": text.sha256}, "config": config.full}
    _write(Path(options.out), rows, {**manifest.manifest(cli.command("experiments.layer_error", options), **facts), "model_figures": whole})
  return rows, whole


def _check(config: setup.Config) -> None:
  moving = [step.method for step in normalize(config.value).algorithm if step.method in MOVERS]
  if moving:
    raise ValueError(
      f"layer_error cannot compare layers under {', '.join(map(repr, moving))}, which gives layers another function than the float model's "
      "(the model's stays); leave it out, or measure the whole model with experiments.algorithm_study"
    )


def model_weights(model: Any, config: Any, calibration: np.ndarray) -> list[Any]:
  """The float weights under the names of their quantizers: those of a max-calibrated copy."""
  plain = model.quantize({**config.value, "algorithm": "max"}, [calibration[:1]], ())
  return list(plain.weights())


def _depth(name: str) -> list[tuple[int, int, str]]:
  return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _whole(options: Options, windows: list[np.ndarray], scores: dict[str, list[Any]]) -> dict[str, Any]:
  if not setup.is_language_model(options.model):
    vectors = [np.concatenate([h.mean(axis=1, dtype=np.float64) for h in scores[key]]) for key in ("float", "quantized")]
    return {"cosine": float(np.mean([metrics.cosine(a, b) for a, b in zip(*vectors, strict=True)]))}
  parts = [evaluate.score_batch(ids, z, y) for ids, y, z in zip(windows, scores["float"], scores["quantized"], strict=True)]
  base = [evaluate.score_batch(ids, y, None)["nll"] for ids, y in zip(windows, scores["float"], strict=True)]
  merged = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  return evaluate.figures(merged, {"nll": np.concatenate(base)})


def _write(folder: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
  manifest.write_csv(folder / "layer_error.csv", rows)
  manifest.write_json(folder / "layer_error.json", {**facts, "rows": rows})
  algorithm_figure.save(folder / "layer_error.png", [lambda axes: _panel(axes, rows)], (9.6, 4.8))


def _panel(axes: Any, rows: list[dict[str, Any]]) -> None:
  kinds = list(dict.fromkeys(row["layer"].rpartition(".")[2] for row in rows))
  for colour, kind in zip(algorithm_figure.COLOURS * (1 + len(kinds) // len(algorithm_figure.COLOURS)), kinds, strict=False):
    own = [row for row in rows if row["layer"].rpartition(".")[2] == kind]
    for key, line in (("alone_error", ":"), ("accumulated_error", "-")):
      values = [row[key] if row[key] else np.nan for row in own]
      axes.plot(range(len(own)), values, line, color=colour, label=kind if line == "-" else None, linewidth=1.2)
  axes.set_yscale("log")
  axes.set_xlabel("place along the model")
  axes.set_ylabel("relative output error (dotted: layer alone)")
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.legend(fontsize=8)


def main(options: Options) -> int:
  rows, whole = run(options)
  notes = [", ".join(f"{key} {value:.5f}" for key, value in whole.items() if value is not None)]
  if options.out:
    notes.append(f"written to {options.out}/layer_error.csv, .json, .png")
  report.show(rows, COLUMNS, f"{options.config}{' / ' + options.algorithm if options.algorithm else ''} on {options.model}", notes)
  print(f"repeat: {cli.command('experiments.layer_error', options)}")
  return 0


if __name__ == "__main__":
  cli.main(Options, main)
