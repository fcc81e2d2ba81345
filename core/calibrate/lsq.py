"""LSQ: scales of a weight learned by descent on the layer's output error; dual LSQ: one step to round with, another to multiply with.

f(s) = tr((Q(W; s) - W) H (Q(W; s) - W)^T), H the mean of x x^T of the layer's input. LSQ's gradient of a quantized value by its step is
round(u) - u inside the grid, u = w / s, and the end level outside; it sets the derivative of rounding to 1 (straight through) and is no
true derivative, so it settles near the least error, not at it. We keep the best iterate.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

import core
from core import blocks, formats, rounding, scaling
from core.blocks import Tiling
from core.calibrate.adam import Adam, cosine
from core.calibrate.layer import output_error
from core.calibrate.weight_search import start_amax
from core.formats import CodebookFormat, IntFormat
from core.spec import QuantSpec

LEARN = ("post", "pre", "both")


@dataclasses.dataclass(frozen=True)
class LsqResult:
  """Learned scales.

  Attributes:
    amax: float32, shaped as `core.amax(weight, spec)`.
    tensor_amax: [] float32 under which it was learned, for two-level formats; else None.
    weight: [N, K] float32 that quantizes to itself at `amax`; None where the old weight is to be quantized (tied).
    error_before: [N] float64 output error of each row at the start (`output_error`; a sum of squares without a Hessian).
    error: the same of the result; its sum is not above that of `error_before`, and no row is above where rows have scales of their own.
  """

  amax: np.ndarray
  tensor_amax: np.ndarray | None
  weight: np.ndarray | None
  error_before: np.ndarray
  error: np.ndarray


def lsq_amax(weight: np.ndarray, spec: QuantSpec) -> np.ndarray:
  """LSQ's own start: step 2 E|w| / sqrt(Qp) of each group, as an amax (step * bound); Qp is the bound.

  References: Esser et al., 2020, arXiv:1902.08153, section 2.1.
  """
  weight = np.asarray(weight, np.float32)
  tiling = blocks.tiling(weight.shape, spec)
  total, count = _group_sum(np.abs(weight), tiling), _group_sum(np.ones_like(weight), tiling)
  return np.asarray(2 * total / count * math.sqrt(spec.element_bound), np.float32)


def lsq_gradient(scaled: np.ndarray, level: np.ndarray, low: float, high: float) -> np.ndarray:
  """LSQ's derivative of a quantized value by its step: level - u inside [low, high], the end level outside.

  Args:
    scaled: [...] u = w / s.
    level: [...] what u rounds to.
    low: lowest level, -Qn.
    high: highest level, Qp.

  References: Esser et al., 2020, arXiv:1902.08153, equation 3.
  """
  return level - np.where((scaled >= low) & (scaled <= high), scaled, 0)


def lsq(
  weight: np.ndarray,
  spec: QuantSpec,
  hessian: np.ndarray | None = None,
  *,
  amax: np.ndarray | None = None,
  tensor_amax: np.ndarray | None = None,
  steps: int = 100,
  lr: float = 0.02,
  learn: str = "post",
  tied_amax: bool = True,
  keep: str = "best",
) -> LsqResult:
  """Learns the amax of every group.

  Adam moves the ratio of each scale to its start, with a cosine from `lr` to 0, so `lr` is the relative change of a scale in the first
  step. LSQ scales the gradient by 1 / sqrt(N Qp); Adam is blind to such a factor, so none is applied. An E4M3 block scale is rounded in the
  forward pass and straight through in the backward one; the tensor scale stays.

  Without `tied_amax` (dual LSQ) the value is round(w / s_pre) * s_post. Where s_post is learned it is not descended but solved: with fixed
  codes f is quadratic in it (`fit_steps`). What is stored has one scale, so the result is the weight codes * s_post itself, at s_post.

  Args:
    weight: [N, K] float32.
    spec: static symmetric format with a float32 or two-level scale.
    hessian: [K, K]; None is the identity (the weight's squared error).
    amax: start; None takes `core.amax`. `mse_search` gives a better one; see also `lsq_amax`.
    tensor_amax: of two-level formats; None takes the largest of `amax`.
    steps: descents of s (tied) or s_pre.
    lr: see above.
    learn: dual only: "post", "pre" or "both".
    tied_amax: one scale for both.
    keep: "best" iterate, by true error, or the "last".

  Raises:
    ValueError: an option or a format that is not allowed.
  """
  _check(weight, spec, learn, keep)
  weight = np.asarray(weight, np.float32)
  amax, tensor_amax = start_amax(weight, spec, amax, tensor_amax)
  problem = _Problem(weight, spec, None if hessian is None else np.asarray(hessian, np.float32), tensor_amax)
  if tied_amax:
    return _tied(problem, amax, steps, lr, keep)
  return _dual(problem, amax, 0 if learn == "post" else steps, lr, learn != "pre", keep)


def dual_lsq(weight: np.ndarray, spec: QuantSpec, hessian: np.ndarray | None = None, **options) -> LsqResult:
  """`lsq` with tied_amax=False."""
  return lsq(weight, spec, hessian, tied_amax=False, **options)


def fit_steps(
  weight: np.ndarray, levels: np.ndarray, steps: np.ndarray, hessian: np.ndarray | None, spec: QuantSpec, tensor_amax=None, sweeps: int = 3
) -> np.ndarray:
  """Least squares of the steps for fixed levels: min over s of tr((L s - W) H (L s - W)^T), one block of columns after the other.

  For one block the minimum is s - sum(L (R H)) / sum(L (L H_bb)), R = L s - W; brought onto the format's scales (a quadratic's best grid
  point is the nearest one), no step of the sweep increases the error. A group as wide as the row is solved in one step.

  Args:
    weight: [N, K] float32.
    levels: [N, K] float32.
    steps: one per group, to start from.
    hessian: [K, K], or None for the identity.
    spec: specification.
    tensor_amax: [] for two-level formats.
    sweeps: passes over the columns.

  Returns:
    float32, the shape of `steps`.
  """
  n, k = weight.shape
  tiling = blocks.tiling(weight.shape, spec)
  unit_rows, unit_columns = _units(tiling)
  starts = np.arange(0, n, unit_rows)
  grid = np.array(steps, np.float32).reshape(len(starts), -1)
  residual = levels * _spread(grid, unit_rows, unit_columns, n, k) - weight
  pull = residual.copy() if hessian is None else residual @ hessian
  for _ in range(sweeps):
    for j in range(grid.shape[1]):
      part = slice(j * unit_columns, min((j + 1) * unit_columns, k))
      mine = levels[:, part]
      own = mine if hessian is None else mine @ hessian[part, part]
      bend = np.add.reduceat(np.sum(mine * own, axis=1, dtype=np.float64), starts)
      slope = np.add.reduceat(np.sum(mine * pull[:, part], axis=1, dtype=np.float64), starts)
      target = grid[:, j] - np.divide(slope, bend, out=np.zeros_like(slope), where=bend > 0)
      fitted = _storable(np.where(target * grid[:, j] > 0, target, grid[:, j]), spec, tensor_amax)
      fitted = np.where(bend > 0, fitted, grid[:, j])
      change = np.repeat(fitted - grid[:, j], unit_rows)[:n, None] * mine
      grid[:, j] = fitted
      if hessian is None:
        pull[:, part] += change
      else:
        pull += change @ hessian[part]
  return grid.reshape(np.shape(steps))


class _Problem:
  """One layer's error as a function of steps."""

  def __init__(self, weight: np.ndarray, spec: QuantSpec, hessian: np.ndarray | None, tensor_amax: np.ndarray | None) -> None:
    self.weight, self.spec, self.hessian, self.tensor_amax = weight, spec, hessian, tensor_amax
    self.tiling = blocks.tiling(weight.shape, spec)
    self.tiles = blocks.to_blocks(weight, self.tiling)
    self.low, self.high = _ends(spec)
    self.own_rows = len(self.tiling.scales) == 2 and self.tiling.scales[0] == len(weight)

  def scales(self, amax: np.ndarray) -> scaling.Scales:
    return scaling.scales(np.asarray(amax, np.float32), self.spec, self.tensor_amax)

  def levels(self, scales: scaling.Scales) -> tuple[np.ndarray, np.ndarray]:
    """(u, level), tiled."""
    u = self.tiles * blocks.expand(scales.inv_step, self.tiling)
    return u, rounding.to_level(u, self.spec.element)

  def error(self, level: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f of every row, pull = 2 (Q - W) H, tiled)."""
    residual = blocks.from_blocks(level * blocks.expand(step, self.tiling), self.tiling) - self.weight
    pull = residual if self.hessian is None else residual @ self.hessian
    return np.vecdot(residual, pull), blocks.to_blocks(2 * pull, self.tiling)

  def slope(self, tiles: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Derivative by the logarithm of the step, from one by the step of every element."""
    return np.sum(tiles, axis=self.tiling.reduce, dtype=np.float64).reshape(self.tiling.scales) * step

  def exact(self, value: np.ndarray) -> np.ndarray:
    difference = value.astype(np.float64) - self.weight
    return np.vecdot(difference, difference) if self.hessian is None else output_error(difference, self.hessian.astype(np.float64))

  def better(self, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Where to take the new error: [N, 1], or one bool for all where rows share scales."""
    return (new < old)[:, None] if self.own_rows else np.asarray(new.sum(dtype=np.float64) < old.sum(dtype=np.float64))


class _Ratios:
  """Ratios to the start, descended with Adam on their logarithm and a cosine schedule."""

  def __init__(self, shape: tuple[int, ...], steps: int, lr: float) -> None:
    self.ratio = np.ones(shape)
    self._adam = Adam(shape, np.float64, epsilon=1e-30)
    self._steps, self._lr, self._done = steps, lr, 0

  def step(self, gradient: np.ndarray) -> None:
    self.ratio = self.ratio * np.exp(-cosine(self._lr, self._done, self._steps) * self._adam.direction(gradient))
    self._done += 1


def _tied(problem: _Problem, start: np.ndarray, steps: int, lr: float, keep: str) -> LsqResult:
  ratios, best, found = _Ratios(start.shape, steps, lr), None, start
  for count in range(steps + 1):
    amax = np.asarray(start * ratios.ratio, np.float32)
    scales = problem.scales(amax)
    u, level = problem.levels(scales)
    rows, pull = problem.error(level, scales.step)
    better = True if best is None or keep == "last" else problem.better(rows, best)
    found = np.where(better, amax, found)
    best = rows if best is None else np.where(np.ravel(better), rows, best)
    if count < steps:
      ratios.step(problem.slope(pull * lsq_gradient(u, level, problem.low, problem.high), scales.step))
  before, after = (
    problem.exact(core.fake_quantize(problem.weight, problem.spec, a, tensor_amax=problem.tensor_amax)) for a in (start, found)
  )
  if keep == "best":
    worse = problem.better(before, after)
    found, after = np.where(worse, start, found), np.where(np.ravel(worse), before, after)
  return LsqResult(found.astype(np.float32), problem.tensor_amax, None, before, after)


def _dual(problem: _Problem, start: np.ndarray, steps: int, lr: float, fit: bool, keep: str) -> LsqResult:
  weight, spec, tiling = problem.weight, problem.spec, problem.tiling
  ratios = _Ratios(start.shape, steps, lr)
  first = problem.scales(start)
  post = first.step
  kept = (np.zeros(0), weight, post)
  for count in range(steps + 1):
    pre = problem.scales(np.asarray(start * ratios.ratio, np.float32))
    u, level = problem.levels(pre)
    flat = blocks.from_blocks(level, tiling)
    if fit:
      post = fit_steps(weight, flat, post, problem.hessian, spec, problem.tensor_amax, sweeps=1 if count < steps else 3)
    rows, pull = problem.error(level, post)
    if count == 0 or keep == "last":
      kept = (rows, flat, post)
    else:
      better = problem.better(rows, kept[0])
      kept = (np.where(np.ravel(better), rows, kept[0]), np.where(better, flat, kept[1]), np.where(better, post, kept[2]))
    if count < steps:
      inside = (u >= problem.low) & (u <= problem.high)
      ratios.step(problem.slope(pull * np.where(inside, -u, 0), post))
  plain = core.fake_quantize(weight, spec, start, tensor_amax=problem.tensor_amax)
  amax = np.where(start != 0, kept[2] * np.float32(spec.element_bound), start).astype(np.float32)
  value = blocks.to_blocks(kept[1], tiling) * blocks.expand(problem.scales(amax).step, tiling)
  value = blocks.from_blocks(value, tiling)
  before, after = problem.exact(plain), problem.exact(value)
  if keep == "best":
    worse = problem.better(before, after)
    amax, value, after = np.where(worse, start, amax), np.where(worse, plain, value), np.where(np.ravel(worse), before, after)
  return LsqResult(amax, problem.tensor_amax, value, before, after)


def _storable(steps: np.ndarray, spec: QuantSpec, tensor_amax: np.ndarray | None) -> np.ndarray:
  """The nearest steps that the format stores."""
  return scaling.scales(np.asarray(steps * spec.element_bound, np.float32), spec, tensor_amax).step


def _units(tiling: Tiling) -> tuple[int, int]:
  """(rows, columns) of a group of an [N, K] weight."""
  scales = tiling.scales or (1, 1)
  return tiling.padded[0] // max(scales[0], 1), tiling.padded[1] // max(scales[1], 1)


def _spread(grid: np.ndarray, rows: int, columns: int, n: int, k: int) -> np.ndarray:
  return np.repeat(np.repeat(grid, columns, axis=1)[:, :k], rows, axis=0)[:n]


def _group_sum(x: np.ndarray, tiling: Tiling) -> np.ndarray:
  return np.asarray(np.sum(blocks.to_blocks(x, tiling), axis=tiling.reduce, dtype=np.float64)).reshape(tiling.scales)


def _ends(spec: QuantSpec) -> tuple[float, float]:
  if isinstance(spec.element, IntFormat):
    return float(spec.element.min_code), float(spec.element.max_code)
  if isinstance(spec.element, CodebookFormat):
    return spec.element.levels[0], spec.element.levels[-1]
  return -spec.element.bound, spec.element.bound


def _check(weight: np.ndarray, spec: QuantSpec, learn: str, keep: str) -> None:
  if learn not in LEARN:
    raise ValueError(f"learn is {learn!r}; allowed are {', '.join(LEARN)}")
  if keep not in ("best", "last"):
    raise ValueError(f"keep is {keep!r}; allowed are best and last")
  if np.ndim(weight) != 2:
    raise ValueError(f"lsq learns the scales of [N, K] weights; got shape {list(np.shape(weight))}; use mse")
  if not_learned(spec):
    raise ValueError(f"lsq needs a static symmetric format with a float32 or two-level scale; got {spec}; use mse, or set dynamic to False")


def not_learned(spec: QuantSpec) -> str:
  """Why the scales of a format cannot be learned, or ""."""
  if spec.dynamic:
    return "its scales are taken from the weight"
  if spec.zero_point or spec.four_over_six or not (spec.two_level or spec.scale_format in (None, formats.FLOAT16)):
    return "learned scales need a symmetric format with a float32 or two-level scale"
  return ""
