"""Perplexity beside NVIDIA ModelOpt, same checkpoint, same calibration and evaluation tokens, sibling sharing off.

  python -m benchmarks.against_modelopt --out=results/against_modelopt

Weight-only presets must agree within 0.2 % of perplexity. Presets that quantize activations need only agree within twice the standard
error of the paired difference: one flipped activation code moves everything behind it, and merely another order of summation moves the
perplexity of static INT8 by percents. Exit status 1 where a limit is missed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torch_backend
from core.metrics import mean_and_error
from experiments import cli, evaluate, manifest, report, setup
from experiments.cli import flag
from experiments.on_torch import Model, Quantized
from experiments.report import Column

WEIGHT_ONLY = ("INT8_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
RELATIVE_LIMIT = 0.002
ERRORS_LIMIT = 2.0


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, or a Hugging Face folder of Llama architecture")
  configs: tuple[str, ...] = flag((*WEIGHT_ONLY, "INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"), "presets that both know")
  calib_samples: int = flag(8, "number of calibration windows")
  calib_tokens: int = flag(128, "tokens in each calibration window")
  eval_samples: int = flag(16, "number of evaluation windows")
  eval_tokens: int = flag(128, "tokens in each evaluation window")
  batch_samples: int = flag(4, "windows that run at once")
  text_file: str = flag("", "a UTF-8 file in place of Python's documentation")
  seed: int = flag(0, "of the calibration windows")
  out: str = flag("results/against_modelopt", "folder for against_modelopt.json and .md; empty writes nothing")


COLUMNS = (
  Column("config", "config"),
  Column("verdict", "verdict"),
  Column("ours", "twinquant perplexity", ".4f"),
  Column("modelopt", "ModelOpt perplexity", ".4f"),
  Column("relative", "difference", "+.4%"),
  Column("delta_nll", "NLL difference", "+.6f"),
  Column("delta_nll_se", "paired +-", ".6f"),
  Column("errors", "in errors", ".2f"),
  Column("limit", "limit"),
)


def modelopt_quantize(model: torch.nn.Module, config: str, batches: list[np.ndarray]) -> torch.nn.Module:
  """A copy of the model, quantized by ModelOpt.

  Raises:
    ImportError: ModelOpt is not installed.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq

    def loop(peer: torch.nn.Module) -> None:
      for ids in batches:
        peer(torch.from_numpy(ids).long())

    with torch.no_grad():
      return mtq.quantize(copy.deepcopy(model), getattr(mtq, config), loop)


def compare(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """(rows, facts for the manifest).

  Args:
    options: flags.

  Raises:
    ImportError: ModelOpt is not installed.
    ValueError: a preset that is unknown, or a text that is too short.
  """
  text = setup.open_text(options.model, "python-docs", options.text_file)
  calibration = text.cut("calibration", options.calib_samples, options.calib_tokens, options.seed)
  evaluation = text.cut("evaluation", options.eval_samples, options.eval_tokens)
  batches, windows = (setup.in_batches(w, options.batch_samples) for w in (calibration, evaluation))
  model = Model.load(options.model)
  base = evaluate.score(model, windows)["nll"]
  rows: list[dict[str, Any]] = [{"config": "float", "ours": math.exp(float(base.mean())), "modelopt": math.exp(float(base.mean()))}]
  for config in setup.read_configs(options.configs):
    ours = model.quantize(config.value, batches, group_rules=())
    torch_backend.fold_weight(ours.model)
    own = evaluate.score(ours, windows)["nll"]
    del ours
    theirs = evaluate.score(Quantized(modelopt_quantize(model.model, config.name, batches)), windows)["nll"]
    rows.append(judge(config.name, own, theirs))
  facts = {
    "options": dataclasses.asdict(options),
    "text": {"source": text.source, "sha256": text.sha256},
    "calibration": setup.describe_windows(calibration),
    "evaluation": setup.describe_windows(evaluation),
  }
  return rows, facts


def judge(config: str, own: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
  """One row, from the negative log-likelihoods of every token."""
  mean, error = mean_and_error(own - theirs)
  relative = math.expm1(mean)
  weight_only = config in WEIGHT_ONLY
  passed = abs(relative) <= RELATIVE_LIMIT if weight_only else abs(mean) <= ERRORS_LIMIT * error
  return {
    "config": config,
    "verdict": "agrees" if passed else "MISSED",
    "ours": math.exp(float(own.mean())),
    "modelopt": math.exp(float(theirs.mean())),
    "relative": relative,
    "delta_nll": mean,
    "delta_nll_se": error,
    "errors": abs(mean) / error if error else 0.0,
    "limit": f"{RELATIVE_LIMIT:.1%}" if weight_only else f"{ERRORS_LIMIT:g} errors",
    "passed": passed,
  }


def main(options: Options) -> int:
  try:
    rows, facts = compare(options)
  except ImportError as error:
    print(f"error: {error}; pip install nvidia-modelopt==0.47.0", file=sys.stderr)
    return 2
  tokens = options.eval_samples * (options.eval_tokens - 1)
  report.show(rows, COLUMNS, f"{options.model} beside ModelOpt, {tokens} predicted tokens, no scale shared between siblings")
  if options.out:
    folder = Path(options.out)
    command = cli.command("benchmarks.against_modelopt", options)
    manifest.write_json(folder / "against_modelopt.json", {**manifest.manifest(command, **facts), "rows": rows})
    manifest.write_text(folder / "against_modelopt.md", report.markdown(rows, COLUMNS))
  return 0 if all(row.get("passed", True) for row in rows) else 1


if __name__ == "__main__":
  cli.main(Options, main)
