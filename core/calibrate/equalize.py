"""Cross-layer equalization: two layers in a row share out their ranges, channel by channel.

y = W2 f(W1 x + b1), f with f(c z) = c f(z) for c > 0 (ReLU, leaky ReLU, none). With s_i = sqrt(r1_i r2_i) / r2_i, r1_i the largest |W1| of
row i and r2_i the largest |W2| of column i, the layers W1 / s, b1 / s and W2 s compute the same, and both ranges become sqrt(r1_i r2_i).

References: Nagel et al., 2019, arXiv:1906.04721, section 4.1. We take r as the largest magnitude (half the paper's symmetric range), leave
channels alone whose range is 0, and do not absorb high biases.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Equalized(NamedTuple):
  """Two layers after equalization.

  Attributes:
    scale: [N1] float32, s.
    w1: W1 / s, float32.
    b1: b1 / s, or None.
    w2: W2 s.
  """

  scale: np.ndarray
  w1: np.ndarray
  b1: np.ndarray | None
  w2: np.ndarray


def equalize(w1: np.ndarray, b1: np.ndarray | None, w2: np.ndarray) -> Equalized:
  """Equal ranges for the channels between two layers.

  Args:
    w1: [N1, K1] or [N1, K1, ...], the first layer's weight.
    b1: [N1] its bias, or None.
    w2: [N2, N1] or [N2, N1, ...], the second layer's.

  Raises:
    ValueError: shapes that do not fit.
  """
  scale = equalizing_scale(w1, w2)
  if b1 is not None and np.shape(b1) != scale.shape:
    raise ValueError(f"bias of shape {list(np.shape(b1))} does not fit a weight of {len(scale)} outputs; need [{len(scale)}]")
  s = scale.astype(np.float64)
  first = (w1 / s.reshape(-1, *[1] * (w1.ndim - 1))).astype(np.float32)
  second = (w2 * s.reshape(1, -1, *[1] * (w2.ndim - 2))).astype(np.float32)
  return Equalized(scale, first, None if b1 is None else (b1 / s).astype(np.float32), second)


def equalizing_scale(w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
  """s = sqrt(r1 r2) / r2 = sqrt(r1 / r2); exactly 1 where r1 or r2 is 0 or not finite. [N1] float32.

  Raises:
    ValueError: the second weight does not take as many inputs as the first has outputs.
  """
  if w1.ndim < 2 or w2.ndim < 2 or w2.shape[1] != w1.shape[0]:
    raise ValueError(f"weights of shapes {list(w1.shape)} and {list(w2.shape)} are not consecutive; need [N1, K1, ...] and [N2, N1, ...]")
  r1 = np.abs(w1.astype(np.float64)).reshape(len(w1), -1).max(axis=1, initial=0)
  r2 = np.abs(np.moveaxis(w2, 1, 0).astype(np.float64)).reshape(len(w1), -1).max(axis=1, initial=0)
  live = (r1 > 0) & (r2 > 0) & np.isfinite(r1) & np.isfinite(r2)
  return np.where(live, np.sqrt(np.where(live, r1, 1) / np.where(live, r2, 1)), 1).astype(np.float32)
