"""Both models run on their own, and every activation code of the one is compared with that of the other.

In float32 the matmuls round differently, one flipped code moves everything behind it, and the runs drift apart. With a float64 carrier,
everything outside the quantizers is float64 while the quantizers still decide in float32 from the rounded input: the order of summation
and the last bits of exponentials no longer reach a decision, and the codes of a whole model can be compared one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.quantities import Codes, Leaf, differing

Leaves = Mapping[str, tuple[Leaf, ...]]
Observer = Callable[[str, Any, Any, Any], None]


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
    replayed: codes of the first model that do not decode to what its quantizer returned; 0, or the codes are not those in use.
  """

  quantizers: dict[str, Count] = dataclasses.field(default_factory=dict)
  layers: dict[str, Distance] = dataclasses.field(default_factory=dict)
  logits: Distance = dataclasses.field(default_factory=Distance)
  untold: list[str] = dataclasses.field(default_factory=list)
  replayed: int = 0

  @property
  def total(self) -> Count:
    return Count(*(sum(getattr(c, f.name) for c in self.quantizers.values()) for f in dataclasses.fields(Count)))


class _Recorder:
  """Codes and layer outputs of one window; codes take a byte each."""

  def __init__(self, adapter: Any, leaves: Leaves, checker: Observer | None) -> None:
    self.codes: dict[str, list[Codes]] = {}
    self.layers: dict[str, list[np.ndarray]] = {}
    self.replayed = 0
    self._adapter, self._leaves, self._checker = adapter, leaves, checker

  def on_quantizer(self, name: str, quantizer: Any, x: Any, y: Any) -> None:
    found = encode_checked(self._adapter, self._leaves[name], quantizer, x, y)
    self.replayed += found[1]
    self.codes.setdefault(name, []).append(found[0])
    if self._checker is not None:
      self._checker(name, quantizer, x, y)

  def on_layer(self, name: str, output: Any) -> None:
    self.layers.setdefault(name, []).append(np.asarray(output).copy())


def encode_checked(adapter: Any, leaves: tuple[Leaf, ...], quantizer: Any, x: Any, y: Any) -> tuple[Codes, int]:
  """Codes of x, and how many of them do not decode to y, the value that the model went on with (not counted with a bias or rotation)."""
  codes = adapter.encode(adapter.prepare(quantizer, x), leaves)
  config = leaves[-1].config
  if config.bias is not None or config.rotate is not None:
    return codes, 0
  return codes, differing(np.asarray(adapter.decode(codes, leaves[-1].spec, y)), np.asarray(y))


def compare(
  first: Any,
  second: Any,
  adapters: tuple[Any, Any],
  windows: list[np.ndarray],
  leaves: tuple[Leaves, Leaves],
  checker: Observer | None = None,
) -> Comparison:
  """Run two quantized models on their own and compare codes, layer outputs and logits, window by window.

  Args:
    first: quantized model.
    second: quantized model.
    adapters: the modules `on_torch` or `on_jax` that belong to them.
    windows: batches of token ids.
    leaves: the calibrated state that each of them quantizes with.
    checker: also called with (name, quantizer, x, y) of every activation quantizer of the first.
  """
  result = Comparison()
  for ids in windows:
    record = _Recorder(adapters[0], leaves[0], checker)
    logits = first.run(ids, record.on_quantizer, record.on_layer)
    result.replayed += record.replayed
    against = _Comparer(record, adapters[1], leaves[1], result)
    result.logits.add(logits, second.run(ids, against.on_quantizer, against.on_layer))
    result.replayed += against.replayed
    result.untold += [name for name, left in record.codes.items() if left]
  result.untold = sorted(set(result.untold))
  return result


class _Comparer:
  """Takes codes and layer outputs as the second model produces them, and drops the first one's."""

  def __init__(self, record: _Recorder, adapter: Any, leaves: Leaves, result: Comparison) -> None:
    self.replayed = 0
    self._record, self._adapter, self._leaves, self._result = record, adapter, leaves, result

  def on_quantizer(self, name: str, quantizer: Any, x: Any, y: Any) -> None:
    found, replayed = encode_checked(self._adapter, self._leaves[name], quantizer, x, y)
    self.replayed += replayed
    waiting = self._record.codes.get(name)
    if not waiting:
      self._result.untold.append(name)
      return
    self._result.quantizers.setdefault(name, Count()).add(waiting.pop(0), found)

  def on_layer(self, name: str, output: Any) -> None:
    waiting = self._record.layers.get(name)
    if waiting:
      self._result.layers.setdefault(name, Distance()).add(waiting.pop(0), np.asarray(output))
