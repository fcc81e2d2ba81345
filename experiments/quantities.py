"""What both backends' adapters speak in: plain numpy, so that an experiment compares without knowing either framework."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from core import QuantSpec, blocks
from core.config.schema import QuantizerConfig


class Leaf(NamedTuple):
  """One quantizer's specification and calibrated state.

  Attributes:
    config: its configuration.
    amax: float32, torch's axes; None where it is taken from each input.
    tensor_amax: float32 [], for two-level scales with given block amax.
  """

  config: QuantizerConfig
  amax: np.ndarray | None
  tensor_amax: np.ndarray | None

  @property
  def spec(self) -> QuantSpec:
    return self.config.spec

  def amax_for(self, shape: tuple[int, ...]) -> np.ndarray | None:
    """amax as `core.quantize` takes it for a tensor of that shape: a static block scale is shared over the axes in front."""
    amax, spec = self.amax, self.spec
    if amax is None or spec.blocks is None or not amax.ndim or (spec.two_level and spec.dynamic):
      return amax
    target = blocks.tiling(shape, spec).scales
    return np.broadcast_to(amax, (2, *target) if spec.zero_point else target)


class Codes(NamedTuple):
  """Stored codes and scales of one tensor, as numpy arrays; see `core.QuantizedTensor`."""

  codes: np.ndarray
  scale: np.ndarray
  tensor_scale: np.ndarray | None
  zero_point: np.ndarray | None

  def scale_parts(self) -> list[np.ndarray]:
    """Everything stored beside the codes."""
    return [part for part in (self.scale, self.tensor_scale, self.zero_point) if part is not None]


class Weight(NamedTuple):
  """One quantized weight.

  Attributes:
    name: the quantizer's dotted name.
    before: the weight in torch's layout, the backend's own array.
    after: the weight that the model computes with, torch's layout, the backend's own array.
    leaves: the quantizers, one after the other.
  """

  name: str
  before: Any
  after: Any
  leaves: tuple[Leaf, ...]


class QuantizedModel(Protocol):
  """A quantized model of either backend."""

  backend: str

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    """Token ids [B, T] to logits [B, T, V], or to the last hidden state for an encoder."""
    ...

  def leaves(self) -> dict[str, tuple[Leaf, ...]]:
    """Enabled quantizers by dotted name, in the order of the alphabet."""
    ...

  def weights(self) -> Iterator[Weight]:
    """Every quantized weight, one at a time."""
    ...

  def fold(self) -> None:
    """Put the quantized weights in the place of the weights."""
    ...


def differing(a: np.ndarray, b: np.ndarray) -> int:
  """Number of elements whose bits differ; every element, where the shapes do.

  Raises:
    TypeError: the types differ.
  """
  a, b = np.asarray(a), np.asarray(b)
  if a.dtype != b.dtype:
    raise TypeError(f"cannot compare bits of {a.dtype} with {b.dtype}")
  if a.shape != b.shape:
    return max(a.size, b.size)
  kind = np.dtype(f"i{a.dtype.itemsize}")
  return int(np.count_nonzero(np.ascontiguousarray(a).view(kind) != np.ascontiguousarray(b).view(kind)))
