"""One calibrated model, measured: what the benchmark of calibration algorithms does the same way for ModelOpt and for twinquant.

A run calibrates in a process of its own, then scores two texts beside the float model. Its arrays (per predicted token) and figures are
kept as `NAME-KEY.npz` and `.json`; KEY is a hash of everything that decides them, so that a run is repeated only where something changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import data, evaluate, manifest, setup
from experiments.cli import flag
from experiments.models import folders

TEXTS = ("first", "second")

Run = tuple[dict[str, np.ndarray], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Flags that every run shares."""

  model: str = flag("smollm2", "smollm2, or a Hugging Face folder of Llama architecture")
  calib_samples: int = flag(32, "number of calibration windows, from the first part of Python's documentation")
  calib_tokens: int = flag(256, "tokens in each calibration window")
  calib_batch: int = flag(8, "calibration windows that run at once")
  eval_samples: int = flag(16, "number of evaluation windows of each text")
  eval_tokens: int = flag(256, "tokens in each evaluation window")
  eval_batch: int = flag(8, "evaluation windows that run at once")
  second_text_file: str = flag("", "the second evaluation text, UTF-8; empty takes the docstrings of the standard library")
  seed: int = flag(0, "of the calibration windows")
  threads: int = flag(1, "threads of one run; one makes CPU seconds comparable on a machine that others use too")
  refresh: bool = flag(False, "run again what is kept from before")
  out: str = flag("results/modelopt_algorithms", "folder of the kept runs")


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Token windows of a benchmark, and what names them.

  Attributes:
    calibration: [samples, tokens] int32.
    evaluation: text -> [samples, tokens] int32.
    facts: JSON with the hash of the model, the texts and the windows.
  """

  calibration: np.ndarray
  evaluation: dict[str, np.ndarray]
  facts: dict[str, Any]


def read_inputs(settings: Settings) -> Inputs:
  """Windows of both texts. Calibration and evaluation take different halves of the first text.

  Raises:
    ValueError: a text is too short for the windows asked for.
    FileNotFoundError: no such text file.
  """
  first = setup.open_text(settings.model, "python-docs", "")
  other = data.load_text("python-docstrings", settings.second_text_file or None)
  second = setup.Windows(other.source, other.sha256, other, first.tokenizer)
  calibration = first.cut("calibration", settings.calib_samples, settings.calib_tokens, settings.seed)
  evaluation = {
    name: text.cut("evaluation", settings.eval_samples, settings.eval_tokens) for name, text in zip(TEXTS, (first, second), strict=True)
  }
  facts = {
    "model": model_digest(settings.model),
    "texts": {name: {"source": text.source, "sha256": text.sha256} for name, text in zip(TEXTS, (first, second), strict=True)},
    "calibration": {**setup.describe_windows(calibration), "batch": settings.calib_batch},
    "evaluation": {name: setup.describe_windows(windows) for name, windows in evaluation.items()},
  }
  return Inputs(calibration, evaluation, facts)


def model_digest(source: str) -> str:
  """SHA-256 of a model's configuration and weights."""
  found = hashlib.sha256()
  folder = folders.find(source)
  for path in sorted((*folder.glob("config.json"), *folder.glob("*.safetensors"))):
    with path.open("rb") as file:
      found.update(hashlib.file_digest(file, "sha256").digest())
  return found.hexdigest()


