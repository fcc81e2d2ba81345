"""Learned rounding: for fixed scales, which of its two neighbouring levels each weight takes so that the layer's output errs least.

min over roundings of tr((Q - W) H (Q - W)^T), H the mean of x x^T of the layer's input: AdaRound's problem in closed form, without data.
Roundings are relaxed to positions between two levels, descended with Adam under a penalty that drives them to the ends, and rounded; then
single levels change while that helps (exact coordinate descent). Nothing leaves the grid and no row ends worse than it started.

References: Nagel et al., 2020, arXiv:2004.10568 (AdaRound).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

import core
from core import blocks, encoding
from core.calibrate.adam import Adam
from core.calibrate.layer import output_error
from core.formats import CodebookFormat, Format, IntFormat
from core.quantize import QuantizedTensor, step_of
from core.spec import QuantSpec

PENALTY = 0.4  # final weight of the penalty, in units of an element's own curvature; 0.25 to 0.5 measured alike
CHECK_EVERY = 5  # steps between two looks at the true error, which costs as much as a step
SWEEP_COLUMNS = 64  # columns whose changes are spread inside before they reach all others by one matrix product


@dataclasses.dataclass(frozen=True)
class RoundingResult:
  """Learned rounding.

  Attributes:
    weight: the weight's shape, float32; it quantizes to itself at `amax` and `tensor_amax`. Only where a dynamic format does not even
      quantize its own output to itself, those groups hold the float weight (or start) still.
    amax: float32 of static formats and the tensor amax of dynamic two-level ones; None for other dynamic formats.
    tensor_amax: [] float32 of static two-level formats, else None.
    error_before: [N] float64 output error of each row, rounded to nearest or as `start`.
    error: the same of the result; nowhere above `error_before`.
    changed: share of the levels that differ from the start's.
    repaired: number of groups put back because their scale would not have survived (dynamic scales only).
  """

  weight: np.ndarray
  amax: np.ndarray | None
  tensor_amax: np.ndarray | None
  error_before: np.ndarray
  error: np.ndarray
  changed: float
  repaired: int


def adaround(
  weight: np.ndarray,
  spec: QuantSpec,
  hessian: np.ndarray,
  *,
  amax: np.ndarray | None = None,
  tensor_amax: np.ndarray | None = None,
  start: np.ndarray | None = None,
  steps: int = 100,
  lr: float = 0.1,
  sweeps: int = 4,
  seed: int | None = None,
) -> RoundingResult:
  """Rounds a weight for least output error.

  Each weight has a position z in [0, 1] between two levels, at first its own. Adam descends the error of the relaxed weight plus
  p (z - z^2) per element, p growing linearly to 0.4 times the element's own curvature; z >= 1/2 takes the upper level, and each row keeps
  its best iterate by true error. With `start` the two levels are the start's and the next one towards the weight.

  Where it leaves AdaRound: z is clipped instead of a stretched sigmoid, the penalty is quadratic and its strength anneals instead of its
  exponent, the loss is the layer's own quadratic form instead of batches; coordinate descent follows, from the result and from the start,
  which may also leave the first pair of levels. AutoRound's sign descent (2309.05516) on the same form was measured and ended far behind.

  Args:
    weight: [N, K] float32, or [N, ...] with a Hessian of the flattened inputs.
    spec: specification. Scales stay those of `weight` under `amax`: static formats exactly, dynamic ones because groups where they would
      move are put back.
    hessian: [K, K], not damped.
    amax: None takes `core.amax`.
    tensor_amax: of static two-level formats; None takes the largest of `amax`.
    start: weight to begin with instead of rounding to nearest (GPTQ's, for example), quantized at the same amax.
    steps: Adam's; 0 leaves coordinate descent alone.
    lr: its first step of z, at most.
    sweeps: passes of coordinate descent; 0 leaves it out.
    seed: None starts z at the weight itself; a number adds uniform noise of a quarter level, for restarts. Equal seeds give equal results.

  Raises:
    ValueError: shapes that do not fit, or a start that is not the weight's shape.
  """
  weight = np.asarray(weight, np.float32)
  spec = spec.replace(rounding="nearest")
  rows = weight.reshape(len(weight), -1)
  if np.shape(hessian) != (rows.shape[1],) * 2:
    raise ValueError(
      f"a Hessian of shape {list(np.shape(hessian))} does not fit a weight of shape {list(weight.shape)}; need [K, K], K = {rows.shape[1]}"
    )
  if start is not None and np.shape(start) != weight.shape:
    raise ValueError(f"start has shape {list(np.shape(start))}, the weight {list(weight.shape)}; they must be equal")
  amax, tensor_amax = _fixed_amax(weight, spec, amax, tensor_amax)
  stored = core.quantize(weight, spec, amax, tensor_amax=tensor_amax)
  level, step = (a.reshape(rows.shape) for a in levels_and_steps(stored))
  source = weight if start is None else np.asarray(start, np.float32)
  if start is not None:
    plain = core.fake_quantize(source, spec, amax, tensor_amax=tensor_amax)
    scaled = np.divide(plain.reshape(rows.shape), step, dtype=np.float32)
    level = _nearest(scaled, spec.element, *level_ends(stored, rows.shape))
  hessian = np.asarray(hessian, np.float32)
  moves = _neighbours(spec.element, *level_ends(stored, rows.shape))
  found = level.copy()
  _sweep(rows, found, step, hessian, moves, sweeps)
  if steps:
    relaxed = _relax(rows, level, step, hessian, moves, steps, lr, seed)
    _sweep(rows, relaxed, step, hessian, moves, sweeps)
    better = _row_error(relaxed * step - rows, hessian) < _row_error(found * step - rows, hessian)
    found[better] = relaxed[better]
  value = (found * step).reshape(weight.shape)
  return _result(weight, spec, hessian, amax, tensor_amax, source, value)


def _fixed_amax(weight, spec: QuantSpec, amax, tensor_amax) -> tuple[np.ndarray | None, np.ndarray | None]:
  if spec.dynamic and not spec.two_level:
    return None, None
  amax = np.asarray(core.amax(weight, spec) if amax is None else amax, np.float32)
  if spec.dynamic or not spec.two_level:
    return amax, None
  return amax, np.asarray(amax.max() if tensor_amax is None else tensor_amax, np.float32).reshape(())


def levels_and_steps(stored: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
  """(level, step) of every element, in the tensor's shape."""
  tiling = blocks.tiling(stored.shape, stored.spec)
  level = encoding.decode(np.asarray(stored.codes), stored.spec.element)
  if stored.zero_point is not None:
    level = level - _spread(stored.zero_point.astype(np.float32), tiling)
  return level, _spread(np.asarray(step_of(stored), np.float32), tiling)


def _spread(scale: np.ndarray, tiling: blocks.Tiling) -> np.ndarray:
  return blocks.from_blocks(np.ascontiguousarray(np.broadcast_to(blocks.expand(scale, tiling), tiling.tiles)), tiling)


def level_ends(stored: QuantizedTensor, shape: tuple[int, int]) -> tuple[np.ndarray | float, np.ndarray | float]:
  """Lowest and highest level: of integers with a zero point, those of every element."""
  element = stored.spec.element
  if not isinstance(element, IntFormat):
    return 0.0, 0.0
  if stored.zero_point is None:
    return float(element.min_code), float(element.max_code)
  zero = _spread(stored.zero_point.astype(np.float32), blocks.tiling(stored.shape, stored.spec)).reshape(shape)
  return element.min_code - zero, element.max_code - zero


def _table(fmt: Format) -> np.ndarray:
  """All levels of a float or codebook format, ascending, zero once."""
  if isinstance(fmt, CodebookFormat):
    return np.array(fmt.levels, np.float32)
  levels = encoding.decode(np.arange(2**fmt.bits, dtype=np.int32), fmt)
  return np.unique(levels[np.isfinite(levels)]) + np.float32(0)


Moves = Callable[[np.ndarray, int, slice], np.ndarray]


def _neighbours(fmt: Format, low: np.ndarray | float, high: np.ndarray | float) -> Moves:
  """(levels, -1 or 1, their columns) -> the next level down or up; at the end the level itself."""
  if isinstance(fmt, IntFormat):

    def next_integer(level: np.ndarray, direction: int, columns: slice) -> np.ndarray:
      bottom, top = (end[:, columns] if isinstance(end, np.ndarray) else end for end in (low, high))
      return np.clip(level + np.float32(direction), bottom, top)

    return next_integer
  table = _table(fmt)

  def next_level(level: np.ndarray, direction: int, columns: slice) -> np.ndarray:
    return table[np.clip(np.searchsorted(table, level) + direction, 0, len(table) - 1)]

  return next_level


def _nearest(scaled: np.ndarray, fmt: Format, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
  if isinstance(fmt, IntFormat):
    return np.clip(np.rint(scaled), low, high)
  table = _table(fmt)
  return table[np.searchsorted((table[1:] + table[:-1]) / 2, scaled)]


def _row_error(residual: np.ndarray, hessian: np.ndarray) -> np.ndarray:
  return np.vecdot(residual, residual @ hessian)


def _relax(weight, level, step, hessian, moves: Moves, steps: int, lr: float, seed: int | None) -> np.ndarray:
  """Each row's best levels over the descent; the start is one of them."""
  everything = slice(None)
  scaled = weight / step
  other = np.where(scaled > level, moves(level, 1, everything), moves(level, -1, everything))
  lower, gap = np.minimum(level, other), np.abs(other - level)
  position = np.clip(np.divide(scaled - lower, gap, out=np.zeros_like(scaled), where=gap > 0), 0, 1)
  if seed is not None:
    noise = np.random.default_rng(seed).uniform(-0.25, 0.25, position.shape)
    position = np.clip(position + noise.astype(np.float32), 0, 1)
  curvature = np.diag(hessian) * gap * step  # of an element by its own position, over gap * step; gradients are in these units
  inverse = np.divide(1, curvature, out=np.zeros_like(curvature), where=curvature != 0)
  found, best = level.copy(), _row_error(level * step - weight, hessian)
  adam = Adam(position.shape, epsilon=1e-8)
  for count in range(1, steps + 1):
    gradient = ((lower + gap * position) * step - weight) @ hessian * inverse
    gradient -= np.float32(PENALTY * count / steps) * (2 * position - 1)
    position = np.clip(position - np.float32(lr) * adam.direction(gradient), 0, 1)
    if count % CHECK_EVERY and count != steps:
      continue
    rounded = lower + gap * (position >= 0.5)
    rows = _row_error(rounded * step - weight, hessian)
    better = rows < best
    best = np.minimum(rows, best)
    found[better] = rounded[better]
  return found


def _sweep(weight, level, step, hessian, moves: Moves, sweeps: int) -> None:
  """Coordinate descent in place: for each column in turn, each row goes to the neighbouring level that lowers its error most, if any.

  A change d of one element adds 2 d (R H)_j + d^2 H_jj to its row's error, R = Q - W.
  """
  k = weight.shape[1]
  for _ in range(sweeps):
    pull, moved = (level * step - weight) @ hessian, False
    for first in range(0, k, SWEEP_COLUMNS):
      part = slice(first, min(first + SWEEP_COLUMNS, k))
      before, inner, local = level[:, part].copy(), hessian[part, part], pull[:, part].copy()
      for j in range(part.stop - first):
        column = slice(first + j, first + j + 1)
        best, chosen = np.zeros((len(level), 1), np.float32), level[:, column]
        for direction in (-1, 1):
          candidate = moves(level[:, column], direction, column)
          change = (candidate - level[:, column]) * step[:, column]
          gain = change * (2 * local[:, j : j + 1] + change * inner[j, j])
          chosen, best = np.where(gain < best, candidate, chosen), np.minimum(gain, best)
        change = (chosen - level[:, column]) * step[:, column]
        if np.any(change):
          local += change * inner[j]
          level[:, column] = chosen
      spread = (level[:, part] - before) * step[:, part]
      if np.any(spread):
        pull += spread @ hessian[part]
        moved = True
    if not moved:
      return


def _result(weight, spec: QuantSpec, hessian, amax, tensor_amax, source, value) -> RoundingResult:
  """Checks in float64, and on the format itself, that no row is worse than the source's and that the result quantizes to itself."""
  exact = hessian.astype(np.float64)

  def stored(x: np.ndarray) -> np.ndarray:
    return core.fake_quantize(x, spec, amax, tensor_amax=tensor_amax)

  def errors(quantized: np.ndarray) -> np.ndarray:
    return output_error((quantized.astype(np.float64) - weight).reshape(len(weight), -1), exact)

  plain = stored(source)
  before = errors(plain)
  column = (slice(None), *(None,) * (weight.ndim - 1))
  value = np.where((errors(value) < before)[column], value, plain)
  value, repaired = repair(stored, (plain, source), value, blocks.tiling(weight.shape, spec))
  value = np.where((errors(stored(value)) > before)[column], source if repaired else plain, value)
  if repaired and np.any(errors(stored(value)) > before):  # a row went back alone, out of a group of several rows
    value = source
  quantized = stored(value)
  return RoundingResult(value, amax, tensor_amax, before, errors(quantized), float(np.mean(quantized != plain)), repaired)


def repair(stored: Callable[[np.ndarray], np.ndarray], fallbacks, value: np.ndarray, tiling: blocks.Tiling) -> tuple[np.ndarray, int]:
  """Groups that do not quantize to themselves take the first fallback instead, if that does not either the next. (weight, how many)."""
  repaired = 0
  for fallback in fallbacks:
    different = np.any(blocks.to_blocks(stored(value) != value, tiling), axis=tiling.reduce, keepdims=True)
    if not np.any(different):
      break
    repaired = max(repaired, int(np.count_nonzero(different)))
    value = np.where(blocks.from_blocks(np.broadcast_to(different, tiling.tiles), tiling), fallback, value)
  return value, repaired
