"""Outputs of a client's model beside the simulated ones, and the codes that fell otherwise on the way.

Two runs of the same arithmetic add in other orders, which puts outputs a few roundings apart, unless an input lies so close to the middle
between two codes that it falls the other way; from there on the runs go apart by whole steps. So outputs are judged by a tolerance only
where no code differs. Where codes differ they are counted, and two things are judged: up to the first layer with such a code the two runs
must be roundings apart, and each layer, given the simulation's inputs, must do as its quantizer does (check "inputs") with the weights that
it should have (check "weights").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import core
from core.export.source import Subject
from core.verify.inputs import flips
from core.verify.report import DIFFERS, EQUAL, EXPLAINED, WITHIN, Check

DRIFT = 32  # inputs of layers may be this many times further apart, relatively, than outputs: they are smaller sums


class Codes:
  """Codes of quantized inputs in two runs.

  Args:
    relative: tolerance of outputs.
  """

  def __init__(self, relative: float) -> None:
    self.compared = self.differing = 0
    self.first = self.drifted = ""
    self._limit = DRIFT * relative

  def add(
    self,
    found: list[Subject],
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    quantized: Callable[[Subject, np.ndarray], np.ndarray | None],
  ) -> None:
    """Count the layers of one run, in the order in which they ran.

    Args:
      found: layers.
      ours: what the simulated layers were given.
      theirs: what the client's were given.
      quantized: what the client makes of an input.
    """
    by_label = {subject.label: subject for subject in found}
    together = True
    for name, x in ours.items():
      subject, other = by_label.get(name), theirs.get(name)
      if subject is None or not subject.inputs or other is None or x.shape != other.shape:
        continue
      y = quantized(subject, other)
      if y is None:
        continue
      if together:
        self.drift(name, x, other)
      stage = subject.inputs[0]
      different = flips(np.asarray(core.fake_quantize(x, stage.spec, stage.amax, tensor_amax=stage.tensor_amax)), y)
      self.count(name, x.size, different)
      together = together and not different

  def drift(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Note a layer whose inputs are more than roundings apart although no code differed before it."""
    largest = float(np.abs(ours).max(initial=0.0))
    if not float(np.abs(ours - theirs).max(initial=0.0)) <= self._limit * max(largest, 1e-30) and not self.drifted:
      self.drifted = name

  def count(self, name: str, compared: int, differing: int) -> None:
    self.compared += compared
    self.differing += differing
    if differing and not self.first:
      self.first = name

  @property
  def explain(self) -> bool:
    """Whether codes that fell otherwise are why outputs differ."""
    return self.differing > 0 and not self.drifted


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """[..., V] float64."""
  shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def apart(a: np.ndarray, b: np.ndarray) -> float:
  """Largest difference of log-probabilities."""
  return float(np.abs(log_softmax(a) - log_softmax(b)).max())


def check(
  pairs: list[tuple[np.ndarray, np.ndarray]], codes: Codes, relative: float, agree: bool, note: str = "", logits: bool = True
) -> Check:
  """Judge outputs.

  Args:
    pairs: (simulated, the client's) of every run.
    codes: of the quantized inputs on the way.
    relative: tolerance where no code differs, relative to the largest output.
    agree: whether the client quantizes each layer's input as the quantizers do; if not, codes that differ explain nothing.
    note: for the report.
    logits: whether outputs are logits, so that log-probabilities are compared.
  """
  name = "log-probabilities" if logits else "outputs"
  compared = differing = 0
  largest = total = scale = 0.0
  for ours, theirs in pairs:
    if ours.shape != theirs.shape:
      return Check(name, DIFFERS, ours.size, ours.size, None, (), f"shape {list(theirs.shape)} for {list(ours.shape)}")
    a, b = (log_softmax(x) if logits else x.astype(np.float64) for x in (ours, theirs))
    difference = np.abs(a - b)
    bad = ~np.isfinite(difference)
    compared += difference.size
    differing += int(((difference > 0) | bad).sum())
    largest = float("inf") if bad.any() else max(largest, float(difference.max(initial=0.0)))
    total += float(difference.sum())
    scale = max(scale, float(np.abs(ours).max(initial=0.0)))
  limit = (2 if logits else 1) * relative * max(scale, 1.0)  # a log-probability is the difference of two numbers of that size
  texts = [note] if note else []
  texts.append(f"mean difference {total / max(compared, 1):.2g}, tolerance {limit:.2g} where no code differs")
  if codes.compared:
    where = f", first in {codes.first}" if codes.differing else ""
    texts.append(f"{codes.differing:,} of {codes.compared:,} codes of quantized inputs differ between the two runs{where}")
  status = EQUAL if not differing else WITHIN if largest <= limit else DIFFERS
  if codes.drifted:
    texts.append(f"inputs of {codes.drifted} are more than roundings apart, and no code differed before it")
  if status == DIFFERS and np.isfinite(largest) and agree and codes.explain:
    status = EXPLAINED
    texts.append("the difference is that of these codes; layer by layer see inputs and weights")
  return Check(name, status, compared, differing, largest, (), "; ".join(texts))
