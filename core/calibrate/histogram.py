"""Histogram calibration of a per-tensor amax: a running histogram of |x|, and amax by percentile, entropy or least squared error.

Bins are [k w, (k + 1) w), w = 2^e a power of two. e is the smallest exponent whose bins cover the largest value seen, so it depends on that
value only, and going from e to e + 1 merges neighbouring bins exactly. Hence batches in any order, or histograms merged in any order, give
the same counts. The price: the data spans between half of the bins and all of them.

amax is chosen from the edges and the largest value. An amax above the largest value is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

import core
from core.arrays import Array, to_numpy
from core.formats import CodebookFormat, FloatFormat, IntFormat
from core.spec import QuantSpec

NUM_BINS = 2048
MIN_EXPONENT = -126  # 2^-e stays finite in float32; values far below count as one bin
_CHUNK = 1 << 15  # values binned at a time: their indices stay in the cache
_TABLE = 1 << 17  # bin centres quantized at a time

# Methods, and the options of each.
OPTIONS = {"max": (), "percentile": ("percentile",), "entropy": ("start_bin", "stride"), "mse": ("start_bin", "stride")}


class Histogram:
  """Running histogram of |x| on the host.

  Args:
    num_bins: number of bins, at least 2.
    skip_zeros: leave exact zeros out of the counts, so that percentiles are those of the other values.

  Attributes:
    counts: [num_bins] int64.
    exponent: bin width is 2^exponent.
    amax: largest magnitude seen, exactly (not a bin edge); None before the first value.

  Raises:
    ValueError: fewer than 2 bins.
  """

  def __init__(self, num_bins: int = NUM_BINS, skip_zeros: bool = False) -> None:
    if not isinstance(num_bins, int) or isinstance(num_bins, bool) or num_bins < 2:
      raise ValueError(f"num_bins is {num_bins!r}; a whole number of at least 2 is needed, {NUM_BINS} is usual")
    self.skip_zeros = skip_zeros
    self.counts = np.zeros(num_bins, np.int64)
    self.exponent = MIN_EXPONENT
    self.amax: float | None = None

  @property
  def num_bins(self) -> int:
    return len(self.counts)

  @property
  def width(self) -> float:
    """Width of a bin, in units of x."""
    return math.ldexp(1.0, self.exponent)

  @property
  def total(self) -> int:
    """Number of values counted."""
    return int(self.counts.sum())

  def add(self, x: Array) -> None:
    """Counts one batch.

    Args:
      x: [...] floating point array of numpy, torch or JAX; counted as float32.

    Raises:
      ValueError: NaN or infinity; nothing of the batch is counted.
    """
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which is refused
      values = to_numpy(x).astype(np.float32, copy=False).reshape(-1)
    if not values.size:
      return
    largest = finite_max(values)
    self._cover(largest)
    scale, buffer = np.float32(math.ldexp(1.0, -self.exponent)), np.empty(_CHUNK, np.float32)
    for start in range(0, values.size, _CHUNK):
      chunk = values[start : start + _CHUNK]
      scaled = np.abs(chunk, out=buffer[: chunk.size])
      scaled *= scale  # a power of two: exact, or far inside bin 0
      self.counts += np.bincount(scaled.astype(np.intp), minlength=self.num_bins)
    if self.skip_zeros:
      self.counts[0] -= values.size - np.count_nonzero(values)

  def merge(self, other: Histogram) -> None:
    """Adds another histogram's counts, as if its values had come here.

    Raises:
      ValueError: it has another number of bins, or treats zeros otherwise.
    """
    mine, theirs = (self.num_bins, self.skip_zeros), (other.num_bins, other.skip_zeros)
    if mine != theirs:
      raise ValueError(f"cannot merge histograms whose (num_bins, skip_zeros) are {mine} and {theirs}; gather both with the same")
    if other.amax is not None:
      self._cover(other.amax)
      self.counts += _coarser(other.counts, self.exponent - other.exponent)

  def _cover(self, largest: float) -> None:
    """Widens the bins until they hold `largest`: doublings, each of which merges pairs."""
    self.amax = largest if self.amax is None else max(self.amax, largest)
    fits = math.frexp(largest / self.num_bins)[1] if largest else MIN_EXPONENT
    needed = max(self.exponent, fits)
    self.counts = _coarser(self.counts, needed - self.exponent)
    self.exponent = needed


def finite_max(values: np.ndarray) -> float:
  """Largest magnitude of a batch.

  Args:
    values: [n > 0] float32.

  Raises:
    ValueError: NaN or infinity, with their numbers.
  """
  largest = float(np.maximum(values.max(), -values.min()))  # both carry NaN
  if not math.isfinite(largest):
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    raise ValueError(
      f"a calibration batch of {values.size} values holds {nan} NaN and {infinite} infinite (beyond float32's range) ones; "
      "a histogram needs finite values: drop such batches, or run the model in a wider dtype"
    )
  return abs(largest)


def rank_bin(counts: np.ndarray, percentile: float) -> int:
  """The bin that holds the value of that percentile: the first up to which at least percentile % of the values lie.

  The percentile is taken as the decimal that it is written as, so 99.99 % of 10000 values are 9999 of them and not one more.

  Raises:
    ValueError: percentile outside (0, 100].
  """
  if not 0 < percentile <= 100:
    raise ValueError(f"percentile is {percentile}; allowed is above 0 and at most 100, for example 99.99")
  rank = math.ceil(Fraction(str(float(percentile))) * int(counts.sum()) / 100)
  return int(np.searchsorted(np.cumsum(counts), rank))


def amax_of(hist: Histogram, spec: QuantSpec, method: str = "percentile", **options: Any) -> float:
  """amax by the method of that name.

  Args:
    hist: histogram of |x|.
    spec: specification that amax is for: per tensor, or ("max", "percentile") dynamic two-level, for its tensor amax.
    method: "max", "percentile", "entropy" or "mse".
    options: those of the method: percentile; start_bin and stride.

  Returns:
    amax, representable in float32; 0 where nothing but zeros came.

  Raises:
    ValueError: unknown method or option, a specification that needs another amax, an empty histogram, or what the method raises.
  """
  if method not in OPTIONS:
    raise ValueError(f"unknown histogram method {method!r}; allowed are {', '.join(OPTIONS)}")
  unknown = sorted(set(options) - set(OPTIONS[method]))
  if unknown:
    allowed = ", ".join(OPTIONS[method]) or "none"
    raise ValueError(f"histogram method {method!r} does not know the options {', '.join(unknown)}; allowed: {allowed}")
  _check_one_amax(spec, method)
  if method == "max":
    return _seen(hist)
  if method == "percentile":
    return amax_percentile(hist, **options)
  return (amax_entropy if method == "entropy" else amax_mse)(hist, spec, **options)


def amax_percentile(hist: Histogram, percentile: float = 99.99) -> float:
  """The amax within which at least percentile % of the magnitudes lie: upper edge of the bin of that rank, or the largest value.

  Differs from nvidia-modelopt, which takes the bin's lower edge, so that 100 % clips the largest value.

  Raises:
    ValueError: percentile outside (0, 100], or an empty histogram.
  """
  largest = _seen(hist)
  return min((rank_bin(hist.counts, percentile) + 1) * hist.width, largest)


def amax_mse(hist: Histogram, spec: QuantSpec, start_bin: int = 1, stride: int = 1) -> float:
  """The amax of least `expected_error`. The largest value is always tried, so this is never worse than "max" in that measure.

  Args:
    hist: histogram of |x|.
    spec: per-tensor specification.
    start_bin: smallest amax tried, in bins.
    stride: step between those tried, in bins.

  Raises:
    ValueError: a specification that is not per tensor, an empty histogram, or start_bin or stride below 1.
  """
  _check_magnitudes(spec, "mse")
  candidates, _ = _candidates(hist, start_bin, stride)
  if candidates[-1] == 0:
    return 0.0
  return float(candidates[np.argmin(expected_error(hist, spec, candidates))])


def expected_error(hist: Histogram, spec: QuantSpec, amax: float | np.ndarray) -> np.ndarray:
  """Mean of (Q(c) - c)^2 over the counts, c the bin centres and Q `core.fake_quantize` under each amax.

  Args:
    hist: histogram of |x|.
    spec: per-tensor specification. Stochastic rounding is judged as rounding to nearest.
    amax: [C], or one number.

  Returns:
    [C] float64, in squared units of x.

  Raises:
    ValueError: a specification that is not per tensor, or an empty histogram.
  """
  _check_magnitudes(spec, "mse")
  _seen(hist)
  centres = _centres(hist).astype(np.float64)
  counts = hist.counts[: centres.size].astype(np.float64)
  errors = [(np.square(table - centres) * counts).sum(axis=1) for table in _tables(hist, spec, np.atleast_1d(amax))]
  return np.concatenate(errors) / max(hist.total, 1)


def amax_entropy(hist: Histogram, spec: QuantSpec, start_bin: int | None = None, stride: int = 1) -> float:
  """The amax of least KL(P || Q), after TensorRT; of equal ones the largest.

  For an amax of i bins, P is the counts of the first i bins, with everything clipped added to the last of them. Q is what is left of the
  counts when bins whose centres `core.fake_quantize` takes to the same level share their count evenly, over the bins not empty in P. The
  first bin is given the count of the second before: zeros are exact under every amax and would drown the rest.

  Differs from TensorRT and nvidia-modelopt, which cut i bins into 2^(b-1) equal groups: our groups are the cells of the format itself, so
  level 0 has half a cell and float formats work (the peer raises TypeError for FP8). KL knows no distances and bounds no squared error; on
  1e5 normal values its minimum is shallow, and the choice moves by a tenth of amax with the sample.

  Args:
    hist: histogram of |x|.
    spec: per-tensor specification. Stochastic rounding is judged as rounding to nearest.
    start_bin: smallest amax tried, in bins; None is the number of the format's magnitudes (128 for INT8 and E4M3, 256 for UINT8).
    stride: step between those tried, in bins.

  Raises:
    ValueError: a specification that is not per tensor, an empty histogram, or start_bin or stride below 1.

  References: Migacz, 8-bit Inference with TensorRT, GTC 2017.
  """
  element = _check_magnitudes(spec, "entropy")
  first = 1 << (element.bits - int(element.signed)) if start_bin is None else start_bin
  candidates, used = _candidates(hist, first, stride)
  counts = hist.counts.astype(np.float64)
  counts[0] = counts[1]
  if candidates[-1] == 0 or not counts.any():
    return float(candidates[-1])
  rows = (row for table in _tables(hist, spec, candidates) for row in table)
  divergences = np.array([_divergence(counts[:i], row[:i], counts.sum()) for i, row in zip(used, rows, strict=True)])
  return float(candidates[::-1][np.argmin(divergences[::-1])])


def _divergence(counts: np.ndarray, levels: np.ndarray, total: float) -> float:
  """KL(P || Q) in nats.

  Args:
    counts: [i] float64, of the bins below amax.
    levels: [i] their quantized centres, ascending, not negative.
    total: all counts, those above amax included.
  """
  kept = counts.sum()
  p = counts.copy()
  p[-1] += total - kept
  starts = np.flatnonzero(np.diff(levels, prepend=-1.0))
  filled = p > 0
  shares = np.add.reduceat(counts, starts) / np.maximum(np.add.reduceat(filled, starts, dtype=np.int64), 1)
  q = np.repeat(shares, np.diff(starts, append=levels.size))[filled]
  p = p[filled]
  if not np.all(q > 0):
    return math.inf
  return float(np.sum(p * np.log(p / q)) / total + math.log(kept / total))


def _candidates(hist: Histogram, start_bin: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
  """amax to try, ascending, ending with the largest value, and how many bins lie below each."""
  if start_bin < 1 or stride < 1:
    raise ValueError(f"start_bin is {start_bin} and stride {stride}; both are counted in bins and must be at least 1")
  largest = _seen(hist)
  last = int(largest / hist.width)
  used = np.append(np.arange(start_bin, last + 1, stride), last + 1)
  candidates = used * hist.width
  candidates[-1] = largest
  return candidates, used


def _tables(hist: Histogram, spec: QuantSpec, amax: np.ndarray) -> Iterator[np.ndarray]:
  """Quantized bin centres under each amax: pieces [some of C, bins up to the largest value] float32."""
  centres, rows = _centres(hist), spec.replace(axis=(0,), rounding="nearest")
  step = max(_TABLE // centres.size, 1)
  for start in range(0, len(amax), step):
    some = np.asarray(amax[start : start + step], np.float32).reshape(-1, 1)
    yield core.fake_quantize(np.broadcast_to(centres, (len(some), centres.size)), rows, some)


def _centres(hist: Histogram) -> np.ndarray:
  """Centres of the bins up to the largest value, that of the last one not above it. float32."""
  largest = _seen(hist)
  return np.minimum((np.arange(int(largest / hist.width) + 1) + 0.5) * hist.width, largest).astype(np.float32)


def _coarser(counts: np.ndarray, doublings: int) -> np.ndarray:
  """Counts of bins 2^doublings times as wide, as many bins."""
  if not doublings:
    return counts
  coarse = np.zeros_like(counts)
  np.add.at(coarse, np.arange(len(counts)) >> min(doublings, 62), counts)
  return coarse


def _seen(hist: Histogram) -> float:
  if hist.amax is None:
    raise ValueError("the histogram is empty, so there is no amax; run calibration data through the layer first")
  return hist.amax


def _check_one_amax(spec: QuantSpec, method: str) -> None:
  """A histogram gives one number: the whole tensor's amax, or the tensor amax of a dynamic two-level format by "max" and "percentile"."""
  if spec.zero_point:
    raise ValueError(f"histogram method {method!r} sees magnitudes; {spec.element.name} has a zero point ({spec}); calibrate it by max")
  tensor_amax = spec.two_level and spec.dynamic and method in ("max", "percentile")
  if (spec.axis is None and spec.blocks is None) or tensor_amax:
    return
  granularity = f"axis={spec.axis}" if spec.blocks is None else f"blocks={dict(spec.blocks)}"
  raise ValueError(
    f"histogram method {method!r} chooses one amax for the whole tensor; the {spec.element.name} specification has {granularity} "
    f"({spec}); use a per-tensor specification, or calibrate it by max"
  )


def _check_magnitudes(spec: QuantSpec, method: str) -> IntFormat | FloatFormat:
  """The element format of a per-tensor specification whose error a histogram of magnitudes can tell."""
  _check_one_amax(spec, method)
  if isinstance(spec.element, CodebookFormat):
    raise ValueError(
      f"histogram method {method!r} sees magnitudes; {spec.element.name} has a codebook, which need not be symmetric ({spec}); "
      "use an integer or float format, or method 'max' or 'percentile'"
    )
  return spec.element
