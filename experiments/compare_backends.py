"""Is a model quantized in PyTorch the model quantized in JAX? Quantizer by quantizer, code by code.

  python -m experiments.compare_backends --model=smollm2 --config=INT8_DEFAULT_CFG,NVFP4_DEFAULT_CFG --tokens=512 --out=results/compare
  python -m experiments.compare_backends --model=smollm2 --config=NVFP4_DEFAULT_CFG --tokens=512 --carrier=float64 --out=results/compare64

What must be equal: quantizer names and specifications; codes, scales and values of every weight; and
  float32: codes, scales, values and amax of every activation quantizer on the same input (that of the torch run);
  float64: the calibrated amax, and every activation code of the whole model with both backends running on their own: at most one code in
  10^7 may differ, and where none does the logits are equal to 1e-9.
Exit status 1 where one of these fails, 2 for a mistake in the flags. Beside it stand the distance of layer outputs and logits, and the
floor: the same distance between torch and torch with another order of summation. Writes compare.json.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, manifest, parity, report, setup
from experiments.cli import flag
from experiments.report import Column


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, minilm (float32 only), or a Hugging Face folder")
  config: tuple[str, ...] = flag(("INT8_DEFAULT_CFG",), "comma-separated preset names and paths of YAML or JSON files")
  tokens: int = flag(256, "number of tokens that both models run on")
  window_tokens: int = flag(128, "tokens in one sequence")
  calib_samples: int = flag(4, "number of calibration windows")
  calib_tokens: int = flag(128, "tokens in each calibration window")
  carrier: str = flag("float32", "type of everything outside the quantizers", ("float32", "float64"))
  floor_orders: int = flag(1, "how many other orders of summation the floor is measured with; 0 leaves it out")
  text: str = flag("python-docs", "text source", ("python-docs",))
  text_file: str = flag("", "a UTF-8 file in place of --text")
  seed: int = flag(0, "of the calibration windows and the orders of summation")
  share_scales: bool = flag(True, "siblings (q/k/v, gate/up) share tensor-level FP8 and NVFP4 scales")
  out: str = flag("results/compare", "folder for compare.json; empty writes nothing")


COLUMNS = (
  Column("config", "config"),
  Column("verdict", "verdict"),
  Column("quantizers", "quantizers"),
  Column("weight_codes_compared", "weight codes", ",d"),
  Column("weight_codes_differing", "differ", ",d"),
  Column("activation_codes_compared", "activation codes", ",d"),
  Column("activation_codes_differing", "differ", ",d"),
  Column("own_run_codes_differing", "own runs differ", ",d"),
  Column("logits_max_abs_diff", "logits max diff", ".2g"),
  Column("logits_rms_diff", "rms", ".2g"),
  Column("floor_logits_max_abs_diff", "floor max", ".2g"),
  Column("floor_logits_rms_diff", "floor rms", ".2g"),
  Column("logits_rms_over_floor", "rms/floor", ".2f"),
  Column("seconds", "s", ".0f"),
)
TOTALS = (
  "weight_codes_compared", "weight_codes_differing", "weight_scales_compared", "weight_scales_differing",
  "activation_codes_compared", "activation_codes_differing", "activation_scales_compared", "activation_scales_differing",
)  # fmt: skip


def run(options: Options) -> dict[str, Any]:
  """Compare the backends for every configuration.

  Args:
    options: flags.

  Returns:
    What compare.json holds: totals, the manifest, and per configuration the figures, the rows per quantizer and layer, and `failures`.

  Raises:
    ValueError: an unknown configuration, sizes that do not fit the text, or --carrier=float64 for a model without a torch twin.
  """
  configs = setup.read_configs(options.config)
  text = setup.open_text(options.model, options.text, options.text_file)
  windows = cut(text, options.tokens, options.window_tokens)
  calibration = text.cut("calibration", options.calib_samples, options.calib_tokens, options.seed)
  results = []
  with report.progress(len(configs) + 1, "loading") as progress, parity.precision(options.carrier):
    progress.step("loading")
    floats = {b: setup.load(b, options.model, options.carrier, twin=options.carrier == "float64") for b in setup.BACKENDS}
    for config in configs:
      progress.step(config.name)
      settings = parity.Settings(options.carrier, options.floor_orders, options.seed, None if options.share_scales else ())
      results.append(parity.compare_config(config, floats, setup.in_batches(calibration, options.calib_samples), windows, settings))
  facts = {
    "options": dataclasses.asdict(options),
    "text": {"source": text.source, "sha256": text.sha256},
    "calibration": setup.describe_windows(calibration),
    "evaluation": {"tokens": options.tokens, "sha256": manifest.digest(np.concatenate([w.ravel() for w in windows]))},
    "configs": {c.name: c.full for c in configs},
  }
  totals = {key: sum(result[key] for result in results) for key in TOTALS}
  document = {
    "passed": not any(result["failures"] for result in results),
    **totals,
    "logits_max_abs_diff": max(result["logits_max_abs_diff"] for result in results),
    **manifest.manifest(cli.command("experiments.compare_backends", options), **facts),
    "results": results,
  }
  if options.out:
    manifest.write_json(Path(options.out) / "compare.json", document)
  return document


def cut(text: setup.Windows, tokens: int, length: int) -> list[np.ndarray]:
  """That many tokens as batches of one window each; the last one takes the rest.

  Raises:
    ValueError: a size is not positive.
  """
  if tokens < 1 or length < 1:
    raise ValueError(f"--tokens={tokens} and --window_tokens={length} must be at least 1")
  whole, rest = divmod(tokens, min(length, tokens))
  length = min(length, tokens)
  windows = text.cut("evaluation", whole + (rest > 0), length)
  batches = [windows[i : i + 1] for i in range(len(windows))]
  return [*batches[:-1], batches[-1][:, :rest]] if rest else batches


def show(options: Options, document: dict[str, Any]) -> None:
  """Print the table, and what failed."""
  for result in document["results"]:
    result["verdict"] = "FAILED" if result["failures"] else "equal"
  notes = [f"{options.tokens} tokens; {options.carrier} outside the quantizers; floor: torch against torch with another order of summation"]
  if options.carrier == "float32":
    notes.append(
      "activation codes: both on the same input. own runs: each backend on what its own layers computed; not expected to be equal"
    )
  else:
    notes.append("activation codes: each backend on what its own layers computed, the whole model")
  for result in document["results"]:
    notes += [f"{result['config']}: {failure}" for failure in result["failures"]]
  if options.out:
    notes.append(f"written to {options.out}/compare.json")
  report.show(document["results"], COLUMNS, f"PyTorch against JAX, {options.model}", notes)


def main(options: Options) -> int:
  document = run(options)
  show(options, document)
  return 0 if document["passed"] else 1


if __name__ == "__main__":
  cli.main(Options, main)
