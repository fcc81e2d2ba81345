"""SmoothQuant: loud input channels are made quieter and their weights louder, so that both quantize well.

p_j = w_j^(1 - alpha) / x_j^alpha with x_j = max over tokens |X_j| and w_j = max over rows |W_ij|; the layer computes (x p)(W / p)^T. With
alpha = 1 (ModelOpt's default) every channel's input amax is 1, with alpha = .5 (the paper's) both sides are balanced, with alpha = 0 every
column's weight amax is 1.

Where we leave ModelOpt 0.47: a dead channel (x_j = 0 or w_j = 0) gets p_j = 1; there it gets 1e4, or an IndexError.

References: Xiao et al., 2023, arXiv:2211.10438 (s_j = 1 / p_j; the paper's alpha).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.calibrate.scale_search import (
  SCALE_LEAST,
  SCALE_MOST,
  ScaleSearch,
  Specs,
  alpha_grid,
  check_group,
  hessian_loss,
  sample_loss,
  search_alpha_grid,
)


def weight_amax(weights: Sequence[np.ndarray]) -> np.ndarray:
  """Largest magnitude of each input channel over all rows of all weights of a group. [K] float32."""
  return np.max([np.abs(weight).max(axis=0, initial=0) for weight in weights], axis=0).astype(np.float32)


def smooth_scale(act_amax: np.ndarray, weight_amax: np.ndarray, alpha: float = 1.0) -> np.ndarray:
  """pre_quant_scale, p = w^(1 - alpha) / x^alpha, within [1e-4, 1e4]; exactly 1 where x or w is 0 or not finite.

  Args:
    act_amax: [K] amax of each input channel, x.
    weight_amax: [K] amax of each channel over all rows of all weights that read the input, w.
    alpha: 0 to 1.

  Returns:
    [K] float32.

  Raises:
    ValueError: alpha outside 0 to 1, or shapes that differ.
  """
  x, w = np.asarray(act_amax, np.float64), np.asarray(weight_amax, np.float64)
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha is {alpha}; allowed is 0 (all by the weight) to 1 (all by the activation)")
  if x.shape != w.shape or x.ndim != 1:
    raise ValueError(f"act_amax has shape {list(x.shape)} and weight_amax {list(w.shape)}; both are [K]")
  live = (x > 0) & (w > 0) & np.isfinite(x) & np.isfinite(w)
  x, w = np.where(live, x, 1), np.where(live, w, 1)
  return np.where(live, np.clip(w ** (1 - alpha) / x**alpha, SCALE_LEAST, SCALE_MOST), 1).astype(np.float32)


def search_alpha(
  weights: Sequence[np.ndarray],
  weight_specs: Sequence[Specs],
  act_amax: np.ndarray,
  *,
  samples: np.ndarray | None = None,
  hessian: np.ndarray | None = None,
  input_specs: Specs = (),
  alphas: Sequence[float] | None = None,
) -> ScaleSearch:
  """The alpha whose quantized layers' outputs err least; ModelOpt has one fixed alpha for the whole model.

  Error: mean over samples of |Q(x p) Q(W / p)^T - x W^T|^2 over all outputs of the group, the static input amax being max(act_amax * p).
  Without samples, inputs count as not quantized and the Hessian gives the same mean over all tokens. Ties go to the smallest alpha, and to
  no scale at all before any alpha.

  Args:
    weights: [N_i, K] each, all that read this input.
    weight_specs: formats of each weight, in order of application.
    act_amax: [K].
    samples: [S, K] inputs.
    hessian: [K, K] mean of x x^T, where there are no samples.
    input_specs: formats of the input; used with samples.
    alphas: candidates; None is 0, .05, ..., 1.

  Raises:
    ValueError: neither samples nor a Hessian, input formats without samples, or shapes that do not fit.
  """
  check_group(weights, weight_specs, act_amax=act_amax, samples=samples, hessian=hessian)
  if samples is not None:
    loss = sample_loss(weights, weight_specs, samples, act_amax, input_specs)
  elif hessian is not None and not input_specs:
    loss = hessian_loss(weights, weight_specs, hessian)
  else:
    raise ValueError("search_alpha needs samples [S, K] of the input (a Hessian does where the input is not quantized); got none")
  top = weight_amax(weights)
  return search_alpha_grid(alpha_grid(0.05) if alphas is None else alphas, lambda a: smooth_scale(act_amax, top, a), loss, len(top))
