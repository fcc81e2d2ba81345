"""AWQ: channels with large inputs get finer weights (a scale per input channel, "lite"); blocks are clipped where that errs less ("clip").

Where we leave ModelOpt 0.47:
- the loss is over all calibration tokens, from one pass and one Hessian; there a second pass evaluates every alpha on every batch. With
  quantized inputs (W4A8, NVFP4 W4A4) it is over samples, and one scale serves all layers that read one input.
- no scale at all is a candidate, so the result is never worse than max in this loss; no alpha of the grid is the identity.
- s is normalised over live channels; a dead channel (no input, or no weight) has s = 1. There, one dead channel moves all scales by 1e2.
- all quantizers of a weight take part (ModelOpt: the first of several).
- clip judges a block by d_b H_bb d_b^T over all tokens (ModelOpt: by at most about 127 tokens a batch).

References: Lin et al., 2023, arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core import blocks
from core.calibrate.local_hessian import block_hessians, hessian_block, hessian_error
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
from core.calibrate.weight_search import SearchResult, mse_search
from core.spec import QuantSpec

TINY = float(np.finfo(np.float32).tiny)


def weight_stat(weights: Sequence[np.ndarray], specs: Sequence[Specs]) -> np.ndarray:
  """Mean over the rows of all weights of |W_ij| / (amax of its block + tiny). [K] float64.

  The block is that of the first format along the last axis (a last block need not be full); the whole row for formats without blocks.
  """
  total, rows = np.zeros(weights[0].shape[1]), 0
  for weight, mine in zip(weights, specs, strict=True):
    magnitude = np.abs(np.asarray(weight, np.float64))
    width = weight.shape[1]
    size = block_size(weight.shape, mine[0]) if mine else width
    starts = np.arange(0, width, size)
    top = np.repeat(np.maximum.reduceat(magnitude, starts, axis=1), np.diff([*starts, width]), axis=1)
    total += (magnitude / (top + TINY)).sum(axis=0)
    rows += len(weight)
  return total / max(rows, 1)


def block_size(shape: tuple[int, ...], spec: QuantSpec) -> int:
  """Neighbouring inputs of a row that share a scale: the format's block on the last axis, else the row."""
  sizes = {blocks.normalize_axis(axis, shape): size for axis, size in spec.blocks or ()}
  return min(sizes.get(len(shape) - 1) or shape[-1], shape[-1])


def awq_scale(mean_abs: np.ndarray, weight_stat: np.ndarray, alpha: float) -> np.ndarray:
  """Factor on the weight's columns, s = clamp(x^alpha / (w^(1 - alpha) + tiny), 1e-4, 1e4) / sqrt(max s * min s); 1 on dead channels.

  max and min are over live channels: those with x and w above 0 and finite.

  Args:
    mean_abs: [K] mean |X_j| over tokens, x.
    weight_stat: [K], w; see `weight_stat`.
    alpha: 0 to 1.

  Returns:
    [K] float64; pre_quant_scale is 1 / s.

  Raises:
    ValueError: alpha outside 0 to 1, or shapes that differ.
  """
  x, w = np.asarray(mean_abs, np.float64), np.asarray(weight_stat, np.float64)
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha is {alpha}; allowed is 0 (all by the weight) to 1 (all by the activation)")
  if x.shape != w.shape or x.ndim != 1:
    raise ValueError(f"mean_abs has shape {list(x.shape)} and weight_stat {list(w.shape)}; both are [K]")
  live = (x > 0) & (w > 0) & np.isfinite(x) & np.isfinite(w)
  if not live.any():
    return np.ones(len(x))
  x, w = np.where(live, x, 1), np.where(live, w, 1)
  s = np.clip(x**alpha / (w ** (1 - alpha) + TINY), SCALE_LEAST, SCALE_MOST)
  return np.where(live, s / np.sqrt(s[live].max() * s[live].min()), 1)


