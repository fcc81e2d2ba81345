"""GPTQ: the error theory predicts, the textbook's codes, and weights that quantize to themselves in every format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import core
from core import QuantSpec, formats
from core.calibrate.gptq import Factor, factor, gptq, settle, target
from core.calibrate.gptq_scales import RATIOS, Grid, search_amax

NVFP4 = QuantSpec.named("nvfp4")
FORMATS = {
  **{f"int{b}": QuantSpec(formats.int_format(b), blocks=((-1, 32),)) for b in range(2, 9)},
  "int8 tensor": QuantSpec(formats.INT8),
  "int4 rows": QuantSpec(formats.INT4, axis=(0,)),
  "int4 columns": QuantSpec(formats.INT4, axis=(1,)),
  "int4 every": QuantSpec(formats.INT4, axis=(0, 1)),
  "int4 ragged": QuantSpec(formats.INT4, blocks=((-1, 40),), pad=True),
  "int4 wide": QuantSpec(formats.INT4, blocks=((-1, 1000),), pad=True),
  "int4 tiles": QuantSpec(formats.INT4, blocks=((-2, 10), (-1, 40)), pad=True),
  "int4 first axis": QuantSpec(formats.INT4, blocks=((0, 8),)),
  "int4 float16": QuantSpec(formats.INT4, blocks=((-1, 32),), scale_format=formats.FLOAT16),
  "int4 bound": QuantSpec(formats.INT4, blocks=((-1, 32),), bound=7.5),
  "int4 dynamic": QuantSpec(formats.INT4, blocks=((-1, 32),), dynamic=True),
  "int8 dynamic rows": QuantSpec(formats.INT8, blocks=((-1, None),), dynamic=True),
  "int4 narrow": QuantSpec(formats.int_format(4, narrow_range=True), blocks=((-1, 32),)),
  "int4 zero point": QuantSpec(formats.INT4, blocks=((-1, 32),), zero_point=True),
  "uint3 rows zero point": QuantSpec(formats.int_format(3, signed=False), axis=(0,), zero_point=True),
  "uint8 tensor zero point": QuantSpec(formats.UINT8, zero_point=True),
  "uint4 dynamic zero point": QuantSpec(formats.int_format(4, signed=False), blocks=((-1, 32),), zero_point=True, dynamic=True),
  "fp8": QuantSpec(formats.E4M3),
  "fp8 e5m2 rows": QuantSpec(formats.E5M2, axis=(0,)),
  "fp8 tiles": QuantSpec(formats.E4M3, blocks=((-2, 16), (-1, 32))),
  "fp8 dynamic rows": QuantSpec(formats.E4M3, blocks=((-1, None),), dynamic=True),
  **{n: QuantSpec.named(n) for n in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8")},
  **{f"mxfp4 {rule}": QuantSpec.named("mxfp4", e8m0_rule=rule) for rule in ("rceil", "floor", "ceil", "even")},
  **{f"mxint8 {rule}": QuantSpec.named("mxint8", e8m0_rule=rule) for rule in ("floor", "ceil", "even")},
  "mxfp4 static": QuantSpec.named("mxfp4", dynamic=False),
  "nvfp4": NVFP4,
  "nvfp4 tiles": NVFP4.replace(blocks=((-2, 16), (-1, 16))),
  "nvfp4 static": NVFP4.replace(dynamic=False),
  "nvfp4 four over six": NVFP4.replace(four_over_six=True),
  "nvfp4 static four over six": NVFP4.replace(four_over_six=True, dynamic=False),
  "nf4": QuantSpec.named("nf4", blocks=((-1, 32),)),
  "nf4 dynamic": QuantSpec.named("nf4", blocks=((-1, 32),), dynamic=True),
  "nf4 double": QuantSpec.named("nf4_double", blocks=((-1, 32),), scale_block=3),
}
CHOICES: dict[str, dict[str, Any]] = {
  "plain": {},
  "act order": {"act_order": True},
  "search": {"scale_search": "hessian", "signed": True},
  "search, act order": {"scale_search": True, "signed": True, "act_order": True},
}
ROWS, COLUMNS = 48, 96


def problem(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
  """A weight with heavy tails, a zero row, a loud and a faint one; a Hessian of correlated inputs of very different sizes."""
  rng = np.random.default_rng(seed)
  mixing = np.eye(columns) + rng.normal(size=(columns, columns)) * 0.1
  x = rng.normal(size=(8 * columns, columns)) @ mixing * np.exp(rng.normal(size=columns) * 0.7)
  weight = rng.standard_t(4, size=(rows, columns)) * 0.05
  weight[2] = 0
  weight[3] *= 30
  weight[4] *= 1e-3
  return weight.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def error_of(difference: np.ndarray, hessian: np.ndarray) -> float:
  d = difference.astype(np.float64)
  return float(np.mean(np.sum((d @ hessian) * d, axis=1)))


def textbook(weight: np.ndarray, hessian: np.ndarray, spec: QuantSpec, width: int, damping: float = 0.01) -> np.ndarray:
  """Algorithm 1 of the GPTQ paper without its blocks: the inverse's upper Cholesky factor, one column at a time, all later ones updated."""
  w, hessian = weight.astype(np.float64), hessian.astype(np.float64)
  hessian = hessian + damping * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
  upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
  quantized = np.zeros(weight.shape, np.float32)
  column_spec, amax = spec.replace(pad=spec.blocks is not None), np.zeros(0)
  for k in range(w.shape[1]):
    if k % width == 0:
      amax = core.block_amax(np.ascontiguousarray(w[:, k : k + width], np.float32), spec)
    quantized[:, k : k + 1] = core.fake_quantize(w[:, k : k + 1].astype(np.float32), column_spec, amax)
    error = (w[:, k] - quantized[:, k]) / upper[k, k]
    w[:, k + 1 :] -= np.outer(error, upper[k, k + 1 :])
  return quantized


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_result_quantizes_to_itself(name: str, choice: str):
  spec, (weight, hessian) = FORMATS[name], problem(0)
  found = gptq(weight, hessian, spec, **CHOICES[choice])
  again = core.fake_quantize(found.weight, spec, found.amax, tensor_amax=found.tensor_amax)
  np.testing.assert_array_equal(again.view(np.int32), found.weight.view(np.int32))
  codes = core.quantize(found.weight, spec, found.amax, tensor_amax=found.tensor_amax)
  np.testing.assert_array_equal(core.dequantize(codes), found.weight)
  if found.amax is not None:
    assert found.amax.shape == core.amax(weight, spec).shape and found.amax.dtype == np.float32
  assert (found.amax is None) == (spec.dynamic and not spec.two_level)
  assert (found.tensor_amax is None) == (spec.dynamic or not spec.two_level)
  assert np.all(found.weight[2] == 0) and found.weight.dtype == np.float32
  assert found.report["error"] == pytest.approx(error_of(found.weight - weight, hessian), rel=1e-4)  # one float32 product of K terms
  assert found.report["settled"] < (0.2 if "dynamic zero point" in name else 0.005)
  # INT2 maps amax to its only positive code, so most weights become 0 whatever is done; elements with own scales have nothing to round
  most = {"int2": 1.0, "int4 every": np.inf}.get(name, 0.9)
  assert found.report["error"] < found.report["error_before"] * most


