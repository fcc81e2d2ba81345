"""Searches of a weight's amax: never worse on any group, exact over block scales, by squared or by output error."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import QuantSpec, blocks, formats
from core.calibrate import weight_search
from core.calibrate.local_hessian import block_hessians, hessian_block, local_hessian_search
from core.calibrate.weight_search import E4M3_LEVELS, four_over_six, group_error, mse_search
from tests.calibrate.test_adaround import layer

NVFP4 = QuantSpec.named("nvfp4", dynamic=False)
FORMATS = {
  "int8 tensor": QuantSpec(formats.INT8),
  "int4 rows": QuantSpec(formats.INT4, axis=(0,)),
  "int4 columns": QuantSpec(formats.INT4, axis=(1,)),
  "int4 block": QuantSpec(formats.INT4, blocks=((-1, 32),)),
  "int4 ragged": QuantSpec(formats.INT4, blocks=((-1, 48),), pad=True),
  "int4 tiles": QuantSpec(formats.INT4, blocks=((-2, 12), (-1, 32)), pad=True),
  "int4 zero point": QuantSpec(formats.INT4, blocks=((-1, 32),), zero_point=True),
  "fp8 rows": QuantSpec(formats.E4M3, axis=(0,)),
  "nf4": QuantSpec.named("nf4"),
  "nf4 float16": QuantSpec.named("nf4", scale_format=formats.FLOAT16),
  "nvfp4": NVFP4,
  "nvfp4 32": NVFP4.replace(blocks=((-1, 32),)),
  "nvfp4 tiles": NVFP4.replace(blocks=((-2, 16), (-1, 16))),
  "nvfp4 static four over six": NVFP4.replace(four_over_six=True),
  "mxfp4 static": QuantSpec.named("mxfp4", dynamic=False),
}


def weight_of(seed: int = 0, n: int = 50, k: int = 128) -> np.ndarray:
  """Normal, with rows of heavy tails, a zero row, a loud row and a faint one."""
  rng = np.random.default_rng(seed)
  weight = rng.normal(size=(n, k))
  weight[5:20] = rng.standard_t(2.5, size=(15, k))
  weight[2], weight[3], weight[4] = 0, weight[3] * 30, weight[4] * 1e-3
  return weight.astype(np.float32)


def error_of(weight: np.ndarray, spec: QuantSpec, amax, tensor_amax=None) -> np.ndarray:
  """Squared error of each group, straight from the public verbs."""
  tiling = blocks.tiling(weight.shape, spec)
  value = core.fake_quantize(weight, spec, amax, tensor_amax=tensor_amax)
  difference = blocks.to_blocks(value.astype(np.float64) - weight, tiling)
  return np.sum(difference**2, axis=tiling.reduce).reshape(tiling.scales)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sweep", [False, True])
def test_no_group_is_worse_than_with_max(name: str, sweep: bool, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(weight_search, "CHUNK", 1000)  # several chunks of rows
  spec, weight = FORMATS[name], weight_of(n=48)
  result = mse_search(weight, spec, fp8_scale_sweep=sweep)
  assert result.amax is not None and result.error is not None
  assert result.amax.shape == core.amax(weight, spec).shape and result.amax.dtype == np.float32
  plain, found = (error_of(weight, spec, a, result.tensor_amax) for a in (core.amax(weight, spec), result.amax))
  np.testing.assert_allclose(result.error, found, rtol=1e-9)  # float64 sums in another order
  np.testing.assert_allclose(result.error_before, plain, rtol=1e-9)
  assert np.all(found <= plain * (1 + 1e-12))
  assert found.sum() < plain.sum() or name == "mxfp4 static"
  assert bool(result.note) == (sweep and not spec.two_level)


def test_picks_the_best_of_its_grid_and_keeps_ties_at_one():
  weight, spec = weight_of(), FORMATS["int4 block"]
  result = mse_search(weight, spec)
  amax = core.amax(weight, spec)
  grid = [np.float32(1), *np.linspace(0.25, 4, 76).astype(np.float32)]
  table = np.stack([error_of(weight, spec, amax * m) for m in grid])
  np.testing.assert_allclose(result.error, table.min(axis=0), rtol=1e-6)  # the search's own sums are float32
  assert np.all(result.multiplier[2] == 1)  # the zero row
  exact = np.tile(np.arange(-7, 8, dtype=np.float32), 5)[None, :64]
  assert np.all(mse_search(exact, QuantSpec(formats.INT4, blocks=((-1, 32),))).multiplier == 1)


def test_negative_scales_are_searched_as_the_mirror_image():
  weight, spec = weight_of(), FORMATS["int4 block"]
  amax = core.amax(weight, spec)
  mirrored, plain = mse_search(weight, spec, amax=-amax), mse_search(-weight, spec, amax=amax)
  np.testing.assert_array_equal(mirrored.amax, -plain.amax)
  np.testing.assert_array_equal(mirrored.multiplier, plain.multiplier)


def test_a_group_with_infinity_keeps_its_amax():
  weight, spec = weight_of(), FORMATS["int4 block"]
  weight[0, 0] = np.inf
  result = mse_search(weight, spec)
  assert result.multiplier[0, 0] == 1 and result.multiplier[0, 1] != 1


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 32", "nvfp4 tiles"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_sweep_equals_all_126_scales(name: str, scale: float):
  spec = FORMATS[name]
  weight = weight_of(n=48) * np.float32(scale)
  weight[30, :40] *= (10.0 ** -np.arange(0, 4, 0.1)).astype(np.float32)  # blocks under the least normal scale
  result = mse_search(weight, spec, fp8_scale_sweep=True)
  unit = core.scales(core.amax(weight, spec), spec).tensor_scale * np.float32(6)
  every = np.stack([error_of(weight, spec, np.full_like(result.amax, level * unit), result.tensor_amax) for level in E4M3_LEVELS[1:]])
  floor = 1e-12 * scale**2
  np.testing.assert_allclose(result.error, every.min(axis=0), rtol=1e-5, atol=floor)  # ties of float32 sums
  stored = core.scales(result.amax, spec, result.tensor_amax)
  for code in np.unique(stored.scale):
    asked = core.scales(np.float32([E4M3_LEVELS[code]]) * unit, spec, result.tensor_amax)
    assert asked.scale[0] == code


@pytest.mark.parametrize("code", range(1, 127))
def test_every_block_scale_can_be_asked_for(code: int):
  for tensor_amax in np.float32([1.0, 3.3e-12, 7.7e20, 0.1]):
    unit = core.scales(tensor_amax[None], NVFP4, tensor_amax).tensor_scale * np.float32(6)
    assert core.scales(np.float32([E4M3_LEVELS[code] * unit]), NVFP4, tensor_amax).scale[0] == code


@pytest.mark.parametrize("start", [0.02, 0.4, 1.0, 5.0, 40.0])
def test_sweep_finds_the_same_error_from_any_start(start: float):
  weight = weight_of()
  plain = core.amax(weight, NVFP4)
  found = mse_search(weight, NVFP4, amax=plain * np.float32(start), tensor_amax=plain.max(), fp8_scale_sweep=True)
  expected = mse_search(weight, NVFP4, fp8_scale_sweep=True)
  np.testing.assert_allclose(found.error, expected.error, rtol=1e-5)  # ties of float32 sums


def test_sweep_is_nowhere_worse_than_four_over_six():
  weight = weight_of(1)
  chosen = four_over_six(weight, NVFP4)
  swept = mse_search(weight, NVFP4, tensor_amax=chosen.tensor_amax, fp8_scale_sweep=True)
  assert np.all(swept.error <= chosen.error * (1 + 1e-6))  # ties of float32 sums
  assert swept.error.sum() < 0.98 * chosen.error.sum()
  assert np.all(chosen.error <= chosen.error_before)
  np.testing.assert_allclose(np.unique(np.round(chosen.multiplier, 5)), [1.0, 1.5])
  assert chosen.error.sum() < 0.95 * chosen.error_before.sum()


def test_four_over_six_agrees_with_the_format_that_does_it_itself():
  weight = np.random.default_rng(2).normal(size=(64, 256)).astype(np.float32)
  weight[0, 0] = 8.0  # 8 * 448 / 256 is exact, so both tensor scales are the same float32
  found = four_over_six(weight, NVFP4)
  np.testing.assert_array_equal(
    core.fake_quantize(weight, NVFP4, found.amax, tensor_amax=found.tensor_amax),
    core.fake_quantize(weight, NVFP4.replace(four_over_six=True)),
  )
  with pytest.raises(ValueError, match="needs E2M1 elements with an E4M3 block scale"):
    four_over_six(weight, FORMATS["int4 block"])
  assert "chooses itself" in four_over_six(weight, QuantSpec.named("nvfp4_four_over_six")).note


def test_dynamic_formats_have_no_block_amax_to_search():
  weight = weight_of()
  found = mse_search(weight, QuantSpec.named("mxfp4"))
  assert found.amax is None and "dynamic" in found.note
  assert four_over_six(weight, QuantSpec.named("nvfp4")).amax is None
  spec = QuantSpec.named("nvfp4")
  found = mse_search(weight, spec)
  assert found.amax.shape == () and found.tensor_amax is None
  total = [
    np.sum((core.fake_quantize(weight, spec, np.asarray(a)).astype(np.float64) - weight) ** 2)
    for a in (found.amax, core.tensor_amax(weight))
  ]
  assert float(found.error) == pytest.approx(total[0]) and total[0] <= total[1]


def test_double_quantized_scales_get_no_worse_by_scale_block():
  spec = QuantSpec.named("nf4_double", blocks=((-1, 16),), scale_block=3)
  weight = weight_of()
  result = mse_search(weight, spec)
  found, plain = error_of(weight, spec, result.amax), error_of(weight, spec, core.amax(weight, spec))
  starts = np.arange(0, 8, 3)
  assert np.all(np.add.reduceat(found, starts, axis=1) <= np.add.reduceat(plain, starts, axis=1) * (1 + 1e-12))


@pytest.mark.parametrize("options", [{"start_multiplier": 0.0}, {"stop_multiplier": 0.1}, {"step_size": 0.0}])
def test_multipliers_are_checked(options: dict):
  with pytest.raises(ValueError, match="use 0 < start <= stop and step > 0"):
    mse_search(weight_of(), FORMATS["int4 block"], **options)


def local_error(weight: np.ndarray, value: np.ndarray, hessian: np.ndarray, size: int) -> np.ndarray:
  """[N, ceil(K / size)] of d_b^T H_b d_b, float64, block by block."""
  d = value.astype(np.float64) - weight
  parts = [slice(i, i + size) for i in range(0, weight.shape[1], size)]
  return np.stack([np.einsum("nj,jk,nk->n", d[:, p], hessian[p, p].astype(np.float64), d[:, p]) for p in parts], axis=1)


@pytest.mark.parametrize("name", ["int4 block", "int4 ragged", "int4 tiles", "int4 rows", "int8 tensor", "nvfp4", "nvfp4 32"])
@pytest.mark.parametrize("size", [16, None])
def test_local_hessian_error_is_the_sum_over_blocks(name: str, size: int | None):
  spec = FORMATS[name]
  weight, hessian = layer(n=48, k=128)
  result = local_hessian_search(weight, spec, hessian, block_size=size, fp8_scale_sweep=name == "nvfp4")
  assert np.all(result.error <= result.error_before)
  width = hessian_block(weight.shape, spec, size)
  assert width == (16 if size else {"int4 ragged": 48, "int4 rows": 128, "int8 tensor": 128, "nvfp4": 16}.get(name, 32))
  value = core.fake_quantize(weight, spec, result.amax, tensor_amax=result.tensor_amax)
  # the square roots of the blocks are float32
  np.testing.assert_allclose(result.error.sum(), local_error(weight, value, hessian, width).sum(), rtol=1e-5)
  assert result.error.sum() < result.error_before.sum() or name == "int8 tensor"  # 8 bits for normal weights: max is the best of the grid


def test_local_hessian_beats_the_squared_error_in_its_own_metric():
  spec = FORMATS["int4 block"]
  weight, hessian = layer(n=48, k=128)
  hessian = hessian * np.outer(*[np.exp(np.random.default_rng(0).normal(size=128))] * 2).astype(np.float32)
  by_output, by_weight = local_hessian_search(weight, spec, hessian, block_size=None), mse_search(weight, spec)
  error = [local_error(weight, core.fake_quantize(weight, spec, r.amax), hessian, 32).sum() for r in (by_output, by_weight)]
  assert error[0] < 0.97 * error[1]


def test_identity_hessian_is_the_squared_error():
  spec = FORMATS["int4 ragged"]
  weight = weight_of()
  np.testing.assert_array_equal(local_hessian_search(weight, spec, np.eye(128)).amax, mse_search(weight, spec).amax)


def test_hessian_blocks():
  hessian = np.arange(49, dtype=np.float32).reshape(7, 7)
  found = block_hessians(hessian, 4)
  np.testing.assert_array_equal(found[0], hessian[:4, :4])
  np.testing.assert_array_equal(found[1], np.pad(hessian[4:, 4:], [(0, 1), (0, 1)]))
  with pytest.raises(ValueError, match=r"shape \[7, 3\] is not square"):
    block_hessians(hessian[:, :3])
  with pytest.raises(ValueError, match="gives the inputs of a row scales of their own"):
    local_hessian_search(weight_of(), FORMATS["int4 columns"], np.eye(128))
  with pytest.raises(ValueError, match=r"need \[128, 128\]"):
    local_hessian_search(weight_of(), FORMATS["int4 block"], hessian)


def test_group_error_takes_rows_of_a_convolution():
  weight = np.random.default_rng(0).normal(size=(6, 4, 3, 3)).astype(np.float32)
  spec = QuantSpec(formats.INT4, axis=(0,))
  np.testing.assert_allclose(group_error(weight, spec, core.amax(weight, spec)), error_of(weight, spec, None))
