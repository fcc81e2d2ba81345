"""Layer and Change: what a calibration algorithm is given of one layer, and what it returns.

Letters: N outputs, K inputs, T tokens. A weight is [N, K] (a convolution's [N, K, ...]); activations are [T, K].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

import core
from core.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer with a weight.

  Attributes:
    name: dotted path of its module, in torch's spelling: "model.layers.0.self_attn.q_proj".
    weight: [N, K] or [N, K, ...] float32, torch's layout.
    specs: formats of the enabled weight quantizers, in the order in which they are applied; () where the weight is not quantized.
    input_specs: the same of the input.
    amax: calibrated amax of the first weight quantizer, as `core.amax(weight, specs[0])` shapes it; None where it is taken from the weight.
    tensor_amax: [] float32, the amax behind the tensor scale of a static two-level format; else None.
    input_amax: calibrated amax of the first input quantizer, or None.
    bias: [N] float32, or None.
    linear: whether inputs are feature vectors on their last axis, so that there are statistics [T, K] of them (not a convolution).
    statistics: what the algorithm asked for, by name (`core.calibrate.statistics`); "tokens" is always there.
  """

  name: str
  weight: np.ndarray
  specs: tuple[QuantSpec, ...] = ()
  input_specs: tuple[QuantSpec, ...] = ()
  amax: np.ndarray | None = None
  tensor_amax: np.ndarray | None = None
  input_amax: np.ndarray | None = None
  bias: np.ndarray | None = None
  linear: bool = True
  statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def spec(self) -> QuantSpec:
    """Format of the first weight quantizer.

    Raises:
      ValueError: the weight is not quantized.
    """
    if not self.specs:
      raise ValueError(f"the weight of {self.name!r} is not quantized; enable its weight_quantizer first")
    return self.specs[0]

  @property
  def tokens(self) -> int:
    """Number of tokens that reached this layer in calibration."""
    return int(self.statistics.get("tokens", 0))

  def quantized(
    self, weight: np.ndarray | None = None, amax: np.ndarray | None = None, tensor_amax: np.ndarray | None = None
  ) -> np.ndarray:
    """A weight (this layer's by default) after its first quantizer. float32."""
    return core.fake_quantize(self.weight if weight is None else weight, self.spec, amax, tensor_amax=tensor_amax)


@dataclasses.dataclass
class Change:
  """What becomes of one layer; None leaves a thing as it is.

  Attributes:
    weight: new weight, the shape of the old one. With `pre_quant_scale` it holds the compensation: weight * (1 / pre_quant_scale).
    amax: new amax of the first weight quantizer; where a new weight comes without it, amax is taken from that weight.
    tensor_amax: with `amax` of a static two-level format.
    pre_quant_scale: [K] float32 factor on the input before it is quantized.
    input_amax: new amax of the first input quantizer.
    low_rank: (a [r, K], b [N, r]) float32: the layer adds b (a x) of the unquantized (scaled) input x.
    bias: [N] new bias of a layer that has one.
    report: figures for the per-layer table, such as {"alpha": 0.5, "error_before": ..., "error": ...}.
  """

  weight: np.ndarray | None = None
  amax: np.ndarray | None = None
  tensor_amax: np.ndarray | None = None
  pre_quant_scale: np.ndarray | None = None
  input_amax: np.ndarray | None = None
  low_rank: tuple[np.ndarray, np.ndarray] | None = None
  bias: np.ndarray | None = None
  report: dict[str, Any] = dataclasses.field(default_factory=dict)


def output_error(difference: np.ndarray, hessian: np.ndarray) -> np.ndarray:
  """Mean squared output error of each row of a weight difference: (d H d^T) per row, H = mean of x x^T.

  Args:
    difference: [N, K].
    hessian: [K, K].

  Returns:
    [N] float64, never negative.
  """
  return np.maximum(np.einsum("nk,nk->n", difference @ hessian, difference, dtype=np.float64), 0.0)