def test_scales_that_are_given_are_kept():
  weight, hessian = problem(1)
  for name in ("int4", "int4 rows", "int8 tensor", "int4 tiles", "int4 zero point", "nvfp4 static", "nf4 double"):
    spec = FORMATS[name]
    amax = core.amax(weight, spec) * np.float32(0.875)
    tensor = np.asarray(np.max(amax) * 1.25, np.float32) if spec.two_level else None
    found = gptq(weight, hessian, spec, amax=amax, tensor_amax=tensor)
    np.testing.assert_array_equal(found.amax, amax)
    assert found.tensor_amax == tensor
  tensor = np.asarray(core.tensor_amax(weight) * 2, np.float32)
  assert gptq(weight, hessian, NVFP4, amax=tensor).amax == tensor
  assert gptq(weight, hessian, FORMATS["nvfp4 static"], amax=None, tensor_amax=tensor, scale_search=True).tensor_amax == tensor
  with pytest.raises(ValueError, match=r"amax of shape \[3\].*\[48, 3\]"):
    gptq(weight, hessian, FORMATS["int4"], amax=np.ones(3, np.float32))


def test_proxy_loss_is_the_trace_of_d():
  """An autoregressive Hessian r^|i - j| has D = 1 - r^2 but for one entry of 1, so GPTQ errs by that much of what rounding does."""
  rho, columns, rows, step = 0.9, 64, 4000, np.float32(1)
  hessian = rho ** np.abs(np.subtract.outer(np.arange(columns), np.arange(columns)))
  diagonal = factor(hessian, damping=0).diagonal
  np.testing.assert_allclose(np.sort(diagonal)[::-1], [1] + [1 - rho**2] * (columns - 1), rtol=1e-9)
  weight = np.random.default_rng(0).uniform(-60, 60, size=(rows, columns)).astype(np.float32)
  spec = QuantSpec(formats.INT8)
  found = gptq(weight, hessian, spec, amax=np.full((), 127, np.float32), damping=0)
  # the mean of 4000 x 64 squares of uniform numbers: a standard error of .18 %
  assert found.report["error"] == pytest.approx(diagonal.sum() / 12, rel=0.01)
  plain = core.fake_quantize(weight, spec, step * np.float32(127))
  assert error_of(plain - weight, hessian) == pytest.approx(columns / 12, rel=0.03)  # correlated, so a wider spread


