"""Figures of a model on token windows: negative log-likelihood, KL to the float model, agreement, cosine of embeddings.

Everything here is numpy on the logits that a backend returns, so that both backends are measured with the same ruler.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.metrics import mean_and_error

Logits = Callable[[np.ndarray], np.ndarray]


def batches(windows: np.ndarray, size: int) -> list[np.ndarray]:
  """The windows in batches of at most `size`."""
  return [windows[i : i + size] for i in range(0, len(windows), size)]


class Reference:
  """Outputs of the float model, kept in an unnamed file: the logits of a language model for 10,000 tokens are gigabytes."""

  def __init__(self, folder: str | Path | None = None) -> None:
    self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as the object
    self._places: list[tuple[int, tuple[int, ...], np.dtype]] = []

  def append(self, values: np.ndarray) -> None:
    """Keep one batch."""
    values = np.ascontiguousarray(values)
    self._file.seek(0, 2)
    self._places.append((self._file.tell(), values.shape, values.dtype))
    self._file.write(values.data)

  def __iter__(self) -> Iterator[np.ndarray]:
    for offset, shape, dtype in self._places:
      self._file.seek(offset)
      yield np.frombuffer(self._file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> Reference:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def shifted_log_partition(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(logits minus their maximum, exp of that, log of its sum) over the last axis. The sum is float64, the rest has the type of logits."""
  shifted = logits - logits.max(axis=-1, keepdims=True)
  exps = np.exp(shifted)
  return shifted, exps, np.log(exps.sum(axis=-1, dtype=np.float64))


def score_batch(ids: np.ndarray, logits: np.ndarray, reference: np.ndarray | None) -> dict[str, np.ndarray]:
  """Per predicted token: "nll" and, beside a reference, "kl" (nats, from the reference) and "top1" (same most likely token).

  One row of the batch at a time, in the logits' own precision: for vocabularies of 10^5 the memory would otherwise be many times that
  of the logits. In float32 the KL is good to about 1e-6 nats.
  """
  parts: dict[str, list[np.ndarray]] = {}
  for row, tokens in enumerate(ids):
    shifted, _, log_sum = shifted_log_partition(logits[row, :-1])
    index = np.arange(len(tokens) - 1)
    found = {"nll": log_sum - shifted[index, tokens[1:]]}
    if reference is not None:
      base, exps, base_log_sum = shifted_log_partition(reference[row, :-1])
      cross = np.einsum("tv,tv->t", exps, base - shifted) / exps.sum(axis=-1, dtype=np.float64)
      found["kl"] = np.maximum(cross - base_log_sum + log_sum, 0.0)
      found["top1"] = shifted.argmax(axis=-1) == base.argmax(axis=-1)
    for key, value in found.items():
      parts.setdefault(key, []).append(value)
  return {key: np.concatenate(values) for key, values in parts.items()}


def score(
  model: Logits, windows: list[np.ndarray], reference: Reference | None = None, keep: Reference | None = None
) -> dict[str, np.ndarray]:
  """`score_batch` over all batches.

  Args:
    model: token ids [B, T] to logits [B, T, V].
    windows: batches of token ids.
    reference: outputs of the float model on the same batches.
    keep: where to keep this model's outputs.

  Raises:
    ValueError: the model returns NaN or infinity.
  """
  parts: dict[str, list[np.ndarray]] = {}
  expected = iter(reference) if reference is not None else None
  for ids in windows:
    logits = model(ids)
    _check_finite(logits)
    if keep is not None:
      keep.append(logits)
    for key, value in score_batch(ids, logits, next(expected) if expected is not None else None).items():
      parts.setdefault(key, []).append(value)
  return {key: np.concatenate(values) for key, values in parts.items()}


