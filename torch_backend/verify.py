"""verify: an exported model beside the quantized torch model that it was made from, in the clients that will run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core import verify as core_verify
from core.verify import Controls, Report, Run
from torch_backend.capture import observing
from torch_backend.export import ExportHost
from torch_backend.host import array_of
from torch_backend.names import is_quantized
from torch_backend.sequential import Quantizer, tensor_quantizers

RELATIVE = 2e-6  # the clients compute with torch or as precisely: some float32 roundings of the largest output


def verify(
  model: nn.Module,
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
    model: the quantized model, in evaluation mode; it is not changed.
    artefact: what `export` or `export_onnx` wrote.
    clients: "numpy", "transformers", "modelopt" and "vllm" for folders; "numpy", "onnxruntime" and "onnx.reference" for ONNX.
    prompts: token ids [B, T]; a list of texts or of lists of ids; a tuple of the model's arguments; None draws 2 x 16 tokens.
    tolerance: largest difference of outputs where no code differs, relative to the largest output; None is 2e-6.
    tokenizer: for texts; None takes the folder's own.
    vllm_python: interpreter of an environment with vLLM.
    vllm_dtype: type that vLLM computes in.

  Returns:
    What every client found; `report.passed`, `report.show()`, `report.write(path)`.

  Raises:
    ValueError: the model is not quantized or is in training mode, an unknown client, or a damaged artefact: names the file.
    FileNotFoundError: there is no such artefact.
  """
  options = {"tolerance": tolerance, "tokenizer": tokenizer, "vllm_python": vllm_python, "vllm_dtype": vllm_dtype}
  return core_verify.verify(Simulation(model), artefact, clients, prompts, **options)


def verify_controls(
  model: nn.Module, artefact: str | Path, clients: Sequence[str] = ("numpy", "transformers"), prompts: Any = None, **options: Any
) -> Controls:
  """The same on copies of the artefact with one fault each: which client catches which. Arguments and errors as `verify`."""
  return core_verify.controls(Simulation(model), artefact, clients, prompts, **options)


class Simulation:
  """A quantized torch model as `core.verify.Simulation`."""

  kernels_turned = False
  relative = RELATIVE

  def __init__(self, model: nn.Module) -> None:
    if not is_quantized(model):
      raise ValueError("the model has no quantized modules; call quantize(model, config, forward_loop) first")
    if model.training:
      raise ValueError("the model is in training mode; call model.eval() before verifying")
    self.model = model
    self.source = ExportHost(model)

  @torch.no_grad()
  def run(self, args: tuple[np.ndarray, ...]) -> Run:
    seen: dict[str, np.ndarray] = {}

    def see(name: str, quantizer: Quantizer, x: torch.Tensor, y: torch.Tensor) -> None:
      first = tensor_quantizers(quantizer)[0]
      layer, _, role = name.rpartition(".")
      if role == "input_quantizer" and first.config.rotate is None and x.numel():
        seen[layer] = array_of(first.scaled(x)).copy()

    with observing(self.model, see):
      output = self.model(*(_tensor(part) for part in args))
    for name in ("logits", "last_hidden_state"):  # what transformers' models return is an object
      output = getattr(output, name, output)
    return Run(array_of(output).copy(), seen)


def _tensor(array: np.ndarray) -> torch.Tensor:
  tensor = torch.from_numpy(np.array(array))
  return tensor.long() if tensor.dtype in (torch.int32, torch.int16) else tensor