def search(
  weights: Sequence[np.ndarray],
  weight_specs: Sequence[Specs],
  mean_abs: np.ndarray,
  hessian: np.ndarray | None = None,
  *,
  alpha_step: float = 0.1,
  samples: np.ndarray | None = None,
  act_amax: np.ndarray | None = None,
  input_specs: Specs = (),
) -> ScaleSearch:
  """AWQ lite: the alpha, of 0, .1, ..., 1, whose scale gives the group's outputs the least squared error.

  Inputs not quantized: sum over weights and rows of d H d^T, d = Q(W s) / s - W: exactly the mean squared output error over all tokens.
  Inputs quantized: mean over samples of |Q(x / s) Q(W s)^T - x W^T|^2, the static input amax being max(act_amax / s).
  Ties go to no scale (alpha None), then to the smallest alpha.

  Args:
    weights: [N_i, K] each, all that read this input.
    weight_specs: formats of each weight, in order of application.
    mean_abs: [K] mean |x| over all tokens (ModelOpt: mean of the batches' means).
    hessian: [K, K] mean of x x^T; needed where inputs are not quantized.
    alpha_step: distance of the alphas.
    samples: [S, K] inputs; needed where inputs are quantized.
    act_amax: [K], with samples; None takes it from them.
    input_specs: formats of the input, () where it is not quantized.

  Raises:
    ValueError: the Hessian or the samples are missing, or shapes do not fit.
  """
  check_group(weights, weight_specs, mean_abs=mean_abs, hessian=hessian, samples=samples, act_amax=act_amax)
  if input_specs:
    if samples is None:
      raise ValueError("AWQ with quantized inputs needs samples [S, K] of them; got None; ask for the statistic 'samples'")
    loss = sample_loss(weights, weight_specs, samples, np.abs(samples).max(axis=0) if act_amax is None else act_amax, input_specs)
  else:
    if hessian is None:
      raise ValueError("AWQ needs the Hessian [K, K] of the inputs; got None; ask for the statistic 'hessian'")
    loss = hessian_loss(weights, weight_specs, hessian)
  stat = weight_stat(weights, weight_specs)
  return search_alpha_grid(alpha_grid(alpha_step), lambda a: (1 / awq_scale(mean_abs, stat, a)).astype(np.float32), loss, len(stat))


def clip_search(
  weight: np.ndarray,
  spec: QuantSpec,
  hessian: np.ndarray,
  *,
  min_clip_ratio: float = 0.5,
  shrink_step: float = 0.05,
  amax: np.ndarray | None = None,
  tensor_amax: np.ndarray | None = None,
) -> SearchResult:
  """AWQ clip: every block's amax times the ratio, of 1, .95, ..., .5, with the least d_b H_bb d_b^T; ties go to the ratio nearest 1.

  A format with one scale per row takes the row as its block; one with one scale per tensor, or dynamic NVFP4 (its tensor amax), is clipped
  by the error of the whole output, d H d^T summed over rows. A static power-of-two scale tries 1/2, 1 and 2. Dynamic one-level formats (MX)
  take no amax: the result's amax is None and its note says so.

  Args:
    weight: [N, K] float32, after its pre_quant_scale.
    spec: format of the weight.
    hessian: [K, K] mean of x x^T of what the weight meets: the scaled input (`scaled_hessian`), quantized or not.
    min_clip_ratio: least ratio, 0 < r <= 1.
    shrink_step: distance of ratios, at most.
    amax: amax to start from; None takes the weight's.
    tensor_amax: [] for static two-level formats; it is not searched.

  Returns:
    SearchResult; `multiplier` is the ratio.

  Raises:
    ValueError: a ratio out of range, or a Hessian that does not fit.
  """
  if not 0 < min_clip_ratio <= 1:
    raise ValueError(f"min_clip_ratio is {min_clip_ratio}; a number above 0 and up to 1 is needed")
  check_group([weight], [(spec,)], hessian=hessian)
  if spec.dynamic and not spec.two_level:
    return mse_search(weight, spec)  # nothing to clip; its note says why
  whole = spec.two_level and spec.dynamic
  size = weight.shape[1] if whole else hessian_block(weight.shape, spec, None)
  return mse_search(
    weight,
    spec,
    amax=amax,
    tensor_amax=tensor_amax,
    start_multiplier=min_clip_ratio,
    stop_multiplier=1.0,
    step_size=shrink_step,
    error=hessian_error(block_hessians(hessian, size)),
  )
