"""Search of a weight's amax by the error that quantization makes, group by group ("mse"), and over stored block scales (NVFP4).

For every group that shares a scale: argmin over candidates a of sum (Q(w; a) - w)^2. A group's plain amax is always among the candidates
and wins every tie, so no group ever gets worse. `error` replaces the squared error (see `core.calibrate.local_hessian`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

import core
from core import blocks, encoding, formats, rounding, scaling
from core.blocks import Tiling
from core.spec import QuantSpec

CHUNK = 1 << 18  # elements quantized at a time: they stay in the cache over all candidates
E4M3_LEVELS = encoding.decode(np.arange(127, dtype=np.int32), formats.E4M3)  # level of codes 0 to 126

Error = Callable[[np.ndarray, Tiling], np.ndarray]  # (difference tiles, their tiling) -> error per group
Candidate = Callable[[np.ndarray], np.ndarray]  # amax -> amax


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """What a search found; all None where there was nothing to search.

  Attributes:
    amax: float32, shaped as `core.amax(weight, spec)`.
    tensor_amax: [] float32 under which `amax` was found, for static two-level formats; else None.
    multiplier: amax over the plain amax, one per group.
    error_before: float64 error of each group at its plain amax.
    error: the same at `amax`; nowhere above `error_before`.
    note: why nothing was searched, or what of the request was left out.
  """

  amax: np.ndarray | None = None
  tensor_amax: np.ndarray | None = None
  multiplier: np.ndarray | None = None
  error_before: np.ndarray | None = None
  error: np.ndarray | None = None
  note: str = ""


def mse_search(
  weight: np.ndarray,
  spec: QuantSpec,
  *,
  amax: np.ndarray | None = None,
  tensor_amax: np.ndarray | None = None,
  start_multiplier: float = 0.25,
  stop_multiplier: float = 4.0,
  step_size: float = 0.05,
  fp8_scale_sweep: bool = False,
  signed: bool = False,
  error: Error | None = None,
) -> SearchResult:
  """The amax of least squared error of every group.

  Candidates are amax * m, m = linspace(start, stop, ceil((stop - start) / step) + 1), and m = 1, which ModelOpt's grid lacks: with it no
  group ends worse than with max. Ties go to the multiplier nearest 1. A range (lo, hi) of zero-point formats is scaled as a whole; a static
  power-of-two scale tries 1/2, 1 and 2; dynamic two-level formats have one group, the tensor amax. Where scales are quantized in turn
  (double quantization) a block of scales that ends worse than it began is put back.

  Args:
    weight: [...] float32, finite; a group with an infinity keeps its amax.
    spec: specification; stochastic rounding is searched as nearest.
    amax: plain amax to start from; None takes `core.amax`.
    tensor_amax: [] for static two-level formats; None takes the largest of `amax`. It is not searched.
    start_multiplier: least multiplier, above 0.
    stop_multiplier: largest multiplier.
    step_size: their distance, at most. Half of ModelOpt's 0.1: with 1 in the coarse grid, which ModelOpt's lacks, blocks whose best
      multiplier lies between .94 and 1.04 stay at 1, and SmolLM2's INT4 loses .010 of NLL; with the fine grid it does not.
    fp8_scale_sweep: static two-level formats: try all 126 positive E4M3 block scales in place of multipliers. Other formats search
      multipliers all the same and say so in the note (ModelOpt leaves them unsearched).
    signed: try the negative of every multiplier as well, where the format allows it (`QuantSpec.allows_signed_scale`): the code that two's
      complement has more on one side, -8 of INT4, then goes to the side of the group that needs it.
    error: error of each group in place of the squared one; see `squared_error`.

  Raises:
    ValueError: multipliers that are not 0 < start <= stop with a positive step.
  """
  multipliers = _multipliers(start_multiplier, stop_multiplier, step_size)
  note = nothing_to_search(spec)
  if note:
    return SearchResult(note=note)
  weight = np.asarray(weight, np.float32)
  amax, tensor_amax = start_amax(weight, spec, amax, tensor_amax)
  if fp8_scale_sweep and spec.two_level and not spec.dynamic:
    found = _sweep(weight, spec, amax, tensor_amax, error)
  else:
    note = "fp8_scale_sweep is for static E4M3 block scales; multipliers were searched" if fp8_scale_sweep else ""
    if spec.is_mx:
      multipliers = [1.0, 0.5, 2.0]
    if signed and spec.allows_signed_scale:
      multipliers = multipliers + [-m for m in multipliers]
    found = _search(weight, spec, amax, tensor_amax, [_times(m) for m in multipliers], error)
  return _result(weight, spec, amax, found, tensor_amax, error, note)


def four_over_six(
  weight: np.ndarray, spec: QuantSpec, *, amax: np.ndarray | None = None, tensor_amax: np.ndarray | None = None
) -> SearchResult:
  """Per block, amax to 6 or to 4 (multiplier 1 or 1.5), by squared error; ties stay at 6.

  For static E2M1 formats with E4M3 block scales. The result is an ordinary static amax, so it needs no `spec.four_over_six`.

  Args:
    weight: [...] float32.
    spec: specification.
    amax: block amax; None takes `core.amax`.
    tensor_amax: None takes the largest amax * 448 / 256, so that the tensor scale is amax / (6 * 256) as in the paper and every block scale
      has room for the factor 1.5.

  Raises:
    ValueError: another format.

  References: Cook et al., 2025, arXiv:2512.02010.
  """
  if not (spec.two_level and spec.element == formats.E2M1):
    raise ValueError(f"four_over_six needs E2M1 elements with an E4M3 block scale; got {spec.element.name} in {spec}; use mse_search")
  if spec.dynamic or spec.four_over_six:
    where = (
      "the format chooses itself (spec.four_over_six)" if spec.four_over_six else nothing_to_search(spec) or "block scales are dynamic"
    )
    return SearchResult(note=where)
  weight = np.asarray(weight, np.float32)
  amax, largest = start_amax(weight, spec, amax, None)
  assert largest is not None
  tensor_amax = np.asarray(largest * np.float32(448 / 256) if tensor_amax is None else tensor_amax, np.float32).reshape(())
  found = _search(weight, spec, amax, tensor_amax, [_times(1.0), _times(1.5)], None)
  return _result(weight, spec, amax, found, tensor_amax, None, "")


def nothing_to_search(spec: QuantSpec) -> str:
  """Why a format has no amax to search, or ""."""
  if spec.dynamic and not spec.two_level:
    return f"{spec.element.name} takes its scales from each input (dynamic), so there is no amax to search"
  return ""


def start_amax(
  weight: np.ndarray, spec: QuantSpec, amax: np.ndarray | None, tensor_amax: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
  """(amax, tensor amax) as float32, taken from the weight where None; the tensor amax only for static two-level formats."""
  amax = np.asarray(core.amax(weight, spec) if amax is None else amax, np.float32)
  if not spec.two_level or spec.dynamic:
    return amax, None
  return amax, np.asarray(amax.max() if tensor_amax is None else tensor_amax, np.float32).reshape(())


def squared_error(difference: np.ndarray, tiling: Tiling) -> np.ndarray:
  """Sum of squares of each group: what an `error` hook replaces.

  Args:
    difference: tiles (`blocks.to_blocks`) of Q(w) - w, for some of the rows; padding is zero.
    tiling: their tiling.

  Returns:
    `tiling.scales`.
  """
  if tiling.reduce == (difference.ndim - 1,):
    return np.vecdot(difference, difference).reshape(tiling.scales)
  return np.sum(np.square(difference), axis=tiling.reduce).reshape(tiling.scales)


def group_error(
  weight: np.ndarray,
  spec: QuantSpec,
  amax: np.ndarray,
  tensor_amax: np.ndarray | None = None,
  error: Error | None = None,
) -> np.ndarray:
  """float64 error of each group (one number for dynamic two-level formats) at a given amax."""
  return _tables(weight, spec, amax, tensor_amax, [_times(1.0)], error, np.float64, lambda table: table[0])


def _multipliers(start: float, stop: float, step: float) -> list[float]:
  if not (0 < start <= stop and step > 0):
    raise ValueError(f"multipliers from {start} to {stop} in steps of {step} are not allowed; use 0 < start <= stop and step > 0")
  grid = np.linspace(start, stop, math.ceil((stop - start) / step) + 1)
  return [1.0, *sorted((float(m) for m in grid if m != 1.0), key=lambda m: abs(m - 1))]


def _times(multiplier: float) -> Candidate:
  return lambda amax: amax * np.float32(multiplier)


def _constant(value: np.float32) -> Candidate:
  return lambda amax: np.where(amax > 0, value, amax)


def _search(weight, spec, amax, tensor_amax, candidates: Sequence[Candidate], error: Error | None) -> np.ndarray:
  """amax of the candidate with the least error, the first of equals, per group."""

  def pick(table: np.ndarray) -> np.ndarray:
    return np.argmin(np.where(np.isnan(table), np.inf, table), axis=0)

  top = float(np.max(np.abs(amax), initial=0))
  dtype = np.float32 if 2.0**-30 < top < 2.0**50 else np.float64  # beyond, squares leave float32
  choice = _tables(weight, spec, amax, tensor_amax, candidates, error, dtype, pick)
  found = amax
  for index, candidate in enumerate(candidates):
    if np.any(choice == index):
      found = np.where(choice == index, candidate(amax), found)
  return found


def _tables(weight, spec, amax, tensor_amax, candidates, error, dtype, finish) -> np.ndarray:
  """finish([C, groups] errors of all candidates), computed for as many rows at a time as fit the cache."""
  spec = spec.replace(rounding="nearest")
  unit, kept = _rows(weight.shape, spec)
  count = len(weight) if weight.ndim < 2 else max(1, CHUNK // max(weight[:1].size * unit, 1)) * unit
  measure, whole = error or squared_error, spec.two_level and spec.dynamic
  tables = []
  for first in range(0, len(weight), count):
    part = np.ascontiguousarray(weight[first : first + count])
    tiling = blocks.tiling(part.shape, spec)
    mine = amax
    if kept and not whole:
      groups = slice(first // unit, -(-(first + len(part)) // unit))
      mine = amax[:, groups] if spec.zero_point else amax[groups]
    errors = []
    for candidate in candidates:
      value = core.fake_quantize(part, spec, candidate(mine), tensor_amax=tensor_amax)
      with np.errstate(invalid="ignore", over="ignore"):
        difference = np.subtract(value, part, dtype=dtype)
        found = measure(blocks.to_blocks(difference, tiling), tiling)
      errors.append(np.sum(found) if whole else found)
    table = np.stack(errors)
    tables.append(finish(table) if kept and not whole else table)
  return np.concatenate(tables) if kept and not whole else finish(np.sum(tables, axis=0, dtype=np.float64))


def _rows(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, bool]:
  """(rows that must stay together, whether different rows can have different scales)."""
  if spec.blocks is not None:
    size = {blocks.normalize_axis(a, shape): n for a, n in spec.blocks}.get(0, 1)
    return size or 1, size is not None
  return 1, spec.axis is not None and 0 in {blocks.normalize_axis(a, shape) for a in spec.axis}


def _result(weight, spec, amax, found, tensor_amax, error, note: str) -> SearchResult:
  """The float32 sums of the search decide again in float64 here: a group that is worse than at its plain amax gets it back."""
  before, after = (group_error(weight, spec, a, tensor_amax, error) for a in (amax, found))
  if spec.scale_format == formats.UINT8:
    worse = _worse_scale_blocks(before, after, spec)
  else:
    worse = after > before
  found = np.where(worse, amax, found).astype(np.float32)
  after = np.where(worse, before, after)
  plain, chosen = (amax[1] - amax[0], found[1] - found[0]) if spec.zero_point else (amax, found)
  multiplier = np.where(plain != 0, chosen / np.where(plain != 0, plain, 1), 1).astype(np.float32)
  return SearchResult(found, tensor_amax, multiplier, np.asarray(before), np.asarray(after), note)


def _worse_scale_blocks(before: np.ndarray, after: np.ndarray, spec: QuantSpec) -> np.ndarray:
  """Groups in a block of scales (with one second-level scale) whose summed error grew; a second-level scale couples its groups."""
  count = before.shape[-1]
  size = min(spec.scale_block or count, count)
  starts = np.arange(0, count, size)
  worse = np.add.reduceat(after, starts, axis=-1) > np.add.reduceat(before, starts, axis=-1)
  return np.repeat(worse, size, axis=-1)[..., :count]


def _sweep(weight: np.ndarray, spec: QuantSpec, amax: np.ndarray, tensor_amax: np.ndarray | None, error: Error | None) -> np.ndarray:
  """amax whose E4M3 block scale errs least. amax = level * unit, unit = tensor scale * bound, makes `core.scales` store that level."""
  plain = scaling.scales(amax, spec.replace(four_over_six=False), tensor_amax)
  # a four-over-six format has another tensor scale; its unit is 448 / 256 as large
  room = np.float32(448 / 256) if spec.four_over_six else np.float32(1)
  unit = np.float32(plain.tensor_scale) * np.float32(spec.element_bound) * room
  levels = E4M3_LEVELS[1:] * unit
  if not levels[0] >= np.float32(scaling.ZERO_BELOW):
    return amax  # an amax below 2^-90 counts as zero: scales this small cannot all be asked for
  if error is not None or spec.four_over_six or not _halves(spec):
    return _search(weight, spec, amax, tensor_amax, [_times(1.0), *(_constant(level) for level in levels)], error)
  tiling = blocks.tiling(weight.shape, spec)
  tiles = blocks.to_blocks(weight, tiling)
  last = range(tiles.ndim - len(tiling.reduce), tiles.ndim)
  rows = np.moveaxis(tiles, tiling.reduce, tuple(last)).reshape(amax.size, -1)
  # a power of two brings the tensor scale to [1/2, 1): nothing is rounded, and no square leaves float32
  fraction, exponent = np.frexp(np.float32(plain.tensor_scale))
  codes, step, rows = plain.scale.reshape(-1).astype(np.int32), np.float32(fraction), np.ldexp(rows, -exponent)
  count = max(1, CHUNK // max(rows.shape[1], 1))
  best = [_best_codes(rows[i : i + count], codes[i : i + count], step, spec) for i in range(0, len(rows), count)]
  code = np.concatenate(best) if best else codes
  return np.where((code != codes) & (amax.reshape(-1) > 0), E4M3_LEVELS[code] * unit, amax.reshape(-1)).reshape(amax.shape)


def _halves(spec: QuantSpec) -> bool:
  """Whether doubling a step only drops levels up to 6: what lets `_best_codes` leave scales out. True for E2M1 and INT4 or wider."""
  integer = isinstance(spec.element, formats.IntFormat) and spec.element.signed and spec.element.bits >= 4
  return spec.element == formats.E2M1 or integer


def _best_codes(x: np.ndarray, plain: np.ndarray, tensor_scale: np.float32, spec: QuantSpec) -> np.ndarray:
  """E4M3 code of the block scale with the least squared error over all 126; ties stay at the plain code.

  Scales are left out only where they cannot be better. With a = max |x| and step s:
  (1) the largest element alone errs by a - bound * s, so s is out when that squared reaches the best error so far;
  (2) for a <= 7 s the grid of step s holds all levels that step 2 s would use, so 2 s is out whenever s is an E4M3 level;
  (3) for a < s / 4 every element becomes 0, and no nearest rounding errs more than that.

  Args:
    x: [M, B] finite blocks.
    plain: [M] codes to start from.
    tensor_scale: [] float32.
    spec: specification, for its element format.
  """
  top = np.abs(x).max(axis=1)
  low = float(spec.element.bound) if spec.element == formats.E2M1 else float(2 ** (spec.element.bits - 1))
  code, best = plain.copy(), _block_error(x, plain, tensor_scale, spec)
  for sign in (1, -1):
    for offset in range(1, 126):
      candidate = plain + sign * offset
      inside = (candidate >= 1) & (candidate <= 126)
      step = E4M3_LEVELS[np.clip(candidate, 1, 126)] * tensor_scale
      clips = np.square(np.maximum(top - low * step, 0)) >= best
      halved = np.where((candidate < 16) & (candidate % 2 == 1), top * 4.001, top * (2.001 / 7)) < step
      active = np.flatnonzero(inside & ~clips & ~halved)
      if active.size:
        error = _block_error(x[active], candidate[active], tensor_scale, spec)
        better = error < best[active]
        chosen = active[better]
        best[chosen], code[chosen] = error[better], candidate[chosen]
      elif np.all(~inside | (clips if sign < 0 else halved & (candidate >= 16))):
        break
  return code


def _block_error(x: np.ndarray, code: np.ndarray, tensor_scale: np.float32, spec: QuantSpec) -> np.ndarray:
  step = (E4M3_LEVELS[code] * tensor_scale)[:, None]
  difference = rounding.to_level(x * scaling.reciprocal(step), spec.element, overwrite=True) * step - x
  return np.vecdot(difference, difference)
