"""Adam's direction, and the cosine that its callers let the step length follow."""

from __future__ import annotations

import math

import numpy as np

DECAY_MEAN, DECAY_SQUARE = 0.9, 0.99  # short memories: there are tens of steps, not thousands


class Adam:
  """Running mean and square of a gradient.

  References: Kingma and Ba, 2014, arXiv:1412.6980.

  Args:
    shape: of the gradient.
    dtype: of the running values and the direction.
    epsilon: added to the root of the square, in units of the gradient.
  """

  def __init__(self, shape: tuple[int, ...], dtype: type = np.float32, epsilon: float = 1e-12) -> None:
    self._mean, self._square = np.zeros(shape, dtype), np.zeros(shape, dtype)
    self._epsilon = dtype(epsilon)
    self._count = 0

  def direction(self, gradient: np.ndarray) -> np.ndarray:
    """Mean over root mean square of the gradients so far, both without their bias to zero: about its sign. Step against it."""
    kind = self._mean.dtype.type
    self._count += 1
    self._mean += kind(1 - DECAY_MEAN) * (gradient - self._mean)
    self._square += kind(1 - DECAY_SQUARE) * (gradient * gradient - self._square)
    mean = self._mean / kind(1 - DECAY_MEAN**self._count)
    return mean / (np.sqrt(self._square / kind(1 - DECAY_SQUARE**self._count)) + self._epsilon)


def cosine(rate: float, done: int, steps: int) -> float:
  """Step length after `done` of `steps` steps: from `rate` down to 0."""
  return rate * 0.5 * (1 + math.cos(math.pi * done / steps))
