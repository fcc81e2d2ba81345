"""Asking every client, and turning what happens into a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.export.read import read
from core.verify import modelopt_client, numpy_client, onnx_client, transformers_client, vllm_client
from core.verify.job import Job, Simulation, batches_of
from core.verify.report import Check, NotRun, Outcome, Report

FOLDER: dict[str, Callable[[Job], list[Check]]] = {
  "numpy": numpy_client.run,
  "transformers": transformers_client.run,
  "modelopt": modelopt_client.run,
  "vllm": vllm_client.run,
}
ONNX: dict[str, Callable[[Job], list[Check]]] = {
  "numpy": onnx_client.run_numpy,
  "onnxruntime": onnx_client.run_onnxruntime,
  "onnx.reference": onnx_client.run_reference,
}
CLIENTS = tuple(dict.fromkeys([*FOLDER, *ONNX]))


def verify(
  simulation: Simulation, artefact: str | Path, clients: Sequence[str] = ("numpy",), prompts: Any = None, **options: Any
) -> Report:
  """Compare an artefact with the simulated model in every client.

  Args:
    simulation: the model.
    artefact: exported folder, .onnx file, or a folder with exactly one.
    clients: of `CLIENTS`.
    prompts: as `batches_of` takes them.
    **options: of `job_of`.

  Raises:
    ValueError: an unknown client, unusable prompts, or the artefact is damaged: names the file.
    FileNotFoundError: there is no such artefact.
  """
  job, layout = job_of(simulation, artefact, clients, prompts, **options)
  return ask(job, layout, clients)


def job_of(
  simulation: Simulation,
  artefact: str | Path,
  clients: Sequence[str],
  prompts: Any = None,
  tolerance: float | None = None,
  tokenizer: Any = None,
  vllm_python: str | None = None,
  vllm_dtype: str = "float32",
) -> tuple[Job, str]:
  """(what clients are to do, the artefact's layout).

  Args:
    simulation: as in `verify`.
    artefact: as in `verify`.
    clients: as in `verify`.
    prompts: as in `verify`.
    tolerance: largest difference of outputs where no code differs, relative to the largest output; None is the simulation's own.
    tokenizer: for prompts that are texts; None takes the folder's own.
    vllm_python: interpreter of an environment with vLLM.
    vllm_dtype: type that vLLM computes in.

  Raises:
    ValueError: as `verify`.
    FileNotFoundError: as `verify`.
  """
  unknown = [name for name in clients if name not in CLIENTS]
  if unknown or not clients:
    raise ValueError(f"clients {', '.join(map(repr, unknown)) or 'are none'}; allowed are {', '.join(map(repr, CLIENTS))}")
  place = locate(artefact)
  if place.suffix == ".onnx":
    layout, vocabulary = "onnx", None
    prompts = onnx_client.example_inputs(place, prompts)
  else:
    opened = read(place)
    layout, size = opened.layout, opened.config.get("vocab_size")
    vocabulary = size if type(size) is int and size > 0 else None
    if vocabulary is None and prompts is None and set(clients) <= {"numpy", "modelopt"}:
      prompts = ()  # these run nothing
  batches = [] if isinstance(prompts, tuple) and not prompts else batches_of(prompts, vocabulary, tokenizer or _tokenizer(place, prompts))
  return Job(simulation, place, batches, tolerance, vllm_python, vllm_dtype), layout


def locate(artefact: str | Path) -> Path:
  """The folder, or the ONNX file that it holds.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: several ONNX files.
  """
  place = Path(artefact)
  if not place.exists():
    raise FileNotFoundError(f"{place} is not there; export the model first")
  if place.is_dir() and not (place / "config.json").exists():
    found = sorted(place.glob("*.onnx"))
    if len(found) > 1:
      raise ValueError(f"{place} has several ONNX files ({', '.join(path.name for path in found[:3])}); name one")
    if found:
      return found[0]
  if place.is_file() and place.suffix != ".onnx":
    raise ValueError(f"{place} is no exported folder and no .onnx file")
  return place


def _tokenizer(place: Path, prompts: Any) -> Any:
  texts = isinstance(prompts, str) or (isinstance(prompts, list) and any(isinstance(prompt, str) for prompt in prompts))
  if not texts or not (place / "tokenizer.json").is_file():
    return None
  import importlib

  held = importlib.import_module("tokenizers").Tokenizer.from_file(str(place / "tokenizer.json"))
  return lambda text: {"input_ids": held.encode(text).ids}


def ask(job: Job, layout: str, clients: Sequence[str]) -> Report:
  """Every client's outcome."""
  able = ONNX if layout == "onnx" else FOLDER
  return Report(str(job.place), layout, tuple(_outcome(name, able.get(name), job, layout) for name in clients))


def _outcome(name: str, client: Callable[[Job], list[Check]] | None, job: Job, layout: str) -> Outcome:
  if client is None:
    return Outcome(name, reason=f"this client has no reader of layout {layout!r}")
  start = time.perf_counter()
  try:
    checks = tuple(client(job))
  except NotRun as reason:
    return Outcome(name, reason=str(reason), seconds=time.perf_counter() - start)
  except Exception as error:  # whatever goes wrong inside a client is that client's finding, and must not hide the others'
    text = f"{type(error).__name__}: {str(error)[:400]}"
    return Outcome(name, reason=text, failed=True, seconds=time.perf_counter() - start)
  return Outcome(name, checks, seconds=time.perf_counter() - start)
