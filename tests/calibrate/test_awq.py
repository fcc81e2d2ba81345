"""AWQ: scales by their formula, the loss that one Hessian gives against the one over all tokens, clipping against every ratio."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import QuantSpec, formats
from core.calibrate.awq import TINY, awq_scale, block_size, clip_search, search, weight_stat
from core.calibrate.scale_search import alpha_grid, compensated, scaled_hessian
from core.calibrate.statistics import Accumulator

INT4 = QuantSpec(formats.INT4, blocks=((-1, 32),))
FP8 = QuantSpec(formats.E4M3)
FORMATS = {
  "int4": (INT4,),
  "int4 ragged": (QuantSpec(formats.INT4, blocks=((-1, 40),), pad=True),),
  "int4 rows": (QuantSpec(formats.INT4, axis=(0,)),),
  "int4 then fp8": (INT4, FP8),
  "int4 zero point": (QuantSpec(formats.int_format(4, signed=False), blocks=((-1, 32),), zero_point=True),),
  "mxfp4": (QuantSpec.named("mxfp4"),),
  "nvfp4": (QuantSpec.named("nvfp4"),),
  "nvfp4 static": (QuantSpec.named("nvfp4", dynamic=False),),
}
INPUTS = {
  "int8": (QuantSpec(formats.INT8),),
  "fp8": (FP8,),
  "int8 token": (QuantSpec(formats.INT8, blocks=((-1, None),), dynamic=True),),
  "int8 channel": (QuantSpec(formats.INT8, axis=(-1,)),),
  "nvfp4": (QuantSpec.named("nvfp4"),),
  "mxfp8": (QuantSpec.named("mxfp8_e4m3"),),
}


def group(seed: int = 0, k: int = 128) -> tuple[list[np.ndarray], np.ndarray]:
  """Three weights of one correlated input with loud channels and one dead channel, and 300 tokens of it."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(300, k)) @ (np.eye(k) + 0.3 * rng.normal(size=(k, k)) / np.sqrt(k)) * np.exp(rng.normal(size=k))
  x[:, 7] = 0
  weights = [(rng.standard_t(4, size=(n, k)) * np.exp(0.3 * rng.normal(size=k))).astype(np.float32) for n in (32, 16, 16)]
  return weights, x.astype(np.float32)


def explicit_loss(weights, specs, x, scale, input_specs=(), act_amax=None) -> float:
  """Mean over tokens of |Q(x p) Q(W / p)^T - x W^T|^2, in float64 and without a Hessian."""
  xq, total = x * scale, 0.0
  for spec in input_specs:
    amax = None
    if spec.two_level or (not spec.dynamic and spec.axis is None):
      amax = np.asarray(np.max(act_amax * scale), np.float32)
    elif not spec.dynamic:
      amax = (act_amax * scale)[None]
    xq = core.fake_quantize(xq, spec, amax)
  for weight in weights:
    value = compensated(weight, scale)
    for spec in specs:
      value = core.fake_quantize(value, spec)
    total += np.sum((xq.astype(np.float64) @ value.T.astype(np.float64) - x.astype(np.float64) @ weight.T) ** 2)
  return total / len(x)


def test_scale_formula():
  x, w = np.array([1.0, 4.0, 16.0, 0.0, 9.0]), np.array([0.25, 1.0, 0.5, 1.0, 0.0])
  np.testing.assert_allclose(awq_scale(x, w, 1.0), [0.25, 1, 4, 1, 1])  # x / sqrt(16 * 1); dead channels stay
  np.testing.assert_allclose(awq_scale(x, w, 0.0), [2, 0.5, 1, 1, 1])  # 1 / w, from 1 to 4
  raw = np.sqrt(x[:3] / w[:3])
  np.testing.assert_allclose(awq_scale(x, w, 0.5)[:3], raw / np.sqrt(raw.max() * raw.min()))
  clamped = awq_scale(np.array([1e-9, 1.0, 1e9]), np.ones(3), 1.0)
  np.testing.assert_allclose(clamped, [1e-4, 1, 1e4])
  np.testing.assert_array_equal(awq_scale(np.zeros(3), np.ones(3), 0.3), np.ones(3))
  np.testing.assert_array_equal(awq_scale(np.full(3, np.nan), np.ones(3), 0.3), np.ones(3))


