"""What SmoothQuant and AWQ share: a factor per input channel, undone in the weights, judged by the error of the layers' outputs.

A group is the layers that read one input (q, k, v): weights [N_i, K] and one pre_quant_scale [K]. With p = pre_quant_scale the layers
compute Q(x * p) Q(W * (1 / p))^T in place of x W^T. Every error here is a mean over tokens of the squared output error, summed over
all outputs of the group, whether it comes from a Hessian or from samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

import core
from core.calibrate.layer import output_error
from core.spec import QuantSpec

SCALE_LEAST, SCALE_MOST = 1e-4, 1e4  # factors stay within, as in ModelOpt

Specs = Sequence[QuantSpec]
Loss = Callable[[np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class ScaleSearch:
  """What a search over alpha found.

  Attributes:
    alpha: the exponent of least error; None where no alpha is better than leaving the input as it is.
    pre_quant_scale: [K] float32; ones where alpha is None.
    losses: alpha -> error.
    error_before: error without a scale.
    error: error with `pre_quant_scale`; never above `error_before`.
  """

  alpha: float | None
  pre_quant_scale: np.ndarray
  losses: dict[float, float]
  error_before: float
  error: float


def search_alpha_grid(alphas: Iterable[float], scale_of: Callable[[float], np.ndarray], loss: Loss, channels: int) -> ScaleSearch:
  """The alpha of least loss. No scale at all is a candidate too and wins ties; among alphas the first of equals (or of NaN) wins.

  Args:
    alphas: candidates, in order.
    scale_of: alpha -> pre_quant_scale [K].
    loss: pre_quant_scale -> error.
    channels: K.

  Raises:
    ValueError: an alpha outside 0 to 1.
  """
  best = np.ones(channels, np.float32)
  before = least = loss(best)
  chosen, losses = None, {}
  for alpha in alphas:
    if not 0 <= alpha <= 1:
      raise ValueError(f"alpha is {alpha}; allowed is 0 (all by the weight) to 1 (all by the activation)")
    scale = scale_of(alpha)
    losses[alpha] = loss(scale)
    if losses[alpha] < least:
      chosen, best, least = alpha, scale, losses[alpha]
  return ScaleSearch(chosen, best, losses, before, least)


def alpha_grid(step: float) -> list[float]:
  """0, step, 2 step, ... up to 1.

  Raises:
    ValueError: a step outside (0, 1].
  """
  if not 0 < step <= 1:
    raise ValueError(f"alpha_step is {step}; a number above 0 and up to 1 is needed")
  return [round(i * step, 10) for i in range(int(1 / step + 1e-9) + 1)]


def compensated(weight: np.ndarray, pre_quant_scale: np.ndarray) -> np.ndarray:
  """The weight that undoes a pre_quant_scale: weight * (1 / pre_quant_scale), both float32. [N, K]."""
  return np.asarray(weight, np.float32) * (np.float32(1) / np.asarray(pre_quant_scale, np.float32))


def scaled_hessian(hessian: np.ndarray, pre_quant_scale: np.ndarray) -> np.ndarray:
  """Mean of x x^T of the scaled input x * pre_quant_scale. [K, K]."""
  return hessian * np.outer(pre_quant_scale, pre_quant_scale).astype(hessian.dtype)


def quantized_weight(weight: np.ndarray, specs: Specs) -> np.ndarray:
  """A weight after its quantizers, in order, each with the amax of what it is given. float32."""
  for spec in specs:
    weight = core.fake_quantize(weight, spec.replace(rounding="nearest"))
  return weight


def quantized_input(x: np.ndarray, specs: Specs, act_amax: np.ndarray) -> np.ndarray:
  """Inputs after their quantizers. float32.

  Args:
    x: [S, K] scaled inputs.
    specs: input formats, in order.
    act_amax: [K] amax of the scaled inputs over all calibration tokens. Static formats take their amax from it (per tensor: the largest;
      per channel: each), and so does the tensor scale of dynamic two-level formats; all else is taken from x.
  """
  for index, spec in enumerate(specs):
    amax = input_amax(spec, act_amax) if index == 0 else None
    x = core.fake_quantize(x, spec.replace(rounding="nearest"), amax)
  return x


def input_amax(spec: QuantSpec, act_amax: np.ndarray) -> np.ndarray | None:
  """Static amax of an input format from the amax of each channel, or None where the format takes it from the input or needs more."""
  if spec.two_level and spec.dynamic:
    return np.asarray(np.max(act_amax), np.float32)
  if spec.dynamic or spec.blocks is not None or spec.zero_point:
    return None
  if spec.axis is None:
    return np.asarray(np.max(act_amax), np.float32)
  return np.asarray(act_amax, np.float32)[None] if spec.axis in ((-1,), (1,)) else None


def hessian_loss(weights: Sequence[np.ndarray], specs: Sequence[Specs], hessian: np.ndarray) -> Loss:
  """Error as a function of pre_quant_scale where inputs are not quantized: sum over rows of d H d^T, d = Q(W / p) * p - W.

  This is the mean over every calibration token, however many, from one Hessian.
  """
  hessian = np.asarray(hessian, np.float32)

  def loss(scale: np.ndarray) -> float:
    total = 0.0
    for weight, mine in zip(weights, specs, strict=True):
      difference = quantized_weight(compensated(weight, scale), mine) * scale - weight
      total += float(output_error(difference, hessian).sum())
    return total

  return loss


def sample_loss(
  weights: Sequence[np.ndarray], specs: Sequence[Specs], samples: np.ndarray, act_amax: np.ndarray, input_specs: Specs
) -> Loss:
  """Error as a function of pre_quant_scale where inputs are quantized: mean over samples of |Q(x p) Q(W / p)^T - x W^T|^2."""
  samples = np.asarray(samples, np.float32)
  expected = [samples @ weight.T for weight in weights]

  def loss(scale: np.ndarray) -> float:
    x = quantized_input(samples * scale, input_specs, np.asarray(act_amax, np.float32) * scale)
    total = 0.0
    for weight, mine, y in zip(weights, specs, expected, strict=True):
      difference = (x @ quantized_weight(compensated(weight, scale), mine).T - y).ravel()
      total += float(np.dot(difference, difference))
    return total / max(len(samples), 1)

  return loss


def check_group(weights: Sequence[np.ndarray], specs: Sequence[Specs], **channels: np.ndarray | None) -> None:
  """The weights of a group, their formats and statistics fit together.

  Raises:
    ValueError: they do not.
  """
  if not weights or len(weights) != len(specs):
    raise ValueError(f"{len(weights)} weights with {len(specs)} lists of formats; give at least one weight, and as many lists as weights")
  width = weights[0].shape[-1]
  for weight in weights:
    if weight.ndim != 2 or weight.shape[1] != width:
      raise ValueError(f"weight of shape {list(weight.shape)} in a group of {width} inputs; all weights of a group are [N, {width}]")
  for name, value in channels.items():
    if value is not None and np.shape(value)[-1] != width:
      raise ValueError(f"{name} has shape {list(np.shape(value))} for weights of {width} inputs; its last axis must be {width} long")
