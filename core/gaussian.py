"""Integrals over the standard normal density, exact to float64: what `core.limits` stands on."""

from __future__ import annotations

import math

import numpy as np


def mse(levels: np.ndarray) -> float:
  """E (x - nearest level)^2 for x from N(0,1), exactly.

  Args:
    levels: [L] ascending; values beyond the ends saturate.

  Raises:
    ValueError: no levels, or not ascending.
  """
  levels = np.asarray(levels, np.float64)
  if levels.ndim != 1 or levels.size == 0 or not np.all(np.diff(levels) > 0):
    raise ValueError(f"levels of shape {list(levels.shape)} are not a strictly ascending list; sort them and drop doubles")
  edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
  mass, first, second = moments(edges[:-1], edges[1:])
  return float(np.sum(second - 2 * levels * first + levels**2 * mass))


def density(x: np.ndarray) -> np.ndarray:
  return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


_erfc = np.frompyfunc(math.erfc, 1, 1)


def moments(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Integrals of p(x), x p(x) and x^2 p(x) of N(0,1) over [low, high], elementwise; the ends may be infinite."""
  # Upper tails of the mirrored interval: no cancellation against 1 far out on either side.
  left = high <= 0
  near, far = np.where(left, -high, low), np.where(left, -low, high)
  mass = 0.5 * np.asarray(_erfc(near / math.sqrt(2)) - _erfc(far / math.sqrt(2)), np.float64)
  p_low, p_high = density(low), density(high)
  ends = [np.where(np.isfinite(x), x, 0.0) * p for x, p in ((low, p_low), (high, p_high))]
  return mass, p_low - p_high, mass + ends[0] - ends[1]


def cell_means(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means of the cells around positive levels (the first cell starts at 0), and their derivatives by the levels.

  Args:
    levels: [H] ascending, positive.

  Returns:
    [H] means and [H, H] derivatives (row: mean, column: level), tridiagonal.
  """
  middles = (levels[1:] + levels[:-1]) / 2
  low, high = np.concatenate([[0.0], middles]), np.concatenate([middles, [np.inf]])
  mass, first, _ = moments(low, high)
  means = first / mass
  # An edge moves by half of either neighbour's move; moving it by t moves the mean by p(edge) |edge - mean| t / mass.
  by_low = 0.5 * (density(low) * (means - low) / mass)[1:]
  by_high = 0.5 * (density(middles) * (middles - means[:-1]) / mass[:-1])
  slopes = np.diag(by_low, -1) + np.diag(by_high, 1)
  slopes += np.diag(np.append(0.0, by_low) + np.append(by_high, 0.0))
  return means, slopes