@pytest.mark.parametrize("name", ["int4 rows", "int4", "int4 ragged", "int8 tensor"])
@pytest.mark.parametrize("block", [1, 7, 32, 128])
def test_equals_the_textbook(name: str, block: int):
  """Float64 on both sides: a column's float32 value may differ in its last bit, a code only where that bit decides it."""
  spec, (weight, hessian) = FORMATS[name], problem(2, columns=100 if name == "int4 ragged" else 96)
  width = {"int4": 32, "int4 ragged": 40}.get(name) or len(hessian)
  expected = textbook(weight, hessian, spec, width)
  np.testing.assert_allclose(gptq(weight, hessian, spec, block=block).weight, expected, rtol=1e-6)


def test_act_order_is_the_same_on_permuted_columns():
  weight, hessian = problem(3)
  order = np.argsort(-np.diagonal(hessian), kind="stable")
  assert not np.array_equal(order, np.arange(COLUMNS))
  spec = FORMATS["int4 rows"]
  found = gptq(weight, hessian, spec, act_order=True)
  permuted = gptq(weight[:, order], hessian[np.ix_(order, order)], spec)
  np.testing.assert_array_equal(found.weight[:, order], permuted.weight)
  step = core.scales(found.amax, spec).step  # no column may have changed its place: an element moves by a few steps at most
  fine = gptq(weight, hessian, QuantSpec(formats.INT8, axis=(0,)), act_order=True).weight
  assert np.all(np.abs(fine - weight) <= 3 * step)
  assert found.report["error"] < gptq(weight, hessian, spec).report["error"]


@pytest.mark.parametrize("name", ["int4 rows", "int3", "nvfp4", "mxfp4 rceil", "nf4"])
def test_beats_rounding_to_nearest_on_every_problem(name: str):
  for seed in range(10):
    report = gptq(*problem(seed), FORMATS[name]).report
    assert report["error"] < report["error_before"]


def test_search_never_loses_to_max_and_finds_negative_scales():
  weight, hessian = problem(4)
  spec = FORMATS["int4"]
  grid = Grid(spec, weight.shape, None)
  errors = {}
  for label, signed in (("plain", None), ("search", False), ("signed", True)):
    amax = grid.amax(weight) if signed is None else np.empty((ROWS, 3), np.float32)
    for group in range(3 if signed is not None else 0):
      columns = grid.columns(group)
      amax[:, group : group + 1] = search_amax(grid, weight[:, columns].copy(), hessian[columns, columns], bool(signed))
    d = (core.fake_quantize(weight, spec, amax) - weight).astype(np.float64).reshape(ROWS, 3, 32)
    local = [np.sum((d[:, g] @ hessian[32 * g : 32 * g + 32, 32 * g : 32 * g + 32]) * d[:, g], axis=1) for g in range(3)]
    errors[label] = np.stack(local)
    assert np.any(amax < 0) == bool(signed)
  slack = 1 + 1e-5  # float32 sums of 32 products choose
  assert np.all(errors["search"] <= errors["plain"] * slack) and np.all(errors["signed"] <= errors["plain"] * slack)
  assert errors["signed"].sum() < 0.9 * errors["search"].sum() < 0.9 * errors["plain"].sum()
  codes = core.quantize((found := gptq(weight, hessian, spec, scale_search=True, signed=True)).weight, spec, found.amax).codes
  assert codes.min() == -8 and found.report["error"] < gptq(weight, hessian, spec, scale_search=True).report["error"]


