"""core.limits against published tables, against scipy's integrals, and against what core measures on random elements."""

from __future__ import annotations

import itertools
import math
import pathlib
import re

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import core
from core import QuantSpec, formats, gaussian, limits

# The published SQNR in dB (Max, 1960; Jayant and Noll, Digital Coding of Waveforms, 1984), printed to two digits.
LLOYD_MAX_DB = {1: 4.40, 2: 9.30, 3: 14.62, 4: 20.22}
# Max, 1960, evenly spaced levels without one at zero, by their number: (step, mean squared error), printed to four digits.
EVEN_UNIFORM = {2: (1.596, 0.3634), 4: (0.9957, 0.1188), 8: (0.5860, 0.03744), 16: (0.3352, 0.01154), 32: (0.1881, 0.003495)}


@pytest.mark.parametrize(("bits", "printed"), LLOYD_MAX_DB.items())
def test_lloyd_max_as_printed(bits, printed):
  # Half of the last printed digit.
  assert limits.lloyd_max(bits).sqnr_db == pytest.approx(printed, abs=0.005)


def test_lloyd_max_levels_as_printed():
  # Max, 1960, N = 4: 0.4528 and 1.510; half of the last printed digit.
  inner, outer = limits.lloyd_max(2).levels[2:]
  assert inner == pytest.approx(0.4528, abs=5e-5) and outer == pytest.approx(1.510, abs=5e-4)
  # One bit in closed form: levels at +-sqrt(2/pi), error 1 - 2/pi. 1e-15 is float64's resolution.
  assert limits.lloyd_max(1).levels[1] == pytest.approx(math.sqrt(2 / math.pi), rel=1e-15)
  assert limits.lloyd_max(1).mse == pytest.approx(1 - 2 / math.pi, rel=1e-14)


@pytest.mark.parametrize("bits", range(1, 11))
def test_lloyd_max_is_a_fixed_point_and_a_minimum(bits):
  found = limits.lloyd_max(bits)
  levels = np.array(found.levels)
  assert len(levels) == 2**bits and np.all(np.diff(levels) > 0) and np.array_equal(levels, -levels[::-1])
  edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
  mass, first, _ = gaussian.moments(edges[:-1], edges[1:])
  # Cells at the tail hold 1e-6 of the probability as a difference of two tails: ten digits are left of float64's sixteen.
  np.testing.assert_allclose(first / mass, levels, rtol=0, atol=1e-10)
  for shift in (1e-3, -1e-3):
    moved = levels.copy()
    moved[-1] += shift
    assert gaussian.mse(moved) > found.mse


@pytest.mark.parametrize(("count", "printed"), EVEN_UNIFORM.items())
def test_evenly_spaced_levels_as_printed(count, printed):
  found = limits.optimal_scale(np.arange(count) - (count - 1) / 2)
  # Half of the fourth digit is at most 5e-4 of the value.
  assert found.scale == pytest.approx(printed[0], rel=5e-4) and found.mse == pytest.approx(printed[1], rel=5e-4)


def test_mean_squared_error_is_that_of_numerical_integration():
  for levels in (np.array([-1.0, 0.5, 3.0]), np.array([0.0]), np.array([7.0, 9.0]), np.linspace(-3, 3, 15)):
    edges = [-40.0, *((levels[1:] + levels[:-1]) / 2), 40.0]
    cells = zip(levels, edges[:-1], edges[1:], strict=True)
    # Split at 0 and +-8, so that the integrator sees the bump inside of long cells.
    expected = sum(
      scipy.integrate.quad(lambda x, y=y: (x - y) ** 2 * scipy.stats.norm.pdf(x), *piece, epsabs=1e-13, epsrel=1e-12)[0]
      for y, low, high in cells
      for piece in _pieces(low, high)
    )
    assert gaussian.mse(levels) == pytest.approx(expected, rel=1e-9)


def _pieces(low, high):
  cuts = [low, *(c for c in (-8.0, 0.0, 8.0) if low < c < high), high]
  return list(itertools.pairwise(cuts))


@pytest.mark.parametrize("distribution", limits.DISTRIBUTIONS)
@pytest.mark.parametrize("dof", (3, 4, 5, 12))
def test_entropy_is_scipys(distribution, dof):
  source = {
    "gaussian": scipy.stats.norm(),
    "laplace": scipy.stats.laplace(scale=math.sqrt(0.5)),
    "student": scipy.stats.t(dof, scale=math.sqrt((dof - 2) / dof)),
  }[distribution]
  # Both are closed forms in float64.
  assert limits.differential_entropy(distribution, dof) == pytest.approx(float(source.entropy()), rel=1e-12)


def test_bounds_in_their_order():
  for bits in range(2, 11):
    bound = limits.rate_distortion_db(bits)
    uniform, lloyd = limits.optimal_uniform(bits).sqnr_db, limits.lloyd_max(bits).sqnr_db
    assert uniform < lloyd < limits.entropy_coded_uniform_db(bits) < bound
    # At a finite rate the best levels beat their own high-rate formula.
    assert limits.panter_dite_db(bits) < lloyd
  # A Gaussian is the hardest source of its variance.
  for distribution in limits.DISTRIBUTIONS:
    assert limits.shannon_bound_db(4, distribution) >= limits.shannon_bound_db(4) - 1e-12
  # log2(4) * 10: 6.0206 dB a bit; the two forms differ by roundings of float64.
  assert limits.shannon_bound_db(3) == pytest.approx(limits.rate_distortion_db(3), abs=1e-12) == pytest.approx(18.0618, abs=5e-5)


