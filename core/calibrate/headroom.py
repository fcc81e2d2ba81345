"""Headroom for NVFP4 activations: a tensor amax above the largest block seen, so that louder blocks do not saturate.

amax = max(rho * P1, P99.99), percentiles over the block amax (blocks of 16). NVFP4 stores a block scale as E4M3 times a tensor scale:
normal block scales span 448 / 2^-6 = 28672. rho * P1 puts a quiet block (the anchor) rho below the top of that span, and leaves
the rest above the data as headroom.

Reference: nvidia-modelopt 0.47, nvfp4_act_headroom. We decide the bin in float64 where it uses float32.
"""

from __future__ import annotations

import warnings

import numpy as np

from core.arrays import Array, to_numpy
from core.calibrate.histogram import finite_max, rank_bin

NUM_BINS, LOG2_MIN, LOG2_MAX = 512, -40.0, 40.0
RHO = 16384.0
RHO_LIMIT = 28672.0  # largest over smallest normal E4M3
FLOOR_RATIO = 1e6  # blocks so far below the upper percentile are no anchor


class BlockAmaxHistogram:
  """Running histogram of log2(block amax): 512 bins over [-40, 40]; what lies outside is counted in the first or last.

  Batches in any order give the same counts.

  Attributes:
    counts: [512] int64, blocks that are not all zero.
    amax: largest block amax, exactly; None before the first block.
  """

  def __init__(self) -> None:
    self.counts = np.zeros(NUM_BINS, np.int64)
    self.amax: float | None = None

  def add(self, block_amax: Array) -> None:
    """Counts one batch.

    Args:
      block_amax: [...] float32 >= 0, as `core.block_amax` gives it.

    Raises:
      ValueError: NaN, infinite or negative entries; nothing of the batch is counted.
    """
    values = to_numpy(block_amax).astype(np.float32, copy=False).reshape(-1)
    if not values.size:
      return
    largest, negative = finite_max(values), int((values < 0).sum())
    if negative:
      raise ValueError(f"{negative} of {values.size} block amax are negative, the least is {values.min()}; give magnitudes, not values")
    self.amax = largest if self.amax is None else max(self.amax, largest)
    self.counts += np.bincount(_bin(values[values > 0]), minlength=NUM_BINS)

  def merge(self, other: BlockAmaxHistogram) -> None:
    """Adds another histogram's counts, as if its blocks had come here."""
    if other.amax is not None:
      self.amax = other.amax if self.amax is None else max(self.amax, other.amax)
      self.counts += other.counts


def headroom_amax(hist: BlockAmaxHistogram, rho: float = RHO, anchor_percentile: float = 1.0, upper_percentile: float = 99.99) -> float:
  """Tensor amax: max(rho * anchor, upper).

  Args:
    hist: histogram of block amax.
    rho: how far the anchor stands below the top, in (0, 28672).
    anchor_percentile: of the quiet block, in (0, 100]; blocks below upper / 1e6 are not counted for it.
    upper_percentile: of the loudest block that must not saturate, in (0, 100]; 100 is the largest one exactly.

  Returns:
    amax, representable in float32; 0 where nothing but zeros came. Percentiles are bin centres, within 2^(5/64) (5.6 %).
    A warning says where rho * anchor is not above upper, so that there is no headroom.

  Raises:
    ValueError: an argument out of range, or an empty histogram.
  """
  if not 0 < rho < RHO_LIMIT:
    raise ValueError(f"rho is {rho}; allowed is above 0 and below {RHO_LIMIT:g}, the span of E4M3 block scales; {RHO:g} is usual")
  for name, value in (("anchor_percentile", anchor_percentile), ("upper_percentile", upper_percentile)):
    if not 0 < value <= 100:
      raise ValueError(f"{name} is {value}; allowed is above 0 and at most 100")
  if hist.amax is None:
    raise ValueError("the histogram of block amax is empty, so there is no amax; run calibration data through the layer first")
  if hist.amax == 0:
    return 0.0
  upper = hist.amax if upper_percentile == 100 else _centre(rank_bin(hist.counts, upper_percentile))
  heard = np.where(np.arange(NUM_BINS) < _bin(np.array([upper / FLOOR_RATIO]))[0], 0, hist.counts)
  anchor = _centre(rank_bin(heard, anchor_percentile))
  if rho * anchor <= upper:
    warnings.warn(
      f"no headroom at rho={rho:g}: block amax span {upper / anchor:.4g} from the {anchor_percentile:g}th to the {upper_percentile:g}th "
      f"percentile, so amax is the upper one; raise anchor_percentile, or raise rho (below {RHO_LIMIT:g}), or smooth the outliers first",
      stacklevel=2,
    )
  return float(np.float32(max(rho * anchor, upper)))


def _bin(values: np.ndarray) -> np.ndarray:
  """Bin of each positive value. In float64; the edges at whole powers of two, every 32 bins, are met exactly."""
  place = (np.log2(values.astype(np.float64)) - LOG2_MIN) / (LOG2_MAX - LOG2_MIN) * NUM_BINS
  return np.clip(place, 0, NUM_BINS - 1).astype(np.intp)


def _centre(index: int) -> float:
  return 2.0 ** (LOG2_MIN + (index + 0.5) / NUM_BINS * (LOG2_MAX - LOG2_MIN))