def key(inputs: Inputs, **facts: Any) -> str:
  """Name of a run's files: a hash of the hashes of what it reads, without the texts' names, and of what else decides its result."""
  text = json.dumps(manifest.plain({**facts, **{k: v for k, v in inputs.facts.items() if k != "texts"}}), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class FloatOutputs(evaluate.Reference):
  """Logits of the float model in a file that every run of a benchmark reads; [samples, tokens, vocabulary] float32."""

  def __init__(self, path: Path, batch: int) -> None:
    super().__init__()
    self._logits, self._batch = np.load(path, mmap_mode="r"), batch

  def __iter__(self) -> Iterator[np.ndarray]:
    return iter(setup.in_batches(self._logits, self._batch))


def float_paths(settings: Settings, inputs: Inputs) -> tuple[Path, dict[str, Path]]:
  """(scores of the float model, text -> its logits)."""
  name = f"float-{key(inputs, run='float')}"
  folder = Path(settings.out)
  return folder / f"{name}.npz", {text: folder / f"{name}-{text}.npy" for text in TEXTS}


def float_run(settings: Settings, inputs: Inputs, logits: bool) -> dict[str, np.ndarray]:
  """Negative log-likelihood of the float model in PyTorch, text -> [predicted tokens]; computed where it is not kept from before.

  Args:
    settings: flags.
    inputs: of the benchmark.
    logits: also leave the logits where `FloatOutputs` reads them.
  """
  scores, outputs = float_paths(settings, inputs)
  if not scores.exists() or (logits and not all(path.exists() for path in outputs.values())):
    scores.parent.mkdir(parents=True, exist_ok=True)
    model = setup.load("torch", settings.model)
    found = {name: _keep_logits(model, inputs.evaluation[name], settings.eval_batch, path) for name, path in outputs.items()}
    _save(scores, found)
  with np.load(scores) as kept:
    return dict(kept)


def _keep_logits(model: Callable[[np.ndarray], np.ndarray], windows: np.ndarray, batch: int, path: Path) -> np.ndarray:
  temporary, file, parts = path.with_name(f".{path.name}.{os.getpid()}.tmp"), None, []
  for start in range(0, len(windows), batch):
    ids = windows[start : start + batch]
    logits = model(ids)
    if file is None:
      file = np.lib.format.open_memmap(temporary, "w+", np.float32, (*windows.shape, logits.shape[-1]))
    file[start : start + batch] = logits
    parts.append(evaluate.score_batch(ids, logits, None)["nll"])
  del file
  os.replace(temporary, path)
  return np.concatenate(parts)


def drop_logits(settings: Settings, inputs: Inputs) -> None:
  """Remove the float model's logits, gigabytes that the next run computes again."""
  for path in float_paths(settings, inputs)[1].values():
    path.unlink(missing_ok=True)


def measure(settings: Settings, inputs: Inputs, quantize: Callable[[list[np.ndarray]], Callable[[np.ndarray], np.ndarray]]) -> Run:
  """Calibrate and score.

  Args:
    settings: flags.
    inputs: of the benchmark.
    quantize: from calibration batches to the quantized model, token ids [B, T] to logits [B, T, V].

  Returns:
    ("nll_TEXT" and "kl_TEXT" of every predicted token; CPU seconds, wall seconds and memory of the calibration alone).
  """
  before = sum(os.times()[:4])
  with evaluate.Meter() as meter:
    start_mib = meter.peak_mib
    quantized = quantize(setup.in_batches(inputs.calibration, settings.calib_batch))
  figures = {
    "cpu_seconds": sum(os.times()[:4]) - before,
    "wall_seconds": meter.seconds,
    "peak_mib": meter.peak_mib,
    "start_mib": start_mib,
    "threads": settings.threads,
  }
  arrays = {}
  for name, path in float_paths(settings, inputs)[1].items():
    with FloatOutputs(path, settings.eval_batch) as reference:
      scores = evaluate.score(quantized, setup.in_batches(inputs.evaluation[name], settings.eval_batch), reference)
    arrays |= {f"nll_{name}": scores["nll"], f"kl_{name}": scores["kl"]}
  return arrays, figures


def keep(path: Path, arrays: dict[str, np.ndarray], facts: Mapping[str, Any]) -> None:
  """Write a run; the JSON comes last, so that a run with a JSON is whole."""
  _save(path.with_suffix(".npz"), arrays)
  manifest.write_json(path.with_suffix(".json"), {**facts, "versions": manifest.versions(), "commit": manifest.commit()})


def kept(path: Path) -> Run | None:
  """(arrays, facts) of a run from before, or None."""
  if not path.with_suffix(".json").exists():
    return None
  with np.load(path.with_suffix(".npz")) as arrays:
    return dict(arrays), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def obtain(settings: Settings, inputs: Inputs, path: Path, command: str) -> Run | None:
  """A run: the kept one, if it had as many threads, or what `command` leaves at `path`; None where it fails."""
  run = None if settings.refresh else kept(path)
  if run is None or run[1]["threads"] != settings.threads:
    path.with_suffix(".json").unlink(missing_ok=True)
    float_run(settings, inputs, logits=True)
    status = spawn(command, settings.threads, path.with_suffix(".log"))
    run = kept(path)
    if run is None and status == 0:
      print(f"{path.name}: the source changed while it ran, so its result has another name; start again", file=sys.stderr, flush=True)
  return run


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
  np.savez(temporary, **arrays)  # pyright: ignore[reportArgumentType]  # no array is called allow_pickle
  os.replace(temporary, path)


def spawn(command: str, threads: int, log: Path) -> int:
  """Run a `python -m ...` command line by itself, every library held to that many threads; says where it failed.

  Args:
    command: command line.
    threads: how many.
    log: file that gets what it prints.

  Returns:
    Exit status.
  """
  count = str(threads)
  limits = {name: count for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
  if threads == 1:
    limits["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1".strip()
  with log.open("wb") as file:
    parts = [sys.executable, *shlex.split(command)[1:]]
    status = subprocess.run(parts, env=os.environ | limits, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
  if status:
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
    print(f"status {status} from {command}\n  {last}\n  all it said: {log}", file=sys.stderr, flush=True)
  return status


def language_model(source: str) -> None:
  """Raises:
  ValueError: the model does not predict tokens.
  """
  folders.offline()
  if not setup.is_language_model(source):
    raise ValueError(f"model {source!r} predicts no tokens; give a Llama checkpoint")
