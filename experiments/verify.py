"""Is an exported folder or ONNX file the model that was simulated? Clients load it and are compared with the quantizers that made it.

  python -m experiments.verify --artefact=out/nvfp4 --reference=out/state --model=smollm2
  python -m experiments.verify --artefact=out/nvfp4 --config=NVFP4_DEFAULT_CFG --model=smollm2 --controls
  python -m experiments.verify --artefact=out/model.onnx --config=INT8_DEFAULT_CFG --clients=numpy,onnxruntime,onnx.reference

The reference is a directory that `save` of either backend wrote, or, without --reference, the model quantized anew with --config and the
same calibration flags as `experiments.export`. `--controls` also injects known faults into copies of the artefact and prints which client
catches which. Exit status 0: all clients that ran agree, at least one ran, and each fault was caught; 1: not so; 2: a mistake in the
flags, or a damaged artefact. docs/verify.md says what each client can see.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np

from core.config import ConfigWarning
from core.verify import CLIENTS, Controls, Report
from core.verify.driver import locate
from core.verify.onnx_client import input_shape
from experiments import calibration_runs, cli, manifest, setup
from experiments.cli import flag


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  artefact: str = flag("", "exported folder, .onnx file, or a folder with one")
  reference: str = flag("", "directory of a saved state; without it the model is quantized with --config")
  model: str = flag("smollm2", "the float model: smollm2, minilm, or a Hugging Face folder (Llama or BERT architecture)")
  backend: str = flag("torch", "where the simulation runs", ("torch", "jax"))
  clients: tuple[str, ...] = flag((), f"of {', '.join(CLIENTS)}; without it all that read such an artefact")
  controls: bool = flag(False, "inject known faults and show which client catches which")
  config: str = flag("", "without --reference: preset name, or path of a YAML or JSON file")
  algorithm: str = flag("", "without --reference: calibration algorithm or recipe in place of the config's own")
  dtype: str = flag("float32", "type of the float model", ("float32", "bfloat16", "float16"))
  samples: int = flag(1, "number of prompts")
  tokens: int = flag(64, "tokens in each prompt; an ONNX file has its own lengths")
  calib_samples: int = flag(8, "number of calibration windows")
  calib_tokens: int = flag(128, "tokens in each calibration window")
  batch_samples: int = flag(4, "calibration windows that run at once")
  text: str = flag("python-docs", "text source", ("python-docs",))
  text_file: str = flag("", "a UTF-8 file in place of --text")
  seed: int = flag(0, "draws the calibration windows")
  share_scales: bool = flag(True, "siblings (q/k/v, gate/up) share tensor-level FP8 and NVFP4 scales")
  tolerance: float = flag(
    0.0, "largest difference of outputs where no code differs, relative to the largest output; 0 is the backend's own"
  )
  vllm_python: str = flag("", "interpreter of an environment with vLLM")
  vllm_dtype: str = flag("float32", "type that vLLM computes in", ("float32", "bfloat16"))
  report: str = flag("", "JSON file for what was found")


def run(options: Options) -> Report | Controls:
  """Ask the clients.

  Raises:
    ValueError: no --artefact, neither --reference nor --config, an unknown client, or a damaged artefact or reference.
    FileNotFoundError: there is no such artefact or reference.
  """
  if not options.artefact:
    raise ValueError("--artefact is empty; name an exported folder or an .onnx file")
  place = locate(options.artefact)
  quantized, text = _reference(options)
  fixed = input_shape(place) if place.suffix == ".onnx" else None
  prompts = text.cut("evaluation", *(fixed or (options.samples, options.tokens)))
  given: dict[str, Any] = {
    "clients": options.clients or _readers(options, place.suffix == ".onnx"),
    "prompts": np.asarray(prompts, np.int32),
    "tolerance": options.tolerance or None,
    "vllm_python": options.vllm_python or None,
    "vllm_dtype": options.vllm_dtype,
  }
  return quantized.verify(place, controls=options.controls, **given)


def _readers(options: Options, onnx: bool) -> tuple[str, ...]:
  if onnx:
    return ("numpy", "onnxruntime", "onnx.reference")
  return ("numpy", "transformers", "modelopt", "vllm")


def _reference(options: Options) -> tuple[Any, setup.Windows]:
  """The simulated model, and the text that prompts come from."""
  if bool(options.reference) == bool(options.config):
    raise ValueError("name either --reference, a directory that save() wrote, or --config, which the model is quantized with")
  text = setup.open_text(options.model, options.text, options.text_file)
  model = setup.load(options.backend, options.model, options.dtype)
  if options.reference:
    return model.restored(options.reference), text
  algorithm = (options.algorithm,) if options.algorithm else ()
  (config,) = calibration_runs.with_algorithms(setup.read_configs((options.config,)), algorithm, False, "")
  windows = text.cut("calibration", options.calib_samples, options.calib_tokens, options.seed)
  batches = setup.in_batches(windows, options.batch_samples)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    return model.quantize(config.value, batches, None if options.share_scales else ()), text


def main(options: Options) -> int:
  found = run(options)
  clean = found.clean if isinstance(found, Controls) else found
  clean.show()
  if isinstance(found, Controls):
    found.show()
  if options.report:
    manifest.write_json(options.report, manifest.manifest(cli.command("experiments.verify", options), **found.to_dict()))
  return 0 if clean.passed and found.passed else 1


if __name__ == "__main__":
  cli.main(Options, main)
