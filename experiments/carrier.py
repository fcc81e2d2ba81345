"""Both models run on their own, and every activation code of the one is compared with that of the other.

In float32 the matmuls round differently, one flipped code moves everything behind it, and the runs drift apart. With a float64 carrier,
everything outside the quantizers is float64 while the quantizers still decide in float32 from the rounded input: the order of summation
and the last bits of exponentials no longer reach a decision, and the codes of a whole model can be compared one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.quantities import Codes, Leaf, differing

Leaves = Mapping[str, tuple[Leaf, ...]]
Observer = Callable[[str, Any, Any, Codes], None]


@contextlib.contextmanager
def precision(carrier: str) -> Iterator[None]:
  """JAX with or without 64-bit types, for the duration of the context."""
  import jax

  with jax.enable_x64(carrier == "float64"):
    yield


@dataclasses.dataclass
class Count:
  """How many codes or scales of one quantizer were compared, and how many differ."""

  compared: int = 0
  differing: int = 0
  scales_compared: int = 0
  scales_differing: int = 0

  def add(self, a: Codes, b: Codes) -> None:
    """Compare one more tensor."""
    self.compared += a.codes.size
    self.differing += differing(a.codes, b.codes)
    for one, other in zip(a.scale_parts(), b.scale_parts(), strict=True):
      self.scales_compared += one.size
      self.scales_differing += differing(one, other)


@dataclasses.dataclass
class Distance:
  """How far two tensors of one name are apart, over all windows.

  Attributes:
    largest: max |a - b|.
    squares, reference: sums of (a - b)^2 and a^2.
    count: elements.
  """

  largest: float = 0.0
  squares: float = 0.0
  reference: float = 0.0
  count: int = 0

  def add(self, a: np.ndarray, b: np.ndarray) -> None:
    """Take one more pair of tensors into account."""
    difference = np.subtract(a, b, dtype=np.float64)
    self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))
    self.squares += float(np.vdot(difference, difference))
    self.reference += float(np.sum(np.square(a, dtype=np.float64)))
    self.count += difference.size

  @property
  def rms(self) -> float:
    return (self.squares / self.count) ** 0.5 if self.count else 0.0

  @property
  def relative(self) -> float:
    """Root of the mean squared difference over that of the values."""
    return (self.squares / self.reference) ** 0.5 if self.reference else 0.0


@dataclasses.dataclass
class Comparison:
  """What `compare` found.

  Attributes:
    quantizers: counts by quantizer name.
    layers: distances of layer outputs by layer name.
    logits: distance of the logits.
    untold: activation quantizers that only one of the two models ran.
    replayed: codes of either that do not decode to what its quantizer returned; 0, or the codes are not those in use.
  """

  quantizers: dict[str, Count] = dataclasses.field(default_factory=dict)
  layers: dict[str, Distance] = dataclasses.field(default_factory=dict)
  logits: Distance = dataclasses.field(default_factory=Distance)
  untold: set[str] = dataclasses.field(default_factory=set)
  replayed: int = 0

  @property
  def total(self) -> Count:
    return Count(*(sum(getattr(c, f.name) for c in self.quantizers.values()) for f in dataclasses.fields(Count)))


class Run(NamedTuple):
  """A quantized model that runs on its own.

  Attributes:
    model: `on_torch.Quantized`, `on_jax.Quantized`, or one that acts like it.
    adapter: the module `on_torch` or `on_jax` that belongs to it.
    leaves: the calibrated state that it quantizes with.
  """

  model: Any
  adapter: Any
  leaves: Leaves

  def encode(self, name: str, quantizer: Any, x: Any, y: Any) -> tuple[Codes, int]:
    """Codes of x, and how many do not decode to y, the value that the model went on with (not counted with a bias or rotation)."""
    leaves = self.leaves[name]
    codes = self.adapter.encode(self.adapter.prepare(quantizer, x), leaves)
    config = leaves[-1].config
    if config.bias is not None or config.rotate is not None:
      return codes, 0
    return codes, differing(np.asarray(self.adapter.decode(codes, leaves[-1].spec, y)), np.asarray(y))


class _Recorder:
  """Codes and layer outputs of one window; codes take a byte each."""

  def __init__(self, run: Run, checker: Observer | None) -> None:
    self.codes: dict[str, list[Codes]] = {}
    self.layers: dict[str, list[np.ndarray]] = {}
    self.replayed = 0
    self._run, self._checker = run, checker

  def on_quantizer(self, name: str, quantizer: Any, x: Any, y: Any) -> None:
    codes, replayed = self._run.encode(name, quantizer, x, y)
    self.replayed += replayed
    self.codes.setdefault(name, []).append(codes)
    if self._checker is not None:
      self._checker(name, x, y, codes)

  def on_layer(self, name: str, output: Any) -> None:
    self.layers.setdefault(name, []).append(np.asarray(output).copy())


class _Comparer:
  """Compares codes and layer outputs with the recorded ones as another model produces them; nothing is kept."""

  def __init__(self, record: _Recorder, run: Run, result: Comparison) -> None:
    self._run, self._result = run, result
    self._codes = {name: iter(found) for name, found in record.codes.items()}
    self._layers = {name: iter(found) for name, found in record.layers.items()}

  def on_quantizer(self, name: str, quantizer: Any, x: Any, y: Any) -> None:
    codes, replayed = self._run.encode(name, quantizer, x, y)
    self._result.replayed += replayed
    recorded = next(self._codes.get(name, iter(())), None)
    if recorded is None:
      self._result.untold.add(name)
    else:
      self._result.quantizers.setdefault(name, Count()).add(recorded, codes)

  def on_layer(self, name: str, output: Any) -> None:
    recorded = next(self._layers.get(name, iter(())), None)
    if recorded is not None:
      self._result.layers.setdefault(name, Distance()).add(recorded, np.asarray(output))

  def finish(self) -> None:
    """Note what the other model did not run."""
    self._result.untold |= {name for name, left in self._codes.items() if next(left, None) is not None}


def compare(first: Run, others: Sequence[Run], windows: list[np.ndarray], checker: Observer | None = None) -> list[Comparison]:
  """Run quantized models on their own and compare codes, layer outputs and logits with those of the first, window by window.

  Args:
    first: the model that the others are compared with.
    others: models with the same quantizers.
    windows: batches of token ids.
    checker: also called with (name, x, y, codes) of every activation quantizer of the first.

  Returns:
    One comparison per model of `others`.
  """
  results = [Comparison() for _ in others]
  for ids in windows:
    record = _Recorder(first, checker)
    logits = first.model.run(ids, record.on_quantizer, record.on_layer)
    for other, result in zip(others, results, strict=True):
      result.replayed += record.replayed
      comparer = _Comparer(record, other, result)
      result.logits.add(logits, other.model.run(ids, comparer.on_quantizer, comparer.on_layer))
      comparer.finish()
  return results
