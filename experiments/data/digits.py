"""scikit-learn's digits: 1797 grey images of 8x8, ten classes; a small convolutional net learns them in seconds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LAYOUTS = ("NHWC", "NCHW")


class Digits(NamedTuple):
  """Images float32 [N, 8, 8, 1] (NHWC) or [N, 1, 8, 8] (NCHW) and labels int32 [N]."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def load_digits(layout: str = "NHWC", *, test_share: float = 0.2, seed: int = 0) -> Digits:
  """The digits, shuffled, split and normalised to mean 0 and standard deviation 1 over the training images.

  Args:
    layout: "NHWC" (Flax) or "NCHW" (torch); the numbers are the same.
    test_share: share of the images that is kept for testing, in (0, 1).
    seed: of the shuffle.

  Raises:
    ImportError: scikit-learn is not installed.
    ValueError: unknown layout, or a share outside (0, 1).
  """
  if layout not in LAYOUTS:
    raise ValueError(f"layout {layout!r} is unknown; allowed are {', '.join(map(repr, LAYOUTS))}")
  if not 0 < test_share < 1:
    raise ValueError(f"test_share {test_share} is outside (0, 1)")
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ImportError("the digits images come with scikit-learn, which is not installed; run pip install scikit-learn") from error
  pixels, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(seed).permutation(len(labels))
  images = pixels[order].astype(np.float32).reshape(-1, 8, 8, 1)
  labels = labels[order].astype(np.int32)
  tests = min(max(1, round(len(labels) * test_share)), len(labels) - 1)
  seen = images[tests:]
  images = (images - seen.mean(dtype=np.float64).astype(np.float32)) / seen.std(dtype=np.float64).astype(np.float32)
  if layout == "NCHW":
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
  return Digits(images[tests:], labels[tests:], images[:tests], labels[:tests])