def embed(
  model: Logits, windows: list[np.ndarray], reference: Reference | None = None, keep: Reference | None = None
) -> dict[str, np.ndarray]:
  """For encoders: the mean over the tokens as a sentence's embedding, and its "cosine" to the float model's.

  Args, Raises: as in `score`; the model returns [B, T, hidden].
  """
  found = []
  expected = iter(reference) if reference is not None else None
  for ids in windows:
    hidden = model(ids)
    _check_finite(hidden)
    vectors = hidden.mean(axis=1, dtype=np.float64)
    if keep is not None:
      keep.append(vectors)
    base = next(expected) if expected is not None else vectors
    found.append(np.sum(vectors * base, -1) / (np.linalg.norm(vectors, axis=-1) * np.linalg.norm(base, axis=-1)))
  return {"cosine": np.concatenate(found)}


def _check_finite(values: np.ndarray) -> None:
  if not np.isfinite(values).all():
    raise ValueError(f"the model returned {int((~np.isfinite(values)).sum())} NaN or infinite of {values.size} values")


def figures(scores: dict[str, np.ndarray], base: dict[str, np.ndarray] | None) -> dict[str, float | None]:
  """The columns of a result: means over tokens, and standard errors of the paired differences to the float model.

  Errors treat tokens as independent; within a window they are not quite, so they are a lower bound.
  """
  if "cosine" in scores:
    mean, error = mean_and_error(scores["cosine"])
    return {"cosine": mean, "cosine_se": error, "cosine_min": float(scores["cosine"].min())}
  found: dict[str, float | None] = {"nll": float(scores["nll"].mean()), "perplexity": math.exp(float(scores["nll"].mean()))}
  if base is not None:
    found["delta_nll"], found["delta_nll_se"] = mean_and_error(scores["nll"] - base["nll"])
    found["kl"], found["kl_se"] = mean_and_error(scores["kl"])
    found["top1"] = float(scores["top1"].mean())
  return found


MEASURES = ("perplexity", "delta_nll", "kl", "top1", "cosine")


def over_seeds(rows: Sequence[Mapping[str, Any]], by: Sequence[str], measures: Sequence[str] = MEASURES) -> list[dict[str, Any]]:
  """Mean over seeds with a 95 % interval (Student's t).

  Args:
    rows: rows with a "seed"; those without one, such as the float model's, are left out.
    by: keys that name what ran.
    measures: keys of the figures.

  Returns:
    One dict for everything that ran with more than one seed: its keys, "seeds", and per measure the mean and "<measure>_ci95", half the
    interval's width.
  """
  import scipy.stats

  groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
  for row in rows:
    if row.get("seed") is not None:
      groups.setdefault(tuple(row.get(key) for key in by), []).append(row)
  found = []
  for name, own in groups.items():
    if len(own) < 2:
      continue
    entry: dict[str, Any] = {**dict(zip(by, name, strict=True)), "seeds": len(own)}
    t = float(scipy.stats.t.ppf(0.975, len(own) - 1))
    for key in measures:
      values = [row[key] for row in own if row.get(key) is not None]
      if len(values) == len(own):
        mean, error = mean_and_error(np.asarray(values))
        entry |= {key: mean, f"{key}_ci95": t * error}
    found.append(entry)
  return found


class Meter:
  """Wall seconds and the process's peak resident memory while the context is open. Memory is sampled every 10 ms where Linux reports it.

  Attributes:
    seconds: wall time.
    peak_mib: largest resident set seen, MiB; None where it cannot be read.
  """

  def __init__(self) -> None:
    self.seconds = 0.0
    self.peak_mib: float | None = None

  def __enter__(self) -> Meter:
    self._stop = threading.Event()
    self._sample()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    self._start = time.perf_counter()
    return self

  def __exit__(self, *_: Any) -> None:
    self.seconds = time.perf_counter() - self._start
    self._stop.set()
    self._thread.join()
    self._sample()

  def _watch(self) -> None:
    while not self._stop.wait(0.01):
      self._sample()

  def _sample(self) -> None:
    try:
      with open("/proc/self/status", encoding="ascii") as file:
        resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    except (OSError, StopIteration, ValueError):
      return
    self.peak_mib = max(self.peak_mib or 0.0, resident / 1024)