def test_a_positive_peak_can_lie_on_the_lowest_code():
  spec = FORMATS["int4 rows"]
  weight = np.array([[8, -7, 3, 1], [-8, 7, -3, 1]], np.float32)
  found = gptq(weight, np.eye(4), spec, scale_search=True, signed=True)
  np.testing.assert_array_equal(found.weight, weight)
  np.testing.assert_array_equal(found.amax, [[-7], [7]])
  assert all(0 < r < 1.1 for r in RATIOS)


def test_signed_is_left_out_where_the_format_has_none():
  weight, hessian = problem(5)
  for name in ("nf4", "int4 zero point", "int4 narrow", "nvfp4 static", "int4 dynamic"):
    one, other = (gptq(weight, hessian, FORMATS[name], scale_search=True, signed=signed).weight for signed in (False, True))
    np.testing.assert_array_equal(one, other)


def test_dead_inputs_are_rounded_to_nearest_and_change_nothing():
  weight, hessian = problem(6)
  dead = [0, 17, 95]
  live = [k for k in range(COLUMNS) if k not in dead]
  hessian[dead], hessian[:, dead] = 0, 0
  spec = FORMATS["int4 rows"]
  amax = core.amax(weight, spec)
  for act_order in (False, True):
    found = gptq(weight, hessian, spec, amax=amax, act_order=act_order)
    np.testing.assert_array_equal(found.weight[:, dead], core.fake_quantize(weight, spec, amax)[:, dead])
    alone = gptq(weight[:, live], hessian[np.ix_(live, live)], spec, amax=amax, act_order=act_order)
    np.testing.assert_array_equal(found.weight[:, live], alone.weight)


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4 rceil", "nf4 double", "uint4 dynamic zero point", "nvfp4 static four over six"])
def test_without_inputs_it_rounds_to_nearest(name: str):
  spec, (weight, hessian) = FORMATS[name], problem(7)
  found = gptq(weight, np.zeros_like(hessian), spec)
  plain, _ = settle(core.fake_quantize(weight, spec), spec, found.amax, found.tensor_amax)
  np.testing.assert_array_equal(found.weight, plain)
  assert "no inputs" in found.report["note"]
  assert found.report["error"] == pytest.approx(np.mean(np.sum((found.weight - weight).astype(np.float64) ** 2, 1)), rel=1e-5)


def test_factor_is_what_it_says_and_can_be_shared():
  weight, hessian = problem(8)
  for act_order in (False, True):
    shared = factor(hessian, 0.02, act_order)
    unit = np.eye(COLUMNS) + shared.feedback
    damped = hessian.astype(np.float64) + 0.02 * np.mean(np.diagonal(hessian.astype(np.float64))) * np.eye(COLUMNS)
    np.testing.assert_allclose((unit * shared.diagonal) @ unit.T, damped[np.ix_(shared.order, shared.order)], rtol=1e-9, atol=1e-12)
    assert np.array_equal(shared.feedback, np.triu(shared.feedback, 1))
    for rows in (slice(0, 10), slice(10, 48)):
      part = gptq(weight[rows], hessian, FORMATS["int4"], factored=shared)
      whole = gptq(weight, hessian, FORMATS["int4"], damping=0.02, act_order=act_order)
      # BLAS adds in another order for other shapes: float64, decided on by float32 and 16 levels
      np.testing.assert_allclose(part.weight, whole.weight[rows], rtol=1e-6)
  with pytest.raises(ValueError, match=r"3 inputs.*96"):
    gptq(weight, hessian, FORMATS["int4"], factored=Factor(np.arange(3), np.zeros((3, 3)), np.ones(3), 0.01))


