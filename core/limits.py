"""What is possible at a given rate: bounds and optimal scalar quantizers of a unit-variance source, by exact integration.

Three walls stand between a number format and Shannon's bound. The rate-distortion bound needs coding of long vectors (6.02 dB a bit for
a Gaussian). One number at a time costs at least 1.53 dB at high rate, even with an ideal entropy coder behind it (`entropy_coded_uniform`).
Codes of fixed length cost more: `lloyd_max` is the best set of 2^b levels, `optimal_uniform` the best evenly spaced one.

All values are computed here in float64 from erfc and exp; none is copied from a table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

from core import gaussian

DB_PER_BIT = 20 * math.log10(2)
DISTRIBUTIONS = ("gaussian", "laplace", "student")

# Highest rates of the iterations below: their tables grow as 2^bits, and 12 bits (a 2048 x 2048 system) take seconds.
MAX_LLOYD_BITS = 12
MAX_ENTROPY_CODED_BITS = 16.0


@dataclasses.dataclass(frozen=True)
class ScalarQuantizer:
  """A quantizer of N(0,1) to the nearest of a few levels.

  Attributes:
    levels: ascending.
    mse: E (x - level)^2.
  """

  levels: tuple[float, ...]
  mse: float

  @property
  def sqnr_db(self) -> float:
    return -10 * math.log10(self.mse)


@dataclasses.dataclass(frozen=True)
class OptimalScale:
  """A grid stretched for the least error on N(0,1).

  Attributes:
    scale: what the grid's levels are multiplied by.
    clip: largest magnitude of the stretched grid, in standard deviations: the amax to hand to a per-tensor quantizer.
    mse: E (x - level)^2.
  """

  scale: float
  clip: float
  mse: float

  @property
  def sqnr_db(self) -> float:
    return -10 * math.log10(self.mse)


def rate_distortion_db(rate: float) -> float:
  """Highest SQNR of a Gaussian source at `rate` bits per element, in dB: 20 log10(2) * rate. No quantizer of any kind does better.

  References: Shannon, 1959; Cover and Thomas, Elements of Information Theory, chapter on rate distortion.
  """
  return DB_PER_BIT * rate


def shannon_bound_db(rate: float, distribution: str = "gaussian", dof: int = 5) -> float:
  """Shannon's lower bound on the error of independent elements with that density, as an SQNR in dB: nothing does better.

  10 log10(2 pi e / exp(2 h)) + 6.02 rate, h the differential entropy at unit variance. For a Gaussian it is the rate-distortion function
  itself; for the others it is approached at high rate.

  Args:
    rate: bits per element.
    distribution: "gaussian", "laplace" or "student".
    dof: degrees of freedom of "student", at least 3.

  Raises:
    ValueError: unknown distribution, or one without a variance.

  References: Shannon, 1959; Berger, Rate Distortion Theory, 1971.
  """
  gain = math.log(2 * math.pi * math.e) - 2 * differential_entropy(distribution, dof)
  return DB_PER_BIT * rate + 10 * math.log10(math.e) * gain


def differential_entropy(distribution: str, dof: int = 5) -> float:
  """Differential entropy of a unit-variance density, in nats.

  Args:
    distribution: "gaussian", "laplace" or "student".
    dof: degrees of freedom of "student", at least 3 (fewer have no variance).

  Raises:
    ValueError: unknown distribution, or one without a variance.
  """
  if distribution == "gaussian":
    return 0.5 * math.log(2 * math.pi * math.e)
  if distribution == "laplace":
    return 1 + 0.5 * math.log(2)
  if distribution != "student":
    raise ValueError(f"distribution {distribution!r} is unknown; allowed are {', '.join(DISTRIBUTIONS)}")
  if dof < 3 or dof != int(dof):
    raise ValueError(f"Student's t with {dof} degrees of freedom: a whole number of at least 3 is needed, fewer have no finite variance")
  log_beta = math.lgamma(dof / 2) + math.lgamma(0.5) - math.lgamma((dof + 1) / 2)
  entropy = (dof + 1) / 2 * (_digamma_of_half(dof + 1) - _digamma_of_half(dof)) + 0.5 * math.log(dof) + log_beta
  return entropy - 0.5 * math.log(dof / (dof - 2))


def panter_dite_db(rate: float) -> float:
  """SQNR of the best 2^rate levels for a Gaussian in the limit of high rate: error (sqrt(3) pi / 2) 2^(-2 rate), 4.35 dB from the bound.

  References: Panter and Dite, 1951.
  """
  return DB_PER_BIT * rate - 10 * math.log10(math.sqrt(3) * math.pi / 2)


def entropy_coded_high_rate_db(rate: float) -> float:
  """SQNR of an entropy-coded uniform quantizer of a Gaussian in the limit of high rate: pi e / 6, or 1.53 dB, from the bound.

  References: Gish and Pierce, 1968.
  """
  return DB_PER_BIT * rate - 10 * math.log10(math.pi * math.e / 6)


def entropy_coded_uniform(step: float) -> tuple[float, float]:
  """Evenly spaced thresholds without end, a level at 0, ideal entropy coding, each cell decoded to its mean; N(0,1).

  Args:
    step: cell width in standard deviations.

  Returns:
    (entropy of the code in bits, SQNR in dB).

  Raises:
    ValueError: step is not positive.
  """
  if not step > 0:
    raise ValueError(f"step is {step}; a positive cell width is needed")
  # The source beyond 9 standard deviations holds 2e-19 of the probability and 2e-17 of the variance.
  edges = step * (np.arange(math.ceil(9 / step) + 1) + 0.5)
  mass, first, _ = gaussian.moments(edges, np.append(edges[1:], np.inf))
  centre = 1 - 2 * float(np.sum(mass))
  cells = np.append(np.repeat(mass[mass > 0], 2), centre)
  entropy = -float(np.sum(cells * np.log2(cells)))
  mse = 1 - 2 * float(np.sum(first[mass > 0] ** 2 / mass[mass > 0]))
  return entropy, -10 * math.log10(mse)


def entropy_coded_uniform_db(rate: float) -> float:
  """SQNR of `entropy_coded_uniform` at the step whose code has that entropy.

  Raises:
    ValueError: rate outside (0, 16].
  """
  if not 0 < rate <= MAX_ENTROPY_CODED_BITS:
    raise ValueError(f"rate is {rate} bits; allowed is above 0 and at most {MAX_ENTROPY_CODED_BITS:g}")
  # Entropy falls with the step. At high rate it is h - log2(step), h = 2.047 bits, so the root lies between these ends; an octave more on
  # the low side, and 20 standard deviations (entropy 1e-22) on the other.
  low, high = 2.0 ** (1 - rate), 20.0
  for _ in range(60):
    middle = math.sqrt(low * high)
    low, high = (middle, high) if entropy_coded_uniform(middle)[0] > rate else (low, middle)
  return entropy_coded_uniform(low)[1]


@functools.cache
def lloyd_max(bits: int) -> ScalarQuantizer:
  """The 2^bits levels with the least squared error on N(0,1): each level is the mean of its cell, each edge the middle of two levels.

  The fixed point of Lloyd's iteration, reached by Newton steps on it (Lloyd's own converges like 1 - 4^-bits) from the high-rate solution,
  quantiles of N(0,3). The quantizer is symmetric, so only the positive half is iterated.

  Args:
    bits: 1 to 12.

  Raises:
    ValueError: bits out of range.

  References: Lloyd, 1957 (published 1982); Max, 1960.
  """
  if not 1 <= bits <= MAX_LLOYD_BITS or bits != int(bits):
    raise ValueError(f"bits is {bits}; allowed are the whole numbers 1 to {MAX_LLOYD_BITS}")
  half = 2 ** (bits - 1)
  wide = statistics.NormalDist(0, math.sqrt(3))
  levels = np.array([wide.inv_cdf((half + i + 0.5) / (2 * half)) for i in range(half)])
  for _ in range(100):
    means, slopes = gaussian.cell_means(levels)
    newton = levels - np.linalg.solve(np.eye(half) - slopes, levels - means)
    ordered = newton[0] > 0 and bool(np.all(np.diff(newton) > 0))
    moved = newton if ordered else means
    done = float(np.max(np.abs(moved - levels))) < 1e-13
    levels = moved
    if done:
      break
  both = np.concatenate([-levels[::-1], levels])
  return ScalarQuantizer(tuple(float(v) for v in both), gaussian.mse(both))


def optimal_scale(grid: Sequence[float] | np.ndarray) -> OptimalScale:
  """The scale at which a grid errs least on N(0,1): the optimal clip of a format.

  Args:
    grid: [L] ascending levels, for example -7 to 7, or those of E2M1.

  Raises:
    ValueError: not ascending, or nothing but zero.
  """
  grid = np.asarray(grid, np.float64)
  gaussian.mse(grid)
  bound = float(np.max(np.abs(grid)))
  if bound == 0:
    raise ValueError("the grid holds nothing but zero; at least one other level is needed")

  def error(log_clip: float) -> float:
    return gaussian.mse(grid * (math.exp(log_clip) / bound))

  # Clips of 0.25 to 64 standard deviations; wide float grids want the far end. A float grid's error wobbles with the clip, so: the best of
  # a scan, then golden section around it.
  scan = np.linspace(math.log(0.25), math.log(64), 90)
  best = int(np.argmin([error(c) for c in scan]))
  clip = math.exp(_golden_section(error, float(scan[max(best - 1, 0)]), float(scan[min(best + 1, 89)])))
  return OptimalScale(clip / bound, clip, gaussian.mse(grid * (clip / bound)))


@functools.cache
def optimal_uniform(bits: int) -> OptimalScale:
  """Best step and clip of symmetric b-bit integers, codes -(2^(b-1) - 1) to 2^(b-1) - 1, on N(0,1).

  Args:
    bits: 2 to 12.

  Raises:
    ValueError: bits out of range.

  References: Max, 1960 (for an even number of levels; a signed integer grid has a level at 0 and an odd number).
  """
  if not 2 <= bits <= MAX_LLOYD_BITS or bits != int(bits):
    raise ValueError(f"bits is {bits}; allowed are the whole numbers 2 to {MAX_LLOYD_BITS}")
  top = 2 ** (bits - 1) - 1
  return optimal_scale(np.arange(-top, top + 1))


def _golden_section(function, low: float, high: float) -> float:
  """Where a function of one hump is least on [low, high], to about 1e-9 (the square root of float64's resolution limits it)."""
  ratio = (math.sqrt(5) - 1) / 2
  a, b = high - ratio * (high - low), low + ratio * (high - low)
  at_a, at_b = function(a), function(b)
  while high - low > 1e-9:
    if at_a < at_b:
      high, b, at_b = b, a, at_a
      a = high - ratio * (high - low)
      at_a = function(a)
    else:
      low, a, at_a = a, b, at_b
      b = low + ratio * (high - low)
      at_b = function(b)
  return (low + high) / 2


def _digamma_of_half(n: int) -> float:
  """psi(n / 2) for n >= 1, by psi(x + 1) = psi(x) + 1 / x from psi(1) and psi(1/2)."""
  gamma = 0.57721566490153286
  value, x = (-gamma, 1.0) if n % 2 == 0 else (-gamma - 2 * math.log(2), 0.5)
  while 2 * x < n:
    value, x = value + 1 / x, x + 1
  return value
