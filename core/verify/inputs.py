"""Quantized inputs of a client beside the quantizer's: equal, one rounding apart, a tie that fell otherwise, or another number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import core
from core import blocks
from core.export.source import Stage
from core.quantize import block_amax

ROUNDING = 2.0**-21  # a client multiplies scale and level in another order: two roundings of float32
FLIP = 2.0**-9  # neighbouring codes of at most 8 bits are further apart, relatively; roundings of a scale are far below
_NUDGES = (1.0, 1.0 + 2.0**-21, 1.0 - 2.0**-21)  # by how much x / scale and x * (1 / scale) can be apart, and more


class Compared(NamedTuple):
  """How a client's quantized input compares.

  Attributes:
    total: number of values.
    rounded: values one rounding of a product apart.
    ties: values whose code fell otherwise because the input lies within a rounding of the middle between two codes.
    different: other numbers.
    largest: the largest difference.
  """

  total: int
  rounded: int
  ties: int
  different: int
  largest: float


def compare(x: np.ndarray, client: np.ndarray, stage: Stage) -> Compared:
  """Compare what a client makes of x with what the quantizer makes of it.

  Args:
    x: [..., K] float32.
    client: the same shape: x quantized and dequantized by the client.
    stage: the quantizer.
  """
  if client.shape != x.shape:
    return Compared(x.size, 0, 0, x.size, float("nan"))
  ours = np.asarray(core.fake_quantize(x, stage.spec, _amax(stage), tensor_amax=stage.tensor_amax))
  apart = np.abs(client.astype(np.float64) - ours)
  limit = ROUNDING * np.abs(ours)
  off = ~(apart <= limit)
  rounded = int(((apart > 0) & ~off).sum())
  ties = 0
  if off.any():
    tied = _reachable(x, client, stage) & off
    ties = int(tied.sum())
  return Compared(x.size, rounded, ties, int(off.sum()) - ties, float(apart.max(initial=0.0)))


def _amax(stage: Stage) -> np.ndarray | None:
  return None if stage.amax is None else np.asarray(stage.amax, np.float32)


def _reachable(x: np.ndarray, client: np.ndarray, stage: Stage) -> np.ndarray:
  """Where the client's value is what the quantizer would make of an input, or of a scale, one rounding away."""
  spec = stage.spec
  static = not spec.dynamic or (spec.two_level and stage.amax is not None)
  group = np.asarray(stage.amax, np.float32) if static and not spec.two_level else np.asarray(block_amax(x, spec), np.float32)
  whole = stage.amax if spec.two_level and spec.dynamic else stage.tensor_amax
  if spec.two_level and whole is None:
    whole = np.asarray(core.amax(x, spec))
  tiling = blocks.tiling(x.shape, spec)
  tiles = blocks.to_blocks(x, tiling)
  found = np.zeros(x.shape, bool)
  for scale in _NUDGES:
    made = core.scales(np.asarray(group * np.float32(scale), np.float32), spec, whole, tiles=tiles, tiling=tiling)
    for nudge in _NUDGES:
      y = np.asarray(core.fake_quantize(np.asarray(x * np.float32(nudge), np.float32), spec, scales=made))
      found |= np.abs(client.astype(np.float64) - y) <= ROUNDING * np.abs(y)
  return found


def flips(ours: np.ndarray, client: np.ndarray) -> int:
  """Number of codes that differ between two runs, of quantized and dequantized inputs."""
  return int((np.abs(client.astype(np.float64) - ours) > FLIP * np.maximum(np.abs(ours), np.abs(client))).sum())
