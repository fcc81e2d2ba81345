"""A quantized model as ONNX, run in onnxruntime beside the simulation: largest difference, and the activation codes that fell otherwise.

  python -m experiments.export_onnx --model=minilm --backend=both --configs=INT8_DEFAULT_CFG,FP8_DEFAULT_CFG,INT4_BLOCKWISE_WEIGHT_ONLY_CFG

The same arithmetic ends within 2e-6 (relative to the largest output) unless an activation lies so close to the middle between two codes
that another order of summation turns it; the table counts such codes. Writes <backend>-<config>.onnx and export_onnx.json. Exit status 1
where outputs lie further apart although no code differs.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from core import encoding
from core.export import onnx_run
from core.export.onnx_piece import FORMS, FP4
from experiments import cli, manifest, report, setup
from experiments.cli import flag
from experiments.report import Column

TOLERANCE = 2e-6  # a few float32 roundings of the largest output; equal arithmetic in another order of summation stays below


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("minilm", "smollm2, minilm, or a Hugging Face folder (Llama or BERT architecture)")
  backend: str = flag("both", "where the model is quantized and exported from", ("torch", "jax", "both"))
  configs: tuple[str, ...] = flag(("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"), "comma-separated preset names and paths of YAML or JSON files")
  form: str = flag("standard", "QuantizeLinear as it is, or with the reciprocal applied before it", FORMS)
  fp4: str = flag("portable", "E2M1 by arithmetic, or as FLOAT4E2M1 (needs --runtime=reference)", FP4)
  opset: int = flag(0, "21 to 25; 0 takes the lowest that has all types")
  runtime: str = flag("onnxruntime", "what runs the file", onnx_run.RUNTIMES)
  optimize: bool = flag(False, "let onnxruntime rewrite the graph")
  samples: int = flag(2, "number of evaluation windows")
  tokens: int = flag(64, "tokens in each window")
  calib_samples: int = flag(4, "number of calibration windows")
  text_file: str = flag("", "a UTF-8 file in place of Python's documentation")
  seed: int = flag(0, "of the calibration windows")
  out: str = flag("results/export_onnx", "folder of the results")


COLUMNS = (
  Column("backend", "backend"),
  Column("config", "config"),
  Column("megabytes", "MB", ".1f"),
  Column("max_difference", "max difference", ".2g"),
  Column("relative_difference", "relative", ".2g"),
  Column("codes_compared", "activation codes", ",d"),
  Column("codes_differing", "differ", ",d"),
  Column("first_differing", "first in"),
  Column("same_input_compared", "on the runtime's inputs", ",d"),
  Column("same_input_differing", "differ", ",d"),
  Column("export_seconds", "export s", ".1f"),
  Column("run_seconds", "run s", ".1f"),
)


def run(options: Options) -> list[dict[str, Any]]:
  """One row per backend and configuration.

  Raises:
    ValueError: an unknown configuration, an option that is not allowed, or a quantizer that ONNX cannot express.
    ImportError: a package of the `onnx` extra is missing.
  """
  configs = setup.read_configs(options.configs)
  text = setup.open_text(options.model, "python-docs", options.text_file)
  calibration = text.cut("calibration", options.calib_samples, options.tokens, options.seed)
  windows = text.cut("evaluation", options.samples, options.tokens)
  folder = Path(options.out)
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  backends = setup.backends(options.backend)
  with report.progress(len(backends) * len(configs), "exporting") as progress:
    for backend in backends:
      model = setup.load(backend, options.model)
      for config in configs:
        progress.step(f"{backend} {config.name}")
        quantized = model.quantize(config.value, [calibration])
        found = check(options, backend, quantized, windows, folder / f"{backend}-{config.name}.onnx")
        rows.append({"backend": backend, "config": config.name, **found})
  facts = {"text": {"source": text.source, "sha256": text.sha256}, "configs": {c.name: c.full for c in configs}}
  about = manifest.manifest(cli.command("experiments.export_onnx", options), options=dataclasses.asdict(options), **facts)
  manifest.write_json(folder / "export_onnx.json", {**about, "rows": rows})
  return rows


def check(options: Options, backend: str, quantized: Any, ids: np.ndarray, path: Path) -> dict[str, Any]:
  """Export one quantized model, run it, and compare.

  Args:
    options: flags.
    backend: "torch" or "jax".
    quantized: `Quantized` of that backend's adapter.
    ids: [B, T] tokens.
    path: of the file.
  """
  started = time.perf_counter()
  _export(options, backend, quantized, ids, path)
  exported = time.perf_counter()
  inputs = ids.astype(np.int64) if backend == "torch" else ids
  found = onnx_run.run(path, [inputs], runtime=options.runtime, optimize=options.optimize)
  ran = time.perf_counter()
  expected, codes = simulated(backend, quantized, ids)
  first = next(iter(found.outputs.values()))
  difference = float(np.abs(first.astype(np.float64) - expected).max())
  compared, differing = flips(codes, found.codes)
  same_input, on_same_input = flips(_recoded(backend, quantized, found.inputs), found.codes)
  return {
    "megabytes": path.stat().st_size / 1e6,
    "max_difference": difference,
    "relative_difference": difference / max(float(np.abs(expected).max()), 1e-30),
    "codes_compared": compared,
    "codes_differing": sum(differing.values()),
    "first_differing": next(iter(differing), None),
    "flips": differing,
    "same_input_compared": same_input,
    "same_input_differing": sum(on_same_input.values()),
    "export_seconds": exported - started,
    "run_seconds": ran - exported,
  }


def _export(options: Options, backend: str, quantized: Any, ids: np.ndarray, path: Path) -> None:
  common: dict[str, Any] = {"opset": options.opset or None, "form": options.form, "fp4": options.fp4, "input_names": ["input_ids"]}
  if backend == "torch":
    import torch

    import torch_backend

    language = setup.is_language_model(options.model)
    kwargs = {"use_cache": False} if language else {}
    torch_backend.export_onnx(quantized.model, (torch.from_numpy(ids).long(),), path, kwargs=kwargs, **common)
  else:
    import jax_backend

    jax_backend.export_onnx(quantized.module, quantized.variables, (ids,), path, **common)


def _adapter(backend: str) -> Any:
  if backend == "torch":
    from experiments import on_torch as adapter
  else:
    from experiments import on_jax as adapter
  return adapter


def _recoded(backend: str, quantized: Any, inputs: dict[tuple[str, int], np.ndarray]) -> dict[tuple[str, int], np.ndarray]:
  """Levels of the codes that `core` gives the values that the runtime quantized: no order of summation stands in between."""
  adapter, leaves = _adapter(backend), quantized.leaves()
  return {
    key: np.asarray(encoding.decode(np.asarray(adapter.encode(x, leaves[key[0]]).codes), leaves[key[0]][-1].spec.element))
    for key, x in inputs.items()
    if key[0] in leaves
  }


def simulated(backend: str, quantized: Any, ids: np.ndarray) -> tuple[np.ndarray, dict[tuple[str, int], np.ndarray]]:
  """(the simulation's output, levels of its activation codes by quantizer and call)."""
  adapter, leaves = _adapter(backend), quantized.leaves()
  calls: Counter[str] = Counter()
  found: dict[tuple[str, int], np.ndarray] = {}

  def see(name: str, quantizer: Any, x: Any, y: Any) -> None:
    if x.size if backend == "jax" else x.numel():
      codes = adapter.encode(adapter.prepare(quantizer, x), leaves[name])
      found[name, calls[name]] = np.asarray(encoding.decode(np.asarray(codes.codes), leaves[name][-1].spec.element))
      calls[name] += 1

  output = quantized.run(ids, see, lambda *_: None)
  return np.asarray(output, np.float64), found


def flips(expected: dict[tuple[str, int], np.ndarray], found: dict[tuple[str, int], np.ndarray]) -> tuple[int, dict[str, int]]:
  """(codes compared, quantizer -> codes that differ, in the model's order, without those that agree)."""
  compared, differing = 0, {}
  for key, levels in expected.items():
    if key in found and found[key].size == levels.size:  # last blocks that are not full are shown with their padding
      compared += levels.size
      count = int((levels.ravel() != found[key].ravel()).sum())
      if count:
        differing[key[0]] = differing.get(key[0], 0) + count
  return compared, differing


def failures(rows: list[dict[str, Any]]) -> list[str]:
  """Rows whose outputs lie apart although no code explains it."""
  return [
    f"{row['backend']} {row['config']}: {row['relative_difference']:.2g} apart, no activation code differs"
    for row in rows
    if row["relative_difference"] > TOLERANCE and not row["codes_differing"]
  ]


def main(options: Options) -> int:
  rows = run(options)
  failed = failures(rows)
  report.show(rows, COLUMNS, f"{options.model} as ONNX, {options.runtime}", [*failed, f"written to {options.out}"])
  print(f"repeat: {cli.command('experiments.export_onnx', options)}")
  return 1 if failed else 0


if __name__ == "__main__":
  cli.main(Options, main)
