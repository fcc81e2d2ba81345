"""What GPTQ needs of a format: steps per (row, group of columns), values of single columns, and when and how a group's amax is chosen.

A group is the columns of one row (or of several: tiles, per tensor) that share a scale; it is `width` columns wide, the last may be short.
The numbers are those of `core.scales` and `core.rounding`, so a value made here is one that `core.fake_quantize` leaves as it is.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

import core
from core import blocks, formats, rounding, scaling
from core.formats import IntFormat
from core.spec import QuantSpec

RATIOS = tuple(float(r) for r in np.linspace(0.45, 1.05, 17))  # amax of the candidates over the plain amax
SEARCH_WIDTH = 128  # a wider group is judged by diagonal blocks of the Hessian of this width
CHUNK = 2**17  # elements of all candidates that are quantized at a time: what a core's cache holds


@dataclasses.dataclass(frozen=True)
class Steps:
  """Scales of the groups, one row of the array per group.

  Attributes:
    step: [G, N] float32.
    inv_step: [G, N] float32.
    zero_point: [G, N] float32, or None.
  """

  step: np.ndarray
  inv_step: np.ndarray
  zero_point: np.ndarray | None


class Grid:
  """The values that a format allows to a weight.

  Args:
    spec: specification.
    shape: (N, K).
    tensor_amax: [] amax behind the tensor scale of two-level formats; else None.

  Attributes:
    width: columns that share a scale.
    count: groups along K.
    pinned: scales are taken from the quantized weight itself, and not a power of two: its peaks must stay where they put the scale.
  """

  def __init__(self, spec: QuantSpec, shape: tuple[int, int], tensor_amax: np.ndarray | None) -> None:
    self.spec, self.shape, self.tensor_amax = spec, shape, tensor_amax
    self.width = group_width(spec, shape[1])
    self.count = -(-shape[1] // self.width)
    self.pinned = spec.dynamic and not spec.is_mx
    self.cap = _cap(spec)
    self._indices: dict[int, np.ndarray] = {}

  def columns(self, group: int) -> slice:
    """Columns of a group."""
    return slice(group * self.width, min((group + 1) * self.width, self.shape[1]))

  def part(self, amax: np.ndarray, group: int) -> np.ndarray:
    """The (writable) entries of a group in the amax of the whole weight."""
    return amax if amax.ndim == int(self.spec.zero_point) else amax[..., group : group + 1]

  def amax(self, weight: np.ndarray) -> np.ndarray:
    """Plain amax of one or all groups. weight: [N, columns of them] float32."""
    return np.array(core.block_amax(weight, self.spec), np.float32)

  def steps(self, weight: np.ndarray, amax: np.ndarray) -> Steps:
    """Scales of one or all groups at a given amax, for values of `weight` (four-over-six looks at them)."""
    tiling = blocks.tiling(weight.shape, self.spec)
    found = core.scales(amax, self.spec, self.tensor_amax, tiles=blocks.to_blocks(weight, tiling), tiling=tiling)
    index = self.index(weight.shape[1])
    zero_point = None if found.zero_point is None else np.ravel(found.zero_point)[index].astype(np.float32)
    return Steps(np.ravel(found.step)[index], np.ravel(found.inv_step)[index], zero_point)

  def index(self, columns: int) -> np.ndarray:
    """[G, N]: where the amax of (group, row) lies in the flat amax of a weight of that many columns."""
    if columns not in self._indices:
      tiling = blocks.tiling((self.shape[0], columns), self.spec)
      flat = blocks.expand(np.arange(math.prod(tiling.scales)).reshape(tiling.scales), tiling)
      index = blocks.from_blocks(np.ascontiguousarray(np.broadcast_to(flat, tiling.tiles)), tiling)
      self._indices[columns] = np.ascontiguousarray(index[:, :: self.width].T)
    return self._indices[columns]

  def values(self, x: np.ndarray, step: np.ndarray, inv_step: np.ndarray, zero_point: np.ndarray | None) -> np.ndarray:
    """level * step of the nearest level. All [...] float32, scales broadcasting against x."""
    scaled = x * inv_step
    if zero_point is not None:
      assert isinstance(self.spec.element, IntFormat)
      level = rounding.to_integer(scaled)
      level = np.clip(level, self.spec.element.min_code - zero_point, self.spec.element.max_code - zero_point) + np.float32(0)
    else:
      if self.cap is not None:
        np.clip(scaled, -self.cap, self.cap, out=scaled)
      level = rounding.to_level(scaled, self.spec.element, overwrite=True)
    return np.multiply(level, step, out=level)

  def peaks(self, weight: np.ndarray) -> np.ndarray:
    """Where the elements are from which a scale would be taken: the largest magnitude of each group, or both ends of its range.

    Args:
      weight: [N, columns of one or all groups] float32.

    Returns:
      bool, the weight's shape.
    """
    tiling = blocks.tiling(weight.shape, self.spec)
    tiles, amax = blocks.to_blocks(weight, tiling), self.amax(weight)
    if self.spec.zero_point:
      found = (tiles == blocks.expand(amax[0], tiling)) | (tiles == blocks.expand(amax[1], tiling))
    else:
      found = np.abs(tiles) == blocks.expand(amax, tiling)
    return blocks.from_blocks(found, tiling) & (weight != 0)


def group_width(spec: QuantSpec, columns: int) -> int:
  """How many neighbouring columns of a weight [N, columns] share a scale."""
  if spec.blocks is not None:
    sizes = {blocks.normalize_axis(axis, (1, 1)): size for axis, size in spec.blocks}
    return min(sizes.get(1, 1) or columns, columns)
  return 1 if spec.axis is not None and 1 in {blocks.normalize_axis(a, (1, 1)) for a in spec.axis} else columns


def search_amax(grid: Grid, weight: np.ndarray, hessian: np.ndarray, signed: bool) -> np.ndarray:
  """The amax of a group of columns with the least d_b H_b d_b^T, d_b the error of rounding the group to nearest.

  Candidates are `RATIOS` times the plain amax, and the plain amax itself, which wins ties. Ranges (lo, hi) of zero-point formats are scaled
  as a whole. Power-of-two scales try 1 and 1/2; where scales are taken from the quantized weight no candidate is above 1.

  Args:
    grid: format of the weight.
    weight: [N, B] float32, the columns of one group.
    hessian: [B, B] float32 block of the mean of x x^T. Of groups above `SEARCH_WIDTH` only diagonal blocks of that width count.
    signed: also try negative scales, and scales at which the peak lies on the code -2^(b-1), where the format has them.

  Returns:
    amax of the group, as `Grid.amax` shapes it.
  """
  plain = grid.amax(weight)
  candidates = _candidates(grid, weight, plain, signed)
  zero_point, rows = grid.spec.zero_point, grid.index(weight.shape[1])[0]
  scales = _candidate_steps(grid, weight, candidates, rows)
  loss = _losses(grid, weight, hessian, scales)
  size = plain.size // 2 if zero_point else plain.size
  if size != len(weight):
    loss = np.stack([np.bincount(rows, one, size) for one in loss])
  best = np.argmin(np.where(np.isnan(loss), np.inf, loss), axis=0)
  if zero_point:
    return np.stack([end.reshape(len(end), size)[best, np.arange(size)] for end in candidates]).reshape(plain.shape)
  return candidates.reshape(len(candidates), size)[best, np.arange(size)].reshape(plain.shape)


def _candidates(grid: Grid, weight: np.ndarray, plain: np.ndarray, signed: bool) -> np.ndarray:
  """[C, ...] amax (ranges: [2, C, ...]) to try, the plain one first."""
  spec = grid.spec
  ratios = np.asarray((1.0, 0.5) if spec.is_mx else (1.0, *(r for r in RATIOS if r <= 1 or not spec.dynamic)), np.float32)
  if spec.zero_point:
    return plain[:, None] * ratios.reshape(-1, *[1] * (plain.ndim - 1))
  ratios = ratios.reshape(-1, *[1] * plain.ndim)
  if not (signed and spec.allows_signed_scale and not spec.dynamic):
    return plain * ratios
  assert isinstance(spec.element, IntFormat)
  tiling = blocks.tiling(weight.shape, spec)
  low, high = (end.reshape(tiling.scales) for end in scaling.value_range(blocks.to_blocks(weight, tiling), tiling.reduce))
  peak = np.where(high >= -low, high, low)
  full = -peak * np.float32(spec.element_bound / -spec.element.min_code)  # the peak on the code -2^(b-1)
  return np.concatenate([plain[None], full * ratios, peak * ratios])


def _candidate_steps(grid: Grid, weight: np.ndarray, candidates: np.ndarray, rows: np.ndarray) -> Steps:
  """Scales of all candidates, [C, N]. Four-over-six chooses by the values, so one at a time; double-quantized scales count as plain."""
  spec = grid.spec
  if spec.four_over_six:
    found = [grid.steps(weight, one) for one in candidates]
    return Steps(np.concatenate([s.step for s in found]), np.concatenate([s.inv_step for s in found]), None)
  if spec.scale_format == formats.UINT8:
    spec = spec.replace(scale_format=None, scale_block=None)
  scales = core.scales(candidates, spec, grid.tensor_amax)
  count = candidates.shape[1] if spec.zero_point else len(candidates)
  step, inverse = (a.reshape(count, -1)[:, rows] for a in (scales.step, scales.inv_step))
  zero_point = None if scales.zero_point is None else scales.zero_point.reshape(count, -1)[:, rows].astype(np.float32)
  return Steps(step, inverse, zero_point)


def _losses(grid: Grid, weight: np.ndarray, hessian: np.ndarray, scales: Steps) -> np.ndarray:
  """[C, N] float32: d H d^T of each row at each candidate, H cut to diagonal blocks of `SEARCH_WIDTH`."""
  count, width = len(scales.step), min(weight.shape[1], SEARCH_WIDTH)
  loss = np.zeros((count, len(weight)), np.float32)
  chunk = max(CHUNK // (count * width), 1)
  for left in range(0, weight.shape[1], width):
    block = np.ascontiguousarray(hessian[left : left + width, left : left + width])
    for top in range(0, len(weight), chunk):
      rows = slice(top, top + chunk)
      part = np.ascontiguousarray(weight[rows, left : left + width])
      zero_point = None if scales.zero_point is None else scales.zero_point[:, rows, None]
      d = grid.values(part, scales.step[:, rows, None], scales.inv_step[:, rows, None], zero_point)
      d -= part
      flat = d.reshape(-1, d.shape[2])
      loss[:, rows] += np.vecdot(flat @ block, flat).reshape(count, -1)
  return loss


def _cap(spec: QuantSpec) -> float | None:
  """The largest magnitude of a level where scales are taken from the quantized weight itself and a larger level would raise them."""
  if not spec.dynamic:
    return None
  bound = spec.element_bound
  if spec.is_mx and spec.e8m0_rule == "ceil":
    return 2.0 ** math.floor(math.log2(bound))
  return float(math.floor(bound)) if isinstance(spec.element, IntFormat) and not spec.zero_point else None


class Plan:
  """Scales of all groups, fixed beforehand or one group at a time.

  Args:
    grid: the format.
    weight: [N, K] the weight to be quantized.
    hessian: [K, K].
    given: amax to use, or None.
    search: whether amax is searched.
    signed: whether the search may choose negative scales.
    ordered: whether columns come in another order than their own.

  Attributes:
    amax: float32 amax of all groups, as `Grid.amax` shapes it.
    lazy: `fix` is to be called when the first column of a group is reached.

  Raises:
    ValueError: `given` does not fit the weight.
  """

  def __init__(
    self, grid: Grid, weight: np.ndarray, hessian: np.ndarray, given: np.ndarray | None, search: bool, signed: bool, ordered: bool
  ) -> None:
    self.grid, self.search, self.signed = grid, search, signed
    self.hessian, weight = hessian.astype(np.float32), weight.astype(np.float32)
    self.amax = grid.amax(weight)
    if given is not None:
      if np.size(given) != self.amax.size:
        raise ValueError(f"amax of shape {list(np.shape(given))} does not fit this weight and format; need {list(self.amax.shape)}")
      self.amax = np.asarray(given, np.float32).reshape(self.amax.shape)
    step, inverse, zero_point = (np.zeros((grid.count, len(weight)), np.float32) for _ in range(3))
    self.steps = Steps(step, inverse, zero_point if grid.spec.zero_point else None)
    self.forced = np.full(weight.shape[::-1], np.nan, np.float32) if grid.pinned else None
    self.lazy = given is None and not ordered and grid.spec.scale_format != formats.UINT8 and grid.count > 1
    if not self.lazy:
      for group in range(grid.count if search else 0):
        self._choose(group, weight[:, grid.columns(group)])
      self._set(slice(0, grid.count), slice(0, weight.shape[1]), weight, self.amax)

  def fix(self, group: int, weight: np.ndarray) -> None:
    """Scales of one group from its columns [N, B] as they are now."""
    weight = np.ascontiguousarray(weight, np.float32)
    self._choose(group, weight)
    self._set(slice(group, group + 1), self.grid.columns(group), weight, self.grid.part(self.amax, group))

  def values(self, column: int, x: np.ndarray) -> np.ndarray:
    """What the weights [N] float32 of a column become."""
    group, steps = column // self.grid.width, self.steps
    zero_point = None if steps.zero_point is None else steps.zero_point[group]
    values = self.grid.values(x, steps.step[group], steps.inv_step[group], zero_point)
    return values if self.forced is None else np.where(np.isnan(self.forced[column]), values, self.forced[column])

  def _choose(self, group: int, weight: np.ndarray) -> None:
    columns = self.grid.columns(group)
    if self.search:
      amax = search_amax(self.grid, weight, self.hessian[columns, columns], self.signed)
    else:
      amax = self.grid.amax(weight)
    self.grid.part(self.amax, group)[...] = amax

  def _set(self, groups: slice, columns: slice, weight: np.ndarray, amax: np.ndarray) -> None:
    found = self.grid.steps(weight, amax)
    self.steps.step[groups], self.steps.inv_step[groups] = found.step, found.inv_step
    if self.steps.zero_point is not None:
      self.steps.zero_point[groups] = found.zero_point
    if self.forced is not None:
      group = np.arange(weight.shape[1]) // self.grid.width
      zero_point = None if found.zero_point is None else found.zero_point[group]
      nearest = self.grid.values(weight.T, found.step[group], found.inv_step[group], zero_point)
      self.forced[columns] = np.where(self.grid.peaks(weight).T, nearest, np.nan)
