"""HQQ: scales and zero points without data, by a robust error: sum of |W - Q(W)|^p with p < 1, which a few outliers do not rule.

Half-quadratic splitting: min over e, s, z of sum |e|^p + beta / 2 |W - s (q - z) - e|^2, in turns:
  q = round(W / s + z), clipped;  e = shrink(W - s (q - z)), shrink(d) = sign(d) max(|d| - |d|^(p - 1) / beta, 0);
  z = mean(q - (W - e) / s);  s = <q - z, W - e> / <q - z, q - z>;  beta = kappa beta.

Where we leave the paper:
- its zero point is a float and its step stays fixed. Ours is an integer code, as `core` stores it, and one code further moves every level
  by a step: from max the update of z mostly rounds back to where it was, and with a fixed step nothing is gained (measured: the p-error of
  INT4, block 64, falls by less than 1e-8). So s is fitted too, by least squares to W - e; symmetric formats, which have no z, fit s alone.
  (Keeping z a float between the turns and rounding only what is kept: 2 to 17 % more squared error at 2 to 4 bits, p-error 2 % less to 9 %
  more, on Student-t weights.)
- d is measured in steps of its group, so that the result does not depend on the unit of the weights (beta = 10 does, otherwise).
- of everything met, each group keeps what has the least p-error, the start (max) included: no group is worse than with max in this error.
  More iterations, or smaller steps to start from, lower it further and cost squared error: on the same weights, with a zero point, starts
  at .85 and .7 of max lower the p-error by 10 % in place of 4 % and double the squared error. So 20 iterations from max, as in the paper.

References: Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models", mobiusml.github.io/hqq_blog.
"""

from __future__ import annotations

import numpy as np

import core
from core import blocks, formats, rounding
from core.blocks import Tiling
from core.calibrate.weight_search import Error, SearchResult, group_error, nothing_to_search, start_amax
from core.formats import IntFormat
from core.spec import QuantSpec


def hqq_search(
  weight: np.ndarray,
  spec: QuantSpec,
  *,
  amax: np.ndarray | None = None,
  tensor_amax: np.ndarray | None = None,
  p: float = 0.7,
  beta: float = 10.0,
  kappa: float = 1.01,
  iterations: int = 20,
) -> SearchResult:
  """amax (for zero-point formats the range) of small sum |W - Q(W)|^p in every group.

  Stored scales (E4M3, E8M0, float16) round what the iteration finds; candidates are judged after that. Doubly quantized scales, where
  groups depend on each other, are kept only if the sum over the whole weight falls.

  Args:
    weight: [...] float32, finite.
    spec: a format with calibrated scales; others (dynamic) have nothing to search, and the result's note says so.
    amax: start; None takes `core.amax`.
    tensor_amax: [] for static two-level formats; it is not searched.
    p: exponent of the error, 0 < p <= 1.
    beta: weight of the quadratic term, in units of a step.
    kappa: its growth per iteration.
    iterations: rounds at most; it stops when no group improves.

  Returns:
    SearchResult, its errors being sums of |W - Q(W)|^p; `core.fake_quantize(weight, spec, amax, tensor_amax=tensor_amax)` is the result.

  Raises:
    ValueError: p, beta or kappa out of range.
  """
  if not (0 < p <= 1 and beta > 0 and kappa >= 1):
    raise ValueError(f"p {p}, beta {beta}, kappa {kappa} are not allowed; use 0 < p <= 1, beta > 0 and kappa >= 1")
  note = nothing_to_search(spec)
  if spec.two_level and spec.dynamic:
    note = "only the tensor scale of a dynamic two-level format is calibrated; hqq fits block scales; use mse or awq_clip"
  if note:
    return SearchResult(note=note)
  weight, spec = np.asarray(weight, np.float32), spec.replace(rounding="nearest")
  amax, tensor_amax = start_amax(weight, spec, amax, tensor_amax)
  error = _error(p)
  before = group_error(weight, spec, amax, tensor_amax, error)
  found = _iterate(weight, spec, amax, tensor_amax, p, beta, kappa, iterations)
  after = group_error(weight, spec, found, tensor_amax, error)
  better = np.full(after.shape, after.sum() < before.sum()) if spec.scale_format == formats.UINT8 else after < before
  best, least = np.where(better, found, amax), np.where(better, after, before)
  plain, chosen = (amax[1] - amax[0], best[1] - best[0]) if spec.zero_point else (amax, best)
  multiplier = np.where(plain > 0, chosen / np.where(plain > 0, plain, 1), 1).astype(np.float32)
  return SearchResult(best.astype(np.float32), tensor_amax, multiplier, before, least)


