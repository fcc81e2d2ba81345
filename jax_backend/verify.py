"""verify: an exported model beside the quantized Flax model that it was made from, in the clients that will run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from core import verify as core_verify
from core.export.source import label
from core.verify import Controls, Report, Run
from jax_backend.apply import QuantModule
from jax_backend.capture import observing
from jax_backend.edit import is_quantized
from jax_backend.export import ExportHost
from jax_backend.quantizer import AnyQuantizer

RELATIVE = 1e-5  # clients sum matrix products in another order than XLA, in every layer


def verify(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  artefact: str | Path,
  clients: Sequence[str] = ("numpy", "transformers"),
  prompts: Any = None,
  tolerance: float | None = None,
  tokenizer: Any = None,
  vllm_python: str | None = None,
  vllm_dtype: str = "float32",
) -> Report:
  """Ask clients whether an exported folder or ONNX file is this model.

  A client that is not installed, or has no reader for the artefact, is reported as not run and never as passed. docs/verify.md says what
  each one compares, and what it cannot see.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables.
    artefact: what `export` or `export_onnx` wrote.
    clients: "numpy", "transformers", "modelopt" and "vllm" for folders; "numpy", "onnxruntime" and "onnx.reference" for ONNX.
    prompts: token ids [B, T]; a list of texts or of lists of ids; a tuple of the module's arguments; None draws 2 x 16 tokens.
    tolerance: largest difference of outputs where no code differs, relative to the largest output; None is 1e-5.
    tokenizer: for texts; None takes the folder's own.
    vllm_python: interpreter of an environment with vLLM.
    vllm_dtype: type that vLLM computes in.

  Returns:
    What every client found; `report.passed`, `report.show()`, `report.write(path)`.

  Raises:
    ValueError: the variables are not quantized, an unknown client, or a damaged artefact: names the file.
    FileNotFoundError: there is no such artefact.
  """
  options = {"tolerance": tolerance, "tokenizer": tokenizer, "vllm_python": vllm_python, "vllm_dtype": vllm_dtype}
  return core_verify.verify(Simulation(qmodule, qvariables), artefact, clients, prompts, **options)


def verify_controls(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  artefact: str | Path,
  clients: Sequence[str] = ("numpy", "transformers"),
  prompts: Any = None,
  **options: Any,
) -> Controls:
  """The same on copies of the artefact with one fault each: which client catches which. Arguments and errors as `verify`."""
  return core_verify.controls(Simulation(qmodule, qvariables), artefact, clients, prompts, **options)


class Simulation:
  """Quantized variables as `core.verify.Simulation`."""

  kernels_turned = True
  relative = RELATIVE

  def __init__(self, qmodule: QuantModule, qvariables: Mapping[str, Any]) -> None:
    if not is_quantized(qvariables):
      raise ValueError("these variables have no quantizers; call quantize(module, variables, config, forward_loop) first")
    self.qmodule, self.qvariables = qmodule, qvariables
    self.source = ExportHost(qmodule, qvariables)

  def run(self, args: tuple[np.ndarray, ...]) -> Run:
    seen: dict[str, np.ndarray] = {}

    def see(name: str, quantizer: AnyQuantizer, x: Any, y: Any) -> None:
      first = quantizer.leaves[0]
      layer, _, role = name.rpartition(".")
      if role == "input_quantizer" and first.config.rotate is None and not isinstance(x, Tracer):
        seen[label(layer)] = np.asarray(first.prepare(x), np.float32)

    with observing(see):  # operation by operation, so that the observer is handed arrays
      output = self.qmodule.apply(self.qvariables, *map(jnp.asarray, args))
    for name in ("logits", "last_hidden_state"):
      output = getattr(output, name, output)
    return Run(np.asarray(output, np.float32), seen)