def test_a_dead_channel_does_not_move_the_others():
  rng = np.random.default_rng(0)
  x, w = np.exp(rng.normal(size=128)), rng.uniform(0.2, 0.8, size=128)
  plain = awq_scale(x, w, 0.7)
  np.testing.assert_array_equal(awq_scale(np.append(x, 0), np.append(w, 0.5), 0.7), np.append(plain, 1))
  assert plain.max() * plain.min() == pytest.approx(1)


@pytest.mark.parametrize("name", FORMATS)
def test_weight_stat_is_the_mean_share_of_the_block_amax(name: str):
  weights, _ = group()
  specs = FORMATS[name]
  size = {"int4 ragged": 40, "int4 rows": 128}.get(name, 16 if "nvfp4" in name else 32)
  assert block_size(weights[0].shape, specs[0]) == size
  rows = np.concatenate(weights).astype(np.float64)
  share = [np.abs(rows[:, i : i + size]) / (np.abs(rows[:, i : i + size]).max(axis=1, keepdims=True) + TINY) for i in range(0, 128, size)]
  np.testing.assert_allclose(weight_stat(weights, [specs] * 3), np.concatenate(share, axis=1).mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_one_hessian_gives_the_error_over_all_tokens(name: str):
  weights, x = group()
  specs = FORMATS[name]
  mean_abs = np.abs(x).mean(axis=0)
  found = search(weights, [specs] * 3, mean_abs, x.T @ x / len(x))
  stat = weight_stat(weights, [specs] * 3)
  assert list(found.losses) == alpha_grid(0.1) and len(found.losses) == 11
  for alpha, loss in found.losses.items():
    scale = (1 / awq_scale(mean_abs, stat, alpha)).astype(np.float32)
    assert loss == pytest.approx(explicit_loss(weights, specs, x, scale), rel=1e-5)  # d H d^T is float32
    if alpha == found.alpha:
      np.testing.assert_array_equal(found.pre_quant_scale, scale)
  assert found.error_before == pytest.approx(explicit_loss(weights, specs, x, np.ones(128, np.float32)), rel=1e-5)
  assert found.error == min(found.error_before, *found.losses.values())
  assert found.error < 0.9 * found.error_before or name == "int4 then fp8" or "fp4" in name
  assert found.pre_quant_scale[7] == 1 and found.pre_quant_scale.dtype == np.float32


@pytest.mark.parametrize("name", INPUTS)
def test_quantized_inputs_are_judged_on_samples(name: str):
  weights, x = group()
  amax = np.abs(x).max(axis=0) * np.float32(1.25)  # other tokens were louder than these samples
  found = search(weights, [(INT4,)] * 3, np.abs(x).mean(axis=0), samples=x, act_amax=amax, input_specs=INPUTS[name])
  stat = weight_stat(weights, [(INT4,)] * 3)
  for alpha in (0.0, 0.5, 1.0):
    scale = (1 / awq_scale(np.abs(x).mean(axis=0), stat, alpha)).astype(np.float32)
    assert found.losses[alpha] == pytest.approx(explicit_loss(weights, (INT4,), x, scale, INPUTS[name], amax), rel=1e-5)
  assert found.error <= found.error_before


def test_one_batch_equals_many():
  weights, x = group()
  found = []
  for parts in (1, 7):
    seen = Accumulator(("mean_abs", "hessian"))
    for batch in np.array_split(x, parts):
      seen.add(batch)
    got = seen.result()
    found.append(search(weights, [(INT4,)] * 3, got["mean_abs"], got["hessian"]))
  assert found[0].alpha == found[1].alpha
  np.testing.assert_allclose(list(found[0].losses.values()), list(found[1].losses.values()), rtol=1e-5)  # order of float32 sums


def test_no_scale_is_kept_where_it_is_best():
  rng = np.random.default_rng(0)
  weights = [rng.integers(-7, 8, size=(8, 64)).astype(np.float32)]
  weights[0][:, ::32] = 7  # INT4 holds these weights exactly
  found = search(weights, [(INT4,)], np.exp(rng.normal(size=64)), np.eye(64, dtype=np.float32))
  assert found.alpha is None and found.error == found.error_before == 0 and np.all(found.pre_quant_scale == 1)
  assert min(found.losses.values()) > 0


def test_errors():
  weights, _ = group()
  with pytest.raises(ValueError, match="needs the Hessian"):
    search(weights, [(INT4,)] * 3, np.ones(128))
  with pytest.raises(ValueError, match="needs samples"):
    search(weights, [(INT4,)] * 3, np.ones(128), np.eye(128), input_specs=(FP8,))
  with pytest.raises(ValueError, match="above 0 and up to 1"):
    search(weights, [(INT4,)] * 3, np.ones(128), np.eye(128), alpha_step=0.0)
  with pytest.raises(ValueError, match="allowed is 0"):
    awq_scale(np.ones(2), np.ones(2), 2.0)
  with pytest.raises(ValueError, match=r"both are \[K\]"):
    awq_scale(np.ones(2), np.ones(3), 0.5)
  with pytest.raises(ValueError, match="min_clip_ratio is 0"):
    clip_search(weights[0], INT4, np.eye(128), min_clip_ratio=0)
  with pytest.raises(ValueError, match="its last axis must be 128 long"):
    clip_search(weights[0], INT4, np.eye(64))


RATIOS = [1 - 0.05 * i for i in range(11)]


@pytest.mark.parametrize("name", ["int4", "int4 ragged", "int4 rows", "nvfp4 static"])
def test_clip_takes_the_best_ratio_of_every_block(name: str):
  weights, x = group()
  weight, (spec,) = weights[0], FORMATS[name]
  found = clip_search(weight, spec, x.T @ x / len(x))
  amax = core.amax(weight, spec)
  size = {"int4": 32, "int4 ragged": 40, "int4 rows": 128}.get(name, 16)
  table = []
  for ratio in RATIOS:
    value = core.fake_quantize(weight, spec, amax * np.float32(ratio), tensor_amax=found.tensor_amax)
    d = value.astype(np.float64) - weight
    # y = W_b x_b of every block over every token: what ModelOpt samples
    y = [x[:, i : i + size].astype(np.float64) @ d[:, i : i + size].T for i in range(0, 128, size)]
    table.append(np.stack([np.mean(part**2, axis=0) for part in y], axis=1))
  table = np.stack(table)
  np.testing.assert_allclose(found.error, table.min(axis=0), rtol=1e-4)  # the Hessian's root is float32
  np.testing.assert_allclose(found.error_before, table[0], rtol=1e-4)
  assert np.all((found.multiplier >= 0.4999) & (found.multiplier <= 1.0001)) and len(np.unique(found.multiplier.round(3))) > 3
  assert np.all(found.error <= found.error_before) and found.error.sum() < 0.95 * found.error_before.sum()


@pytest.mark.parametrize("spec", [QuantSpec.named("nvfp4"), QuantSpec(formats.INT4)])
def test_one_amax_is_clipped_by_the_whole_output(spec: QuantSpec):
  weights, x = group()
  weight = weights[0]
  found = clip_search(weight, spec, x.T @ x / len(x))
  assert found.amax is not None and np.size(found.amax) == 1
  losses = []
  for ratio in RATIOS:
    d = core.fake_quantize(weight, spec, core.amax(weight, spec) * np.float32(ratio)).astype(np.float64) - weight
    losses.append(np.mean(np.sum((x @ d.T) ** 2, axis=1)))
  assert np.sum(found.error) == pytest.approx(min(losses), rel=1e-4)
  assert np.sum(found.error_before) == pytest.approx(losses[0], rel=1e-4)


def test_clip_of_what_fits_exactly_and_of_mx():
  exact = np.tile(np.arange(-7, 8, dtype=np.float32), 5)[None, :64]
  assert np.all(clip_search(exact, INT4, np.eye(64)).multiplier == 1)
  found = clip_search(exact, QuantSpec.named("mxfp4"), np.eye(64))
  assert found.amax is None and "dynamic" in found.note


def test_scaled_hessian_is_that_of_the_scaled_input():
  _, x = group()
  scale = np.linspace(0.5, 2, 128).astype(np.float32)
  np.testing.assert_allclose(scaled_hessian(x.T @ x, scale), (x * scale).T @ (x * scale), rtol=1e-4, atol=1e-3)  # float32 sums