def shrink(difference: np.ndarray, p: float, beta: float) -> np.ndarray:
  """sign(d) max(|d| - |d|^(p - 1) / beta, 0), the generalised soft threshold; 0 stays 0."""
  size = np.abs(difference)
  return np.sign(difference) * np.maximum(size - np.where(size > 0, size, 1) ** (p - 1) / beta, 0)


def _iterate(weight, spec: QuantSpec, amax, tensor_amax, p: float, beta: float, kappa: float, iterations: int) -> np.ndarray:
  """The amax of least p-error that the iteration meets, per group."""
  tiling = blocks.tiling(weight.shape, spec)
  tiles = blocks.to_blocks(weight, tiling)
  real = blocks.to_blocks(np.ones(weight.shape, np.float32), tiling)  # 0 on padding
  scales = core.scales(amax, spec.replace(four_over_six=False), tensor_amax)
  step = blocks.expand(np.asarray(scales.step, np.float32), tiling)
  zero = blocks.expand(np.asarray(scales.zero_point, np.float32), tiling) if spec.zero_point else np.zeros(step.shape, np.float32)
  best_step, best_zero, least = step, zero, np.full(tiling.expanded, np.inf, np.float32)
  for _ in range(iterations):
    scaled = tiles / step
    level = _levels(scaled, zero, spec)
    error = _sum(np.abs(scaled - level) ** p, tiling) * step**p
    better = error < least
    if not better.any():
      break
    best_step, best_zero, least = np.where(better, step, best_step), np.where(better, zero, best_zero), np.where(better, error, least)
    target = scaled - shrink(scaled - level, p, beta)  # (W - e) / s
    if spec.zero_point:
      moved = _valid_zero(zero + _sum(level - target, tiling) / _sum(real, tiling), spec)
      level, zero = (level + zero - moved) * real, moved
    square = _sum(level * level, tiling)
    ratio = _sum(level * target, tiling) / np.where(square > 0, square, 1)
    step = np.where((square > 0) & (ratio > 0), step * ratio, step).astype(np.float32)
    beta *= kappa
  return np.where(scales.inv_step == 0, amax, _amax(best_step, best_zero, spec).reshape(amax.shape)).astype(np.float32)


def _levels(scaled: np.ndarray, zero: np.ndarray, spec: QuantSpec) -> np.ndarray:
  """q - z of W / s."""
  if not spec.zero_point:
    return np.asarray(rounding.to_level(scaled, spec.element))
  assert isinstance(spec.element, IntFormat)
  return np.clip(np.round(scaled), spec.element.min_code - zero, spec.element.max_code - zero)


def _valid_zero(zero: np.ndarray, spec: QuantSpec) -> np.ndarray:
  """The nearest code."""
  assert isinstance(spec.element, IntFormat)
  return np.clip(np.round(zero), spec.element.min_code, spec.element.max_code)


def _amax(step: np.ndarray, zero: np.ndarray, spec: QuantSpec) -> np.ndarray:
  """The amax, or the range (lo, hi), from which `core.scales` makes this step and zero point."""
  if not spec.zero_point:
    return step * np.float32(spec.element_bound)
  assert isinstance(spec.element, IntFormat)
  return np.stack([(spec.element.min_code - zero) * step, (spec.element.max_code - zero) * step])


def _sum(tiles: np.ndarray, tiling: Tiling) -> np.ndarray:
  return np.sum(tiles, axis=tiling.reduce).reshape(tiling.expanded)


def _error(p: float) -> Error:
  """The `error` hook of `group_error`: sum of |d|^p."""
  return lambda difference, tiling: np.sum(np.abs(difference) ** p, axis=tiling.reduce).reshape(tiling.scales)