def test_high_rate_limits():
  # pi e / 6 and sqrt(3) pi / 2 in dB, as usually printed; half of the last digit.
  assert limits.rate_distortion_db(8) - limits.entropy_coded_high_rate_db(8) == pytest.approx(1.53, abs=0.005)
  assert limits.rate_distortion_db(8) - limits.panter_dite_db(8) == pytest.approx(4.35, abs=0.005)
  # At 8 bits the cells are narrow: the exact quantizer has converged to 1e-9 dB.
  assert limits.entropy_coded_uniform_db(8) == pytest.approx(limits.entropy_coded_high_rate_db(8), abs=1e-9)
  gaps = [limits.lloyd_max(b).sqnr_db - limits.panter_dite_db(b) for b in range(1, 11)]
  assert all(a > b for a, b in itertools.pairwise(gaps)) and gaps[-1] < 0.01


def test_everything_grows_with_the_rate():
  rates = np.linspace(0.05, 12, 25)
  for curve in (limits.rate_distortion_db, limits.entropy_coded_uniform_db, limits.panter_dite_db):
    values = [curve(r) for r in rates]
    assert all(a < b for a, b in itertools.pairwise(values))
  clips = [limits.optimal_uniform(b).clip for b in range(2, 11)]
  assert all(a < b for a, b in itertools.pairwise(clips))


def test_entropy_coding_at_low_rate():
  entropy, sqnr = limits.entropy_coded_uniform(40.0)
  # One cell from -20 to 20: nothing is sent, nothing is known.
  assert entropy == pytest.approx(0, abs=1e-12) and sqnr == pytest.approx(0, abs=1e-12)
  assert limits.entropy_coded_uniform(1.0)[0] == pytest.approx(_entropy(1.0), rel=1e-12)
  for rate in (0.1, 1.0, 3.3):
    assert limits.entropy_coded_uniform_db(rate) < limits.rate_distortion_db(rate)


def _entropy(step):
  cells = np.diff(scipy.stats.norm.cdf(step * (np.arange(-40, 41) + 0.5)))
  return float(scipy.stats.entropy(cells, base=2))


@pytest.mark.parametrize("bits", (2, 3, 4, 6, 8))
def test_core_measures_the_exact_error_at_the_optimal_clip(bits):
  x = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
  best = limits.optimal_uniform(bits)
  spec = QuantSpec(formats.int_format(bits, narrow_range=True))
  y = core.fake_quantize(x, spec, np.float32(best.clip))
  errors = (x.astype(np.float64) - y) ** 2
  # Four standard errors of the mean over independent elements.
  assert errors.mean() == pytest.approx(best.mse, abs=4 * errors.std() / math.sqrt(errors.size))
  for factor in (0.9, 1.1):
    assert gaussian.mse(np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) * best.scale * factor) > best.mse


def test_optimal_scale_of_a_float_grid():
  half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
  best = limits.optimal_scale(np.concatenate([-half[:0:-1], half]))
  wobble = [gaussian.mse(np.concatenate([-half[:0:-1], half]) * s) for s in np.linspace(0.1, 3, 400)]
  assert best.mse <= min(wobble) and best.clip == pytest.approx(6 * best.scale)
  # Less than the 16 best levels, more than the 8 best.
  assert limits.lloyd_max(4).mse < best.mse < limits.lloyd_max(3).mse


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: limits.lloyd_max(0), "bits is 0; allowed are the whole numbers 1 to 12"),
    (lambda: limits.lloyd_max(13), "bits is 13"),
    (lambda: limits.optimal_uniform(1), "bits is 1; allowed are the whole numbers 2 to 12"),
    (lambda: limits.entropy_coded_uniform(0.0), r"step is 0\.0"),
    (lambda: limits.entropy_coded_uniform(math.nan), "step is nan"),
    (lambda: limits.entropy_coded_uniform_db(0.0), r"rate is 0\.0 bits"),
    (lambda: limits.optimal_scale(np.zeros(1)), "nothing but zero"),
    (lambda: limits.optimal_scale(np.array([1.0, 1.0])), r"shape \[2\] are not a strictly ascending list"),
    (lambda: gaussian.mse(np.zeros(0)), r"shape \[0\]"),
    (lambda: limits.differential_entropy("cauchy"), "'cauchy' is unknown; allowed are gaussian, laplace, student"),
    (lambda: limits.shannon_bound_db(4, "student", 2), "2 degrees of freedom: a whole number of at least 3"),
  ],
)
def test_mistakes(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_the_example_in_the_docs_runs():
  text = (pathlib.Path(__file__).parents[2] / "docs" / "limits.md").read_text()
  (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
  exec(block, {})
  assert f"{limits.optimal_uniform(4).clip:.3f}" in block
