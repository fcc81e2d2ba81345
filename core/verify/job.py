"""A job: one artefact, the model it was made from, and what clients are to be given."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from core.export.source import Source, Subject, subjects
from core.verify.report import NotRun

EXTRAS = {"transformers": "hf", "gguf": "hf", "torch": "torch", "rich": "test"}
_ONNX = ("onnx", "onnxruntime")


class Run(NamedTuple):
  """One run of the simulated model.

  Attributes:
    outputs: logits, or whatever it returns, float32.
    inputs: what the enabled input quantizers were given, by the layer's name in the checkpoint; float32.
  """

  outputs: np.ndarray
  inputs: dict[str, np.ndarray]


class Simulation(Protocol):
  """A quantized model, whichever framework it is in.

  Attributes:
    kernels_turned: whether the framework keeps a Linear weight as [K, N].
    relative: of two runs that do the same arithmetic, how far outputs may be apart, relative to the largest one: sums in another order.
  """

  kernels_turned: bool
  relative: float

  @property
  def source(self) -> Source:
    """What exporting sees of it."""
    ...

  def run(self, args: tuple[np.ndarray, ...]) -> Run:
    """Run it on these positional arguments."""
    ...


@dataclasses.dataclass
class Job:
  """What a client is to do.

  Attributes:
    simulation: the model.
    place: exported folder, or an ONNX file.
    batches: positional arguments of each run.
    tolerance: largest difference of outputs, relative to the largest output; None is the simulation's own.
    vllm_python: interpreter of an environment with vLLM, or None.
    vllm_dtype: type that vLLM computes in.
  """

  simulation: Simulation
  place: Path
  batches: list[tuple[np.ndarray, ...]]
  tolerance: float | None = None
  vllm_python: str | None = None
  vllm_dtype: str = "float32"
  runs: dict[int, Run] = dataclasses.field(default_factory=dict)
  memory: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def relative(self) -> float:
    return self.simulation.relative if self.tolerance is None else self.tolerance

  def run(self, index: int) -> Run:
    """The simulation on one batch, run once."""
    if index not in self.runs:
      self.runs[index] = self.simulation.run(self.batches[index])
    return self.runs[index]

  def subjects(self) -> list[Subject]:
    """The quantized layers."""
    if "subjects" not in self.memory:
      self.memory["subjects"] = subjects(self.simulation.source)
    return self.memory["subjects"]

  @property
  def narrow(self) -> str:
    """Why outputs cannot be compared: the simulation computes in another type than clients do; "" where it does not."""
    kinds = sorted(set(self.simulation.source.parameter_types().values()) & {"BF16", "F16"})
    if not kinds or self.tolerance is not None:
      return ""
    return f"the simulated model computes in {', '.join(kinds)} and this client in float32; restore it in float32, or give a tolerance"

  def at(self, place: Path) -> Job:
    """The same job on another artefact; what the simulation gave is kept."""
    return dataclasses.replace(self, place=place)

  def tokens(self) -> list[np.ndarray]:
    """[B, T] token ids of every batch.

    Raises:
      NotRun: the batches are something else.
    """
    found = [args[0] for args in self.batches if len(args) == 1 and args[0].ndim == 2 and args[0].dtype.kind in "iu"]
    if len(found) != len(self.batches):
      raise NotRun("this client runs token ids [B, T], and the model is given something else")
    return found


def package(name: str, why: str) -> Any:
  """A module of a client.

  Raises:
    NotRun: it is not installed; says what to install.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
      raise
    top = name.partition(".")[0]
    extra = "onnx" if top in _ONNX else EXTRAS.get(top, "peers")
    raise NotRun(f'{why} needs the package {top!r}, which is not installed; run pip install -c constraints.txt -e ".[{extra}]"') from error


def batches_of(prompts: Any, vocabulary: int | None, tokenizer: Any = None) -> list[tuple[np.ndarray, ...]]:
  """Positional arguments of each run.

  Args:
    prompts: token ids [B, T]; a list of texts, or of lists of ids, which run one by one; a tuple of arrays, the model's arguments; or None
      for 2 x 16 tokens drawn by seed 0.
    vocabulary: number of tokens, for None.
    tokenizer: what turns a text into ids.

  Raises:
    ValueError: something else, or nothing.
  """
  if prompts is None:
    if not vocabulary:
      raise ValueError("the artefact does not say how many tokens there are; give prompts: token ids [B, T], or a tuple of arguments")
    return [(np.random.default_rng(0).integers(0, vocabulary, (2, 16)).astype(np.int32),)]
  if isinstance(prompts, tuple):
    return [tuple(np.asarray(part) for part in prompts)]
  if isinstance(prompts, np.ndarray) and prompts.ndim == 2 and prompts.dtype.kind in "iu" and prompts.size:
    return [(prompts.astype(np.int32),)]
  if isinstance(prompts, str):
    prompts = [prompts]
  if not isinstance(prompts, Sequence) or not prompts:
    raise ValueError(
      f"prompts are {type(prompts).__name__}; token ids [B, T], a list of texts or of ids, or a tuple of arguments are needed"
    )
  return [(_ids(prompt, tokenizer),) for prompt in prompts]


def _ids(prompt: Any, tokenizer: Any) -> np.ndarray:
  if isinstance(prompt, str):
    if tokenizer is None:
      raise ValueError("prompts are texts and there is no tokenizer; export with tokenizer= or source=, or give token ids")
    prompt = tokenizer(prompt)["input_ids"]
  ids = np.asarray(prompt, np.int32)
  if ids.ndim != 1 or not ids.size:
    raise ValueError(f"a prompt has shape {list(ids.shape)}; a list of token ids is needed")
  return ids[None]