def test_damping_grows_until_the_hessian_is_positive_definite():
  x = np.random.default_rng(9).normal(size=(3, 32))
  low_rank = x.T @ x / 3
  assert factor(low_rank, 0.01).damping == 0.01
  indefinite = low_rank - 0.05 * np.mean(np.diagonal(low_rank)) * np.eye(32)
  assert factor(indefinite, 0.01).damping == pytest.approx(0.1)
  assert 0 < factor(indefinite, 0.0).damping <= 1
  with pytest.raises(ValueError, match=r"not positive definite with 1 times .* least eigenvalue is -"):
    factor(np.eye(32) - np.ones((32, 32)) * 0.9)


def test_correction():
  weight, hessian = problem(10)
  rng = np.random.default_rng(10)
  np.testing.assert_allclose(target(weight, hessian, hessian, 0.5), weight, rtol=0, atol=0)
  spec = FORMATS["int4"]
  same = gptq(weight, hessian, spec, cross=hessian, correction=0.5)
  np.testing.assert_array_equal(same.weight, gptq(weight, hessian, spec).weight)
  # inputs that are a known mixture of the float model's: full strength undoes it
  y = rng.normal(size=(500, COLUMNS))
  x = y @ (np.eye(COLUMNS) + 0.05 * rng.normal(size=(COLUMNS, COLUMNS)))
  found = target(weight, x.T @ x / 500, y.T @ x / 500, 1.0, ridge=0)
  np.testing.assert_allclose(x @ found.T, y @ weight.T, atol=1e-9)
  half = target(weight, x.T @ x / 500, y.T @ x / 500, 0.5, ridge=0)
  np.testing.assert_allclose(half, (found + weight) / 2, rtol=1e-9, atol=1e-15)
  # with a ridge it is the minimum: the gradient of |W'x - Wy|^2 + ridge mean |W' - W|^2 vanishes
  h, c = x.T @ x / 500, y.T @ x / 500
  found = target(weight, h, c, 1.0, ridge=0.1)
  gradient = found @ h - weight @ c + 0.1 * np.mean(np.diagonal(h)) * (found - weight)
  np.testing.assert_allclose(gradient, 0, atol=1e-10)
  outputs = []
  for strength in (0.0, 0.5, 1.0):
    q = gptq(weight, h, FORMATS["int8"], cross=c, correction=strength).weight
    outputs.append(np.mean((x @ q.T - y @ weight.T) ** 2))
  assert outputs[0] > outputs[1] > outputs[2]
  with pytest.raises(ValueError, match="no cross"):
    gptq(weight, hessian, spec, correction=0.5)
  with pytest.raises(ValueError, match=r"correction is 2 .*0 to 1"):
    gptq(weight, hessian, spec, cross=hessian, correction=2)


def test_deterministic_and_inputs_are_left_alone():
  weight, hessian = problem(11)
  copies = weight.copy(), hessian.copy()
  for name in ("int4", "nvfp4"):
    amax = core.amax(weight, FORMATS[name])
    kept = amax.copy()
    one, other = (gptq(weight, hessian, FORMATS[name], amax=amax, scale_search=True, act_order=True) for _ in range(2))
    np.testing.assert_array_equal(one.weight.view(np.int32), other.weight.view(np.int32))
    assert one.report == other.report
    np.testing.assert_array_equal(amax, kept)
  np.testing.assert_array_equal(weight, copies[0])
  np.testing.assert_array_equal(hessian, copies[1])


def test_refusals():
  weight, hessian = problem(12)
  spec = FORMATS["int4"]
  bad = weight.copy()
  bad[1, 1] = np.inf
  cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
    ((weight[:, :5], hessian), {}, r"\[48, 5\] does not fit a Hessian of 96 inputs"),
    ((bad, hessian), {}, "not finite"),
    ((weight, hessian * np.nan), {}, "hessian has entries that are not finite"),
    ((weight, hessian[:5]), {}, r"hessian has shape \[5, 96\]"),
    ((weight, hessian), {"block": 0}, "block is 0"),
    ((weight, hessian), {"damping": -1}, "damping is -1"),
    ((weight, hessian), {"scale_search": "grid"}, "scale_search 'grid'"),
  )
  for arguments, options, message in cases:
    with pytest.raises(ValueError, match=message):
      gptq(arguments[0], arguments[1], spec, **options)
  moving = QuantSpec(formats.INT8, blocks=((-1, None),), dynamic=True, bound=127.5)
  with pytest.raises(ValueError, match="still changes"):
    gptq(weight, hessian, moving)
