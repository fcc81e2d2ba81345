"""Bias correction: quantization shifts the mean of a layer's outputs, and the bias can take the shift back.

E[y_q] - E[y] = Q(W) E[x_q] - W E[x], E over calibration tokens; with x_q = x it is (Q(W) - W) E[x]. The new bias is b minus that shift.

References: Nagel et al., 2019, arXiv:1906.04721, section 4.2. We take E[x] from calibration data (the paper's "empirical" form), not from
batch normalisation.
"""

from __future__ import annotations

import numpy as np


def output_shift(
  weight: np.ndarray, quantized_weight: np.ndarray, mean: np.ndarray, quantized_mean: np.ndarray | None = None
) -> np.ndarray:
  """How far quantization moves the mean of each output: Q(W) E[x_q] - W E[x].

  Args:
    weight: [N, K].
    quantized_weight: [N, K], Q(W).
    mean: [K] mean of the float input, E[x].
    quantized_mean: [K] mean of the input that the quantized layer gets, E[x_q]; None where that is E[x].

  Returns:
    [N] float64.

  Raises:
    ValueError: shapes that do not fit.
  """
  means = [mean] if quantized_mean is None else [mean, quantized_mean]
  if weight.ndim != 2 or weight.shape != quantized_weight.shape or any(np.shape(m) != weight.shape[1:] for m in means):
    shapes = ", ".join(str(list(np.shape(a))) for a in (weight, quantized_weight, *means))
    raise ValueError(f"shapes {shapes} do not fit; need a weight and its quantized self [N, K], and means [K]")
  w, q = weight.astype(np.float64), quantized_weight.astype(np.float64)
  shift = (q - w) @ np.asarray(mean, np.float64)
  if quantized_mean is not None:
    shift += q @ (np.asarray(quantized_mean, np.float64) - np.asarray(mean, np.float64))
  return shift


def corrected_bias(
  bias: np.ndarray | None,
  weight: np.ndarray,
  quantized_weight: np.ndarray,
  mean: np.ndarray,
  quantized_mean: np.ndarray | None = None,
) -> np.ndarray:
  """The bias with which the mean output is the float layer's: bias - `output_shift`. [N] float32; None counts as zeros."""
  shift = output_shift(weight, quantized_weight, mean, quantized_mean)
  return ((0.0 if bias is None else np.asarray(bias, np.float64)) - shift).astype(np.float32)
