"""Headroom of NVFP4 activations: percentiles of block amax, in any order of the blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest

import core
from core import QuantSpec
from core.calibrate import headroom
from core.calibrate.headroom import BlockAmaxHistogram, headroom_amax
from tests.calibrate.test_histogram import f32, normal


def blocks_of(*batches) -> BlockAmaxHistogram:
  hist = BlockAmaxHistogram()
  for batch in batches:
    hist.add(np.asarray(batch, np.float32))
  return hist


def centre(value: float) -> float:
  """Centre of the bin of log2(value), 6.4 bins an octave."""
  return 2.0 ** ((math.floor((math.log2(value) + 40) * 6.4) + 0.5) / 6.4 - 40)


def test_headroom_of_known_blocks():
  hist = blocks_of(np.full(200, 0.01), np.full(9800, 3.0))  # the first 2 % are 0.01
  assert headroom_amax(hist) == np.float32(16384 * centre(0.01))
  assert headroom_amax(hist, rho=1000) == np.float32(1000 * centre(0.01))
  assert headroom_amax(hist, anchor_percentile=2.1) == np.float32(16384 * centre(3.0))
  assert headroom_amax(hist, anchor_percentile=2) == np.float32(16384 * centre(0.01))


def test_without_headroom_amax_is_the_upper_percentile():
  hist = blocks_of(np.full(500, 0.01), np.full(9498, 70.0), [5000.0, 5000.0])
  with pytest.warns(UserWarning, match=r"no headroom at rho=16384: block amax span"):
    assert headroom_amax(hist) == np.float32(centre(5000.0))
  with pytest.warns(UserWarning, match="no headroom"):
    assert headroom_amax(hist, upper_percentile=99.98, rho=1000) == np.float32(centre(70.0))
  with pytest.warns(UserWarning, match="no headroom"):
    assert headroom_amax(hist, upper_percentile=100) == 5000.0


def test_faint_blocks_are_no_anchor():
  quiet = np.full(5000, 1e-7)  # 1e7 below the upper percentile
  loud = np.full(5000, 1.0)
  assert headroom_amax(blocks_of(quiet, loud)) == headroom_amax(blocks_of(loud)) == np.float32(16384 * centre(1.0))
  assert headroom_amax(blocks_of(np.zeros(10**5), loud)) == headroom_amax(blocks_of(loud))


def test_blocks_count_in_any_order():
  rng = np.random.default_rng(0)
  x = np.concatenate([np.exp(rng.normal(size=3000) * 5), [1e-30, 1e30, 0.0]]).astype(np.float32)
  expected = blocks_of(x)
  assert expected.counts.sum() == 3002 and expected.counts[[0, -1]].tolist() == [1, 1]
  for _ in range(3):
    batches = np.array_split(rng.permutation(x), 4)
    left, right = blocks_of(*batches[:2]), blocks_of(*batches[2:])
    left.merge(right)
    assert left.counts.tolist() == expected.counts.tolist() and left.amax == expected.amax == np.float32(1e30)


def test_headroom_of_a_tensor():
  x = normal(1 << 16).reshape(64, -1)
  spec = QuantSpec.named("nvfp4")
  hist = blocks_of(core.block_amax(x, spec))
  amax = headroom_amax(hist)
  first = np.percentile(core.block_amax(x, spec), 1)
  assert amax == pytest.approx(16384 * first, rel=2 ** (5 / 64) - 1 + 1e-3)  # half a bin
  # Nothing saturates at 1000 times the data, where amax of the data does.
  loud = (x * 1000).astype(np.float32)
  error = [core.sqnr_db(loud, core.fake_quantize(loud, spec, np.float32(a))) for a in (amax, np.abs(x).max())]
  assert error[0] > 18 and error[1] < 1


def test_headroom_errors():
  hist = blocks_of([1.0])
  for rho in (0, -1, 28672, math.nan):
    with pytest.raises(ValueError, match=f"rho is {rho}.*below 28672"):
      headroom_amax(hist, rho=rho)
  with pytest.raises(ValueError, match="anchor_percentile is 0; allowed"):
    headroom_amax(hist, anchor_percentile=0)
  with pytest.raises(ValueError, match="upper_percentile is 101; allowed"):
    headroom_amax(hist, upper_percentile=101)
  with pytest.raises(ValueError, match="empty"):
    headroom_amax(BlockAmaxHistogram())
  with pytest.raises(ValueError, match="1 NaN and 2 infinite"):
    hist.add(f32(np.inf, np.nan, np.inf))
  with pytest.raises(ValueError, match="1 of 2 block amax are negative, the least is -2"):
    hist.add(f32(1, -2))
  assert hist.counts.sum() == 1 and headroom_amax(blocks_of([0.0])) == 0 and headroom.RHO == 16384
