"""Histogram calibration: counts in any order, amax by every method against references written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import core
from core import QuantSpec, formats, gaussian, limits
from core.calibrate.histogram import Histogram, amax_entropy, amax_mse, amax_of, amax_percentile, expected_error

INT8 = QuantSpec.named("int8")
SPECS = {
  "int8": INT8,
  "int4": QuantSpec(formats.INT4),
  "int3": QuantSpec(formats.int_format(3)),
  "uint8": QuantSpec(formats.UINT8),
  "uint4": QuantSpec(formats.int_format(4, signed=False)),
  "narrow": QuantSpec(formats.int_format(8, narrow_range=True)),
  "e4m3": QuantSpec.named("fp8_e4m3"),
  "e5m2": QuantSpec.named("fp8_e5m2"),
  "e2m1": QuantSpec(formats.E2M1),
  "bound": INT8.replace(bound=127.5),
}
METHODS = ("max", "percentile", "entropy", "mse")


def f32(*values: float) -> np.ndarray:
  return np.array(values, np.float32)


def largest(hist: Histogram) -> float:
  assert hist.amax is not None
  return hist.amax


def of(*batches, num_bins: int = 2048, skip_zeros: bool = False) -> Histogram:
  hist = Histogram(num_bins, skip_zeros)
  for batch in batches:
    hist.add(np.asarray(batch, np.float32))
  return hist


def state(hist: Histogram):
  return hist.exponent, hist.amax, hist.counts.tolist()


def normal(n: int = 20000, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def exact_gaussian() -> Histogram:
  """Counts of |N(0,1)| up to 8, without sampling: 1e15 times the integral over each bin."""
  hist = of([7.999])
  edges = np.arange(hist.num_bins + 1) * hist.width
  hist.counts[:] = np.rint(2e15 * gaussian.moments(edges[:-1], edges[1:])[0])
  return hist


# Counts


def test_counts_are_those_of_numpy():
  x = normal()
  hist = of(x)
  assert hist.width == 2.0**-8 and hist.amax == np.abs(x).max() and hist.total == x.size  # 2048 / 256 = 8 holds 4.1, 4 does not
  np.testing.assert_array_equal(hist.counts, np.histogram(np.abs(x), 2048, (0, 8))[0])


@pytest.mark.parametrize("num_bins", [2, 7, 100, 2048])
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_any_order_of_batches_gives_the_same_counts(num_bins, skip_zeros):
  x = np.concatenate([normal(500) * scale for scale in (1e-3, 1.0, 300.0)] + [np.zeros(30), [2.0**40, 8.0, 1e-40]]).astype(np.float32)
  rng = np.random.default_rng(1)
  expected = of(x, num_bins=num_bins, skip_zeros=skip_zeros)
  for _ in range(5):
    batches = np.split(rng.permutation(x), np.sort(rng.integers(0, x.size, 7)))
    found = of(*batches, num_bins=num_bins, skip_zeros=skip_zeros)
    assert state(found) == state(expected)
    left, right = of(*batches[:3], num_bins=num_bins, skip_zeros=skip_zeros), of(*batches[3:], num_bins=num_bins, skip_zeros=skip_zeros)
    right.merge(left)
    assert state(right) == state(expected)


@pytest.mark.parametrize("num_bins", [2, 5, 2048])
def test_range_grows_by_doubling(num_bins):
  hist = Histogram(num_bins)
  width = None
  for k in range(-20, 20):
    hist.add(f32(1.5 * 2.0**k))
    assert hist.amax == 1.5 * 2.0**k and hist.amax < num_bins * hist.width and hist.amax >= num_bins * hist.width / 2
    assert width is None or hist.width == 2 * width
    width = hist.width
  assert hist.total == 40


def test_the_range_is_half_open():
  """A power of two opens the next range: at the very edge, clamping it into the last bin would make the order of batches matter."""
  assert of([8.0], num_bins=8).width == 2.0 and of([np.nextafter(np.float32(8), np.float32(0))], num_bins=8).width == 1.0
  assert state(of([8.0], [20.0], num_bins=8)) == state(of([20.0], [8.0], num_bins=8))


def test_extreme_values_are_counted():
  x = f32(1e-45, 2e-39, 3.4e38, -3.4e38)
  assert state(of(x)) == state(of(*x[:, None])) and of(x).counts[[0, -1]].tolist() == [2, 0] and of(x).total == 4


def test_zeros_can_be_left_out():
  x = f32(0.0, -0.0, 0.0, 1e-30, -1.0)
  assert of(x).total == 5 and of(x, skip_zeros=True).total == 2
  zeros, ones = np.zeros(900), np.ones(100)
  assert amax_percentile(of(zeros, ones), 50) == 2.0**-10 and amax_percentile(of(zeros, ones, skip_zeros=True), 50) == 1
  assert state(of(zeros, [1e-6])) == state(of([1e-6], zeros))  # zeros ask for no range


def test_torch_and_narrow_dtypes_are_taken():
  x = torch.from_numpy(normal())
  expected, found = Histogram(), Histogram()
  expected.add(x.bfloat16().float().numpy())
  found.add(x.bfloat16().reshape(2, -1))
  assert state(found) == state(expected)
  wide = Histogram()
  wide.add(x.double())
  assert state(wide) == state(of(x))


def test_what_is_not_finite_is_refused_and_nothing_is_counted():
  hist = of(normal())
  before = state(hist)
  with pytest.raises(ValueError, match="batch of 5 values holds 2 NaN and 1 infinite"):
    hist.add(f32(1, np.nan, np.nan, -np.inf, 1e30))
  with pytest.raises(ValueError, match="0 NaN and 1 infinite"):
    hist.add(np.array([1e300]))
  hist.add(np.zeros((0, 3), np.float32))
  assert state(hist) == before


@pytest.mark.parametrize("num_bins", [1, 0, 2.5, True])
def test_too_few_bins(num_bins):
  with pytest.raises(ValueError, match=r"num_bins is .* at least 2"):
    Histogram(num_bins)


def test_unlike_histograms_do_not_merge():
  with pytest.raises(ValueError, match=r"\(8, False\) and \(8, True\)"):
    Histogram(8).merge(Histogram(8, skip_zeros=True))
  hist = of([1.0], num_bins=8)
  hist.merge(Histogram(8))
  assert state(hist) == state(of([1.0], num_bins=8))


# Percentile


@pytest.mark.parametrize("percentile", [1e-6, 1, 50, 90, 99.9, 99.99, 100])
def test_percentile_is_that_of_the_sample_within_a_bin(percentile):
  x = normal()
  hist = of(x)
  # numpy's product n * 0.999 rounds up past a whole rank and takes the next value; a hair less does not
  exact = np.percentile(np.abs(x), percentile * (1 - 1e-12), method="inverted_cdf")
  found = amax_percentile(hist, percentile)
  assert exact <= found <= exact + hist.width
  assert np.mean(np.abs(x) <= found) * 100 >= percentile


def test_percentile_of_known_counts():
  hist = of(np.arange(1, 10001))  # width 8, values 1 to 10000
  assert amax_percentile(hist, 99.99) == 10000 and amax_percentile(hist, 50) == 5008 and amax_percentile(hist, 100) == 10000
  two = of(np.full(9999, 0.5), [100.0])
  assert (
    amax_percentile(two, 99.99) == 0.5 + two.width and amax_percentile(two, 99.991) == 100
  )  # 0.5 is a lower edge; 9999 values, not one more


@pytest.mark.parametrize("percentile", [0, -1, 100.5, math.nan])
def test_percentile_out_of_range(percentile):
  with pytest.raises(ValueError, match=r"percentile is .* above 0 and at most 100"):
    amax_percentile(of([1.0]), percentile)


def test_values_of_the_peer_on_its_sample():
  """nvidia-modelopt 0.47 on this sample: entropy 4.344, percentile 3.930, max 4.563; its mse gives 0.286 by a swapped argument."""
  torch.manual_seed(0)
  hist = Histogram()
  hist.add(torch.randn(100000))
  assert amax_of(hist, INT8, "max") == pytest.approx(4.563, abs=1e-3)
  # The 99990th of 100000 values is 3.8847 and the next 3.9300; the peer's float sum of counts just misses 0.9999 and goes on to the next.
  assert amax_percentile(hist) == pytest.approx(3.930, abs=0.05)
  # KL has a shallow minimum there: the peer itself gives 4.57 on our bins, and 4.15 on another sample of this size.
  assert amax_entropy(hist, INT8) == pytest.approx(4.344, abs=0.3)
  assert amax_mse(hist, INT8) == pytest.approx(limits.optimal_uniform(8).clip, rel=0.02)


# Entropy


def kl_of_reference(counts: list[int], amax: float, bins: int, width: float, top: float, spec: QuantSpec) -> float:
  """KL(P || Q) with dictionaries: one candidate, straight from the definition."""
  counts = [counts[1], *counts[1:]]
  groups: dict[float, list[int]] = {}
  for k in range(bins):
    centre = f32(min((k + 0.5) * width, top))
    groups.setdefault(float(core.fake_quantize(centre, spec, np.float32(amax))[0]), []).append(k)
  p = [float(c) for c in counts[:bins]]
  p[-1] += sum(counts[bins:])
  q = [0.0] * bins
  for members in groups.values():
    filled = [k for k in members if p[k] > 0]
    for k in filled:
      q[k] = sum(counts[j] for j in members) / len(filled)
  if any(b == 0 for a, b in zip(p, q, strict=True) if a > 0):
    return math.inf
  return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("start, stride", [(1, 1), (5, 3)])
def test_entropy_is_the_reference(name, start, stride):
  for seed, values in enumerate((normal(3000), np.random.default_rng(2).standard_t(3, 800), np.random.default_rng(3).uniform(0, 1.3, 500))):
    hist = of(values, num_bins=64)
    last = int(np.flatnonzero(hist.counts)[-1])
    bins = [*range(start, last + 1, stride), last + 1]
    amaxes = [k * hist.width for k in bins[:-1]] + [largest(hist)]
    counts = [int(c) for c in hist.counts]
    divergences = [kl_of_reference(counts, a, k, hist.width, largest(hist), SPECS[name]) for a, k in zip(amaxes, bins, strict=True)]
    found = amax_entropy(hist, SPECS[name], start_bin=start, stride=stride)
    assert found in amaxes
    # sums in another order: of candidates that tie to rounding either may come out
    assert divergences[amaxes.index(found)] == pytest.approx(min(divergences), rel=1e-9, abs=1e-12), (name, seed)


def test_entropy_ignores_a_spike_at_zero():
  x = normal()
  assert amax_entropy(of(x, np.zeros(10**6)), INT8) == amax_entropy(of(x), INT8)


def test_entropy_clips_an_outlier_and_keeps_what_fits():
  x = np.random.default_rng(5).uniform(0, 1, 200000)
  hist = of(x, [8.0])
  assert 0.9 < amax_entropy(hist, SPECS["int4"]) < 1.1
  assert amax_entropy(of([0.25] * 1000, [1.0] * 1000), INT8) == 1.0  # two spikes, on levels of their own


@pytest.mark.parametrize("seed", range(3))
def test_entropy_clips_more_at_fewer_bits(seed):
  hist = of(normal(100000, seed))
  found = [amax_entropy(hist, QuantSpec(formats.int_format(b))) for b in (2, 4, 8)]
  assert found == sorted(found) and found[0] < 0.8 * found[-1]


# Mean squared error


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mse_finds_the_optimal_clip_of_a_gaussian(bits):
  hist, spec, best = exact_gaussian(), QuantSpec(formats.int_format(bits)), limits.optimal_uniform(bits)
  amax = amax_mse(hist, spec)
  # At 8 bits a cell holds 8 bins of 2^-8, and values count at bin centres: 1 / 8^2 of a cell's error is not seen, and how cells meet bins
  # moves the flat minimum by 1 % of amax, which costs 0.2 % of the error. Fewer bits have wider cells.
  assert amax == pytest.approx(best.clip, rel=0.02)
  assert gaussian.mse(np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) * amax / (2 ** (bits - 1) - 1)) == pytest.approx(
    best.mse, rel=5e-3
  )
  assert expected_error(hist, spec, amax)[0] == pytest.approx(best.mse, rel=0.03)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("start, stride", [(1, 1), (3, 17), (10**6, 1)])
def test_mse_is_never_worse_than_max(name, start, stride):
  spec = SPECS[name]
  for x in (normal(), np.random.default_rng(2).standard_t(2, 3000), np.random.default_rng(3).uniform(0, 1.3, 500), [0.1, 5.0]):
    hist = of(x, num_bins=512)
    error, of_max = expected_error(hist, spec, np.array([amax_mse(hist, spec, start, stride), largest(hist)]))
    assert error <= of_max


@pytest.mark.parametrize("name", SPECS)
def test_mse_is_the_least_of_its_candidates(name):
  hist = of(normal(3000), num_bins=64)
  last = int(np.flatnonzero(hist.counts)[-1])
  centres = np.minimum((np.arange(last + 1) + 0.5) * hist.width, largest(hist)).astype(np.float32)

  def error(amax: float) -> float:
    difference = core.fake_quantize(centres, SPECS[name], np.float32(amax)).astype(np.float64) - centres
    return float(np.sum(difference**2 * hist.counts[: last + 1])) / 3000

  errors = {k * hist.width: error(k * hist.width) for k in range(1, last + 1)} | {largest(hist): error(largest(hist))}
  found = amax_mse(hist, SPECS[name])
  assert errors[found] == pytest.approx(min(errors.values()), rel=1e-12)
  assert expected_error(hist, SPECS[name], found)[0] == pytest.approx(errors[found], rel=1e-12)


@pytest.mark.parametrize("name", ["int8", "int4", "e4m3", "uint4"])
def test_expected_error_is_that_of_the_values(name):
  x = np.abs(normal(200000))
  hist = of(x)
  amax = amax_mse(hist, SPECS[name])
  difference = core.fake_quantize(x, SPECS[name], np.float32(amax)).astype(np.float64) - x
  # Values at bin centres: at 8 bits a cell is 8 bins wide, and E4M3's are finer than a bin near zero, where little of its error lies.
  assert expected_error(hist, SPECS[name], amax)[0] == pytest.approx(np.mean(difference**2), rel=0.05)


# Every method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECS)
def test_every_method_gives_a_float32_within_the_data(name, method):
  x = normal()
  found = amax_of(of(x), SPECS[name], method)
  assert isinstance(found, float) and found == np.float32(found) and 0 < found <= np.abs(x).max()
  assert found == amax_of(of(x[::-1][:7000], x[:13000]), SPECS[name], method)
  assert amax_of(of(x * 4), SPECS[name], method) == 4 * found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_nothing_but_zeros_has_amax_zero(method, skip_zeros):
  assert amax_of(of(np.zeros(10), skip_zeros=skip_zeros), INT8, method) == 0
  with pytest.raises(ValueError, match="histogram is empty"):
    amax_of(Histogram(skip_zeros=skip_zeros), INT8, method)


def test_faint_values():
  for method in METHODS:
    assert amax_of(of([1e-40, 2e-40]), INT8, method) == np.float32(2e-40)


@pytest.mark.parametrize("method", METHODS)
def test_other_granularity_is_refused(method):
  hist = of(normal())
  with pytest.raises(ValueError, match=rf"{method}'.* INT8 specification has axis=\(0,\)"):
    amax_of(hist, INT8.replace(axis=(0,)), method)
  with pytest.raises(ValueError, match=rf"{method}'.* INT4 specification has blocks=\{{-1: 128\}}"):
    amax_of(hist, QuantSpec.named("int4"), method)
  with pytest.raises(ValueError, match="has a zero point"):
    amax_of(hist, INT8.replace(zero_point=True), method)


def test_the_tensor_amax_of_nvfp4_can_be_a_percentile():
  hist = of(normal())
  assert amax_of(hist, QuantSpec.named("nvfp4"), "percentile", percentile=99) == amax_percentile(hist, 99)
  with pytest.raises(ValueError, match=r"'mse'.* E2M1 specification has blocks=\{-1: 16\}"):
    amax_of(hist, QuantSpec.named("nvfp4"), "mse")


def test_what_entropy_and_mse_cannot_judge():
  for function in (amax_entropy, amax_mse):
    with pytest.raises(ValueError, match="NF4 has a codebook"):
      function(of([1.0]), QuantSpec(formats.NF4))
    with pytest.raises(ValueError, match="start_bin is 0 and stride 1"):
      function(of([1.0]), INT8, start_bin=0)


def test_unknown_method_and_option():
  with pytest.raises(ValueError, match="unknown histogram method 'kl'; allowed are max, percentile, entropy, mse"):
    amax_of(of([1.0]), INT8, "kl")
  with pytest.raises(ValueError, match="'mse' does not know the options percentile; allowed: start_bin, stride"):
    amax_of(of([1.0]), INT8, "mse", percentile=99)
