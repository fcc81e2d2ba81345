"""Quantize a model and write it as a folder that serving engines load.

  python -m experiments.export --model=smollm2 --backend=torch --config=NVFP4_DEFAULT_CFG --layout=compressed-tensors --out=out/nvfp4
  python -m experiments.export --weights_only --source=folder --config=INT4_BLOCKWISE_WEIGHT_ONLY_CFG --out=out/int4

The second form reads and writes tensor by tensor and never builds the model, so the model may be larger than memory; it takes
configurations that need no data. Prints what was written and what it took; `--report` also writes that as JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from pathlib import Path
from typing import Any

from core import export as core_export
from experiments import calibration_runs, cli, evaluate, manifest, setup
from experiments.cli import flag
from experiments.models import folders

LAYOUTS = ("compressed-tensors", "modelopt", "gguf")


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, minilm, or a Hugging Face folder (Llama or BERT architecture)")
  backend: str = flag("torch", "where to run", ("torch", "jax"))
  config: str = flag("NVFP4_DEFAULT_CFG", "preset name, or path of a YAML or JSON file")
  algorithm: str = flag("", "calibration algorithm (gptq:act_order=true) or recipe (experiments/recipes.py) in place of the config's own")
  layout: str = flag("compressed-tensors", "layout of the checkpoint", LAYOUTS)
  out: str = flag("", "folder to make")
  overwrite: bool = flag(False, "replace the folder where it exists")
  weights_only: bool = flag(False, "quantize the folder --source tensor by tensor, without building the model")
  source: str = flag("", "with --weights_only: a model's name or a Hugging Face folder of any architecture")
  dtype: str = flag("float32", "type of the model, and of the unquantized tensors", ("float32", "bfloat16", "float16"))
  max_shard_size: str = flag("5GB", "largest file")
  calib_samples: int = flag(8, "number of calibration windows")
  calib_tokens: int = flag(128, "tokens in each calibration window")
  batch_samples: int = flag(4, "windows that run at once")
  text: str = flag("python-docs", "text source", ("python-docs",))
  text_file: str = flag("", "a UTF-8 file in place of --text")
  seed: int = flag(0, "draws the calibration windows")
  share_scales: bool = flag(True, "siblings (q/k/v, gate/up) share tensor-level FP8 and NVFP4 scales, as serving engines do")
  metrics: str = flag("", "JSON file with measured numbers for the model card")
  report: str = flag("", "JSON file for what was written and what it took")


def run(options: Options) -> dict[str, Any]:
  """Quantize and write.

  Args:
    options: flags.

  Returns:
    Figures: bytes on disk, bits per quantized weight, seconds, peak memory.

  Raises:
    ValueError: no --out, an unknown configuration, or one that the layout cannot express.
    FileExistsError: --out exists and is not empty.
  """
  if not options.out:
    raise ValueError("--out is empty; name the folder to make")
  core_export.check_free(Path(options.out), options.overwrite)
  algorithm = (options.algorithm,) if options.algorithm else ()
  (config,) = calibration_runs.with_algorithms(setup.read_configs((options.config,)), algorithm, False, "")
  card: dict[str, Any] = {"title": f"{Path(_name(options)).name}, {config.name}", "recipe": _recipe(options, config)}
  if options.metrics:
    card["metrics"] = json.loads(Path(options.metrics).read_text(encoding="utf-8"))
  common: dict[str, Any] = {"layout": options.layout, "max_shard_size": options.max_shard_size, "overwrite": options.overwrite}
  start = time.perf_counter()
  with evaluate.Meter() as meter:
    if options.weights_only:
      found = {"float_bytes": _weights_only(options, config, card, common)}
    else:
      found = _whole(options, config, card, common)
  return found | figures(options.out) | {"seconds": time.perf_counter() - start, "peak_mib": meter.peak_mib}


def _name(options: Options) -> str:
  return (options.source or options.model) if options.weights_only else options.model


def _recipe(options: Options, config: setup.Config) -> dict[str, Any]:
  recipe: dict[str, Any] = {
    "config": config.name,
    "command": f"`{cli.command('experiments.export', options)}`",
    "commit": manifest.commit(),
  }
  return recipe | {name: version for name, version in manifest.versions().items() if name in ("torch", "jax", "twinquant")}


def _weights_only(options: Options, config: setup.Config, card: dict[str, Any], common: dict[str, Any]) -> int:
  if not options.source:
    raise ValueError("--weights_only needs --source, the folder of the float model")
  if options.algorithm:
    raise ValueError(f"--algorithm={options.algorithm} needs the model; leave it out, or --weights_only")
  folder = folders.find(options.source)
  rules = None if options.share_scales else ()
  core_export.export_weights(folder, options.out, config.value, group_rules=rules, card=card, dtype=options.dtype, **common)
  return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _whole(options: Options, config: setup.Config, card: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
  text = setup.open_text(options.model, options.text, options.text_file)
  windows = text.cut("calibration", options.calib_samples, options.calib_tokens, options.seed)
  model = setup.load(options.backend, options.model, options.dtype)
  float_bytes = model.nbytes()
  rules = None if options.share_scales else ()
  quantized = model.quantize(config.value, setup.in_batches(windows, options.batch_samples), rules)
  del model
  card["recipe"] |= {"calibration": f"{options.calib_samples} x {options.calib_tokens} tokens of {text.source}, sha256 {text.sha256}"}
  gc.collect()
  with evaluate.Meter() as writing:
    before = writing.peak_mib
    quantized.export(options.out, source=folders.find(options.model), card=card, **common)
  more = None if before is None or writing.peak_mib is None else writing.peak_mib - before
  ratio = None if more is None else 1 + more * 2**20 / float_bytes
  return {"float_bytes": float_bytes, "export_seconds": writing.seconds, "export_adds_mib": more, "export_peak_of_model": ratio}


def figures(folder: str | Path) -> dict[str, Any]:
  """Bytes of an exported folder: all tensors, and those of the quantized layers for each of their weights."""
  artefact = core_export.read(folder)
  quantized = artefact.layer_bytes()
  count = sum(artefact.layer_size(layer) for layer in artefact.layers)
  total = sum(path.stat().st_size for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".gguf"))
  bits = 8 * sum(quantized.values()) / count if count else None
  return {"layout": artefact.layout, "layers": len(artefact.layers), "bytes_on_disk": total, "bits_per_quantized_weight": bits}


def main(options: Options) -> int:
  found = run(options)
  for key, value in found.items():
    print(f"{key:28s} {value:.3f}" if isinstance(value, float) else f"{key:28s} {value}")
  print(f"written to {options.out}")
  if options.report:
    manifest.write_json(options.report, manifest.manifest(cli.command("experiments.export", options), **found))
  return 0


if __name__ == "__main__":
  cli.main(Options, main)
