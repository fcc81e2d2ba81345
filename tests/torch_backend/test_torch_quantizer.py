"""TensorQuantizer alone: bits, statistics, dtypes, attributes, messages."""

import copy

import numpy as np
import pytest
import torch

import core
import torch_backend as tb
from core import affine, hadamard
from torch_backend import SequentialQuantizer, TensorQuantizer

ATTRIBUTES = {
  "int8": {"num_bits": 8},
  "int8 axis": {"num_bits": 8, "axis": 0},
  "int8 unsigned": {"num_bits": 8, "unsigned": True},
  "int8 zero point": {"num_bits": 8, "axis": 0, "zero_point": True},
  "int4 block": {"num_bits": 4, "block_sizes": {-1: 16}},
  "int2": {"num_bits": 2, "axis": 0},
  "fp8": {"num_bits": (4, 3)},
  "fp8 token": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
  "fp8 2d": {"num_bits": (4, 3), "block_sizes": {-1: 8, -2: 8}},
  "e5m2": {"num_bits": (5, 2)},
  "mxfp4": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
  "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
  "nvfp4 static": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}},
  "four over six": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3), "four_over_six": True}},
  "nf4": {"num_bits": 4, "block_sizes": {-1: 16, "scale_bits": 8, "scale_block_sizes": {-1: 4}}},
}


def data(seed: int = 0, shape=(24, 40)) -> torch.Tensor:
  return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(attributes, x: torch.Tensor) -> TensorQuantizer:
  quantizer = TensorQuantizer(attributes)
  quantizer.enable_calib()
  quantizer.disable_quant()
  assert torch.equal(quantizer(x), x)
  quantizer.disable_calib()
  quantizer.enable_quant()
  if quantizer.has_statistics:
    quantizer.load_calib_amax()
  return quantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_bits_are_cores_on_numpy(name, dtype):
  """Calibrated on one tensor and applied to another, the quantizer gives what core gives on numpy."""
  x, y = data(0).abs().to(dtype), data(1).to(dtype) * 3
  quantizer = calibrated(ATTRIBUTES[name], x)
  spec = quantizer.spec
  reference = core.fake_quantize(y.float().numpy(), spec, None if spec.is_mx or name == "fp8 token" else core.amax(x.float().numpy(), spec))
  result = quantizer(y)
  assert result.dtype == dtype
  # float32 to a narrower type rounds once, here as in the quantizer
  assert torch.equal(result, torch.from_numpy(reference).to(dtype))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_without_amax_it_takes_it_from_each_input(name):
  x = data(2)
  quantizer = TensorQuantizer(ATTRIBUTES[name])
  np.testing.assert_array_equal(quantizer(x).numpy(), core.fake_quantize(x.numpy(), quantizer.spec))


def test_calibration_keeps_the_running_maximum():
  quantizer = TensorQuantizer({"num_bits": 8, "axis": 0})
  quantizer.enable_calib()
  batches = [data(i) for i in range(4)]
  for batch in batches:
    quantizer(batch)
  quantizer.load_calib_amax()
  assert torch.equal(quantizer.amax, torch.cat(batches, 1).abs().amax(1, keepdim=True))


def test_zero_point_keeps_the_running_range():
  quantizer = TensorQuantizer({"num_bits": 8, "zero_point": True})
  quantizer.enable_calib()
  quantizer(data(0))
  quantizer(data(1) + 4)
  quantizer.load_calib_amax()
  assert torch.equal(quantizer.amax, torch.stack([data(0).min(), (data(1) + 4).max()]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_calibration_data_raise_and_name_the_quantizer(bad):
  quantizer = TensorQuantizer({"num_bits": 8})
  quantizer.name = "layer.input_quantizer"
  quantizer.enable_calib()
  x = data()
  x[3, 4] = bad
  with pytest.raises(ValueError, match=r"layer\.input_quantizer.*1.*of 960 values \(shape \[24, 40\]\)"):
    quantizer(x)


@pytest.mark.parametrize("cast", [lambda q: q.half(), lambda q: q.bfloat16(), lambda q: q.to(torch.float16), lambda q: q.double()])
def test_statistics_stay_float32(cast):
  quantizer = TensorQuantizer({"num_bits": 8})
  quantizer.amax = 3.14159
  quantizer.pre_quant_scale = torch.full((40,), 1.2345)
  cast(quantizer)
  assert quantizer.amax.dtype == quantizer.pre_quant_scale.dtype == quantizer.step_size.dtype == torch.float32
  assert float(quantizer.amax) == float(np.float32(3.14159))


def test_amax_can_be_set_and_written_into():
  quantizer, x = TensorQuantizer({"num_bits": 8}), data()
  quantizer.amax = np.float32(2.0)
  np.testing.assert_array_equal(quantizer(x).numpy(), core.fake_quantize(x.numpy(), quantizer.spec, np.float32(2)))
  assert float(quantizer.step_size) == np.float32(2.0) / np.float32(127)
  quantizer.amax.fill_(1.0)
  np.testing.assert_array_equal(quantizer(x).numpy(), core.fake_quantize(x.numpy(), quantizer.spec, np.float32(1)))
  quantizer.reset_amax()
  assert quantizer.amax is None and quantizer.step_size is None
  for bad in (float("nan"), float("inf")):
    with pytest.raises(ValueError, match="finite; got"):
      quantizer.amax = bad
  for attributes in (ATTRIBUTES["fp8"], ATTRIBUTES["int8 unsigned"], ATTRIBUTES["nvfp4 static"]):  # no signed scales
    for bad in (-1.0, float("nan"), float("inf")):
      with pytest.raises(ValueError, match="finite and not negative"):
        TensorQuantizer(attributes).amax = bad
  with pytest.raises(ValueError, match=r"MXFP4.*no amax"):
    TensorQuantizer(ATTRIBUTES["mxfp4"]).amax = 1.0


def test_constant_amax():
  x = data()
  pinned = TensorQuantizer({"num_bits": 8, "constant_amax": 2.0})
  assert torch.equal(pinned(x), core.fake_quantize(x, pinned.spec, torch.tensor(2.0)))
  pinned.reset_amax()
  assert float(pinned.amax) == 2.0
  assert float(TensorQuantizer({"num_bits": (4, 3), "use_constant_amax": True}).amax) == 448.0


def test_bounds():
  assert TensorQuantizer({"num_bits": (4, 3)}).maxbound == 448.0
  assert TensorQuantizer({"num_bits": 8, "unsigned": True}).maxbound == 255.0
  assert TensorQuantizer({"num_bits": (2, 1)}).maxbound == 6.0


def test_per_token_takes_inputs_of_any_rank():
  quantizer = TensorQuantizer(ATTRIBUTES["fp8 token"])
  for shape in ((7, 32), (2, 3, 32), (2, 3, 4, 32), (32,)):
    x = data(0, shape)
    rows = torch.stack([core.fake_quantize(row, core.QuantSpec.named("fp8_e4m3")) for row in x.reshape(-1, 32)])
    assert torch.equal(quantizer(x), rows.reshape(shape))


def test_static_blocks_of_an_activation_take_other_batches():
  """Scales of an activation's blocks belong to channels: other batch sizes, lengths and ranks are welcome."""
  quantizer = TensorQuantizer({"num_bits": 8, "block_sizes": {-1: 8}}, share_leading=True)
  quantizer.enable_calib()
  x = data(0, (2, 5, 32))
  quantizer(x)
  quantizer.load_calib_amax()
  assert quantizer.amax.shape == (4,)
  for shape in ((3, 7, 32), (4, 32), (1, 2, 3, 32)):
    y = data(1, shape)
    amax = x.abs().amax((0, 1)).reshape(4, 8).amax(1).expand(*shape[:-1], 4)
    assert torch.equal(quantizer(y), core.fake_quantize(y, quantizer.spec, amax))


def test_wrong_dtype_and_empty():
  quantizer = TensorQuantizer()
  quantizer.name = "somewhere"
  with pytest.raises(TypeError, match=r"'somewhere' got a tensor of dtype torch\.int64"):
    quantizer(torch.arange(3))
  empty = torch.empty(0, 4)
  assert quantizer(empty) is empty


def test_a_disabled_quantizer_passes_everything():
  quantizer = TensorQuantizer(enable=False)
  ids = torch.arange(4)
  assert quantizer(ids) is ids
  assert repr(quantizer) == "TensorQuantizer(disabled)"


def test_set_from_attribute_config():
  quantizer = calibrated({"num_bits": 8}, data())
  quantizer.set_from_attribute_config({"num_bits": 8, "pass_through_bwd": False})
  assert quantizer.amax is not None  # the same format keeps its statistics
  quantizer.set_from_attribute_config({"num_bits": (4, 3), "enable": False})
  assert quantizer.amax is None and not quantizer.is_enabled and quantizer.maxbound == 448.0
  with pytest.raises(ValueError, match="num_bit"):
    quantizer.set_from_attribute_config({"num_bit": 8})
  with pytest.raises(ValueError, match=r"backend|registered"):
    TensorQuantizer({"backend": "mine"})
  with pytest.raises(ValueError, match="fake_quant"):
    TensorQuantizer({"fake_quant": False})
  with pytest.raises(ValueError, match="no data"):
    quantizer.load_calib_amax()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_state_dict_and_deepcopy(name):
  x = data()
  quantizer = calibrated(ATTRIBUTES[name], x)
  fresh = TensorQuantizer(ATTRIBUTES[name])
  fresh.load_state_dict(quantizer.state_dict())
  for other in (fresh, copy.deepcopy(quantizer)):
    assert torch.equal(other(data(1)), quantizer(data(1)))


def test_pre_quant_scale_is_applied_in_float32_before_quantization_and_while_disabled():
  x, factor = data().bfloat16(), torch.linspace(0.5, 2, 40)
  quantizer = TensorQuantizer({"num_bits": 8})
  quantizer.pre_quant_scale = factor
  scaled = (x.float() * factor).bfloat16()
  assert torch.equal(quantizer(x), core.fake_quantize(x.float() * factor, quantizer.spec).bfloat16())  # one cast, at the end
  quantizer.disable()
  assert torch.equal(quantizer(x), scaled)
  with pytest.raises(ValueError, match="NaN"):
    quantizer.pre_quant_scale = torch.tensor(float("nan"))


@pytest.mark.parametrize("method", ["mean", "max_min"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_affine(method, kind):
  x = data() + 5
  quantizer = calibrated({"num_bits": 8, "bias": {0: None, "type": kind, "method": method}}, x)
  bias = affine.bias(x, (0,), method)
  plain = x.mean(0, keepdim=True) if method == "mean" else (x.amin(0, keepdim=True) + x.amax(0, keepdim=True)) / 2
  torch.testing.assert_close(bias, plain, rtol=1e-6, atol=0)  # summed in another order than torch's mean
  expected = core.fake_quantize(x - bias, quantizer.spec, (x - bias).abs().max()) + bias
  assert torch.equal(quantizer(x), expected)
  if kind == "static":
    assert torch.equal(quantizer.bias_value, bias)
    fresh = TensorQuantizer(quantizer.config)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x + 1), quantizer(x + 1))


@pytest.mark.parametrize("k,size", [(64, None), (96, None), (96, 8), (40, None)])
def test_rotation_is_the_orthonormal_hadamard_matrix(k, size):
  scipy = pytest.importorskip("scipy.linalg")
  x = data(0, (6, k))
  block = size or k & -k
  matrix = scipy.hadamard(block) / np.sqrt(block)
  expected = (x.double().numpy().reshape(6, -1, block) @ matrix).reshape(6, k)
  rotated = hadamard.rotate(x, size)
  # log2(block) roundings of sums of at most `block` terms below 4: well under 1e-5
  np.testing.assert_allclose(rotated.numpy(), expected, atol=1e-5)
  np.testing.assert_array_equal(rotated.numpy(), hadamard.rotate(x.numpy(), size))
  np.testing.assert_allclose(hadamard.unrotate(hadamard.rotate(x, size, 7), size, 7).numpy(), x.numpy(), atol=1e-5)
  rotate = {"enable": True, "mode": "rotate_back", **({"block_size": size} if size else {})}
  quantizer = TensorQuantizer({"num_bits": 8, "rotate": rotate})
  assert torch.equal(quantizer(x), hadamard.unrotate(core.fake_quantize(rotated, quantizer.spec), size))
  quantizer.disable()
  np.testing.assert_allclose(quantizer(x).numpy(), x.numpy(), atol=1e-5)


def test_rotation_of_an_odd_axis_says_so():
  with pytest.raises(ValueError, match="even length, got 7"):
    TensorQuantizer({"num_bits": 8, "rotate": True})(data(0, (2, 7)))


def test_sequential_calibrates_on_what_came_before():
  """W4A8: the FP8 amax is that of the INT4 values."""
  x = data(0, (8, 64))
  parts = ({"num_bits": 4, "block_sizes": {-1: 16}}, {"num_bits": (4, 3)})
  sequence = SequentialQuantizer(*(TensorQuantizer(p) for p in parts))
  for one in sequence:
    one.enable_calib()
    one.disable_quant()
  assert torch.equal(sequence(x), x)
  for one in sequence:
    one.disable_calib()
    one.enable_quant()
    one.load_calib_amax()
  inner = core.fake_quantize(x, sequence[0].spec)
  assert torch.equal(sequence.amax, inner.abs().max())
  assert torch.equal(sequence(x), core.fake_quantize(inner, sequence[1].spec))
  assert [c.spec.element.name for c in sequence.config] == ["INT4", "E4M3"]
  with pytest.raises(ValueError, match="list of 2"):
    sequence.set_from_attribute_config([{"num_bits": 8}])
  with pytest.raises(TypeError, match="TensorQuantizers"):
    SequentialQuantizer()


def test_stochastic_rounding_is_unbiased_and_moves_on():
  quantizer = TensorQuantizer({"num_bits": 4, "rounding": "stochastic"})
  quantizer.amax = 7.0
  x = torch.full((20000,), 1.3)
  first, second = quantizer(x), quantizer(x)
  assert set(first.unique().tolist()) == {1.0, 2.0} and not torch.equal(first, second)
  # standard error of the mean: sqrt(.3 * .7 / 20000) = 0.0032
  assert abs(float(first.mean()) - 1.3) < 4 * 0.0032
  fresh = TensorQuantizer({"num_bits": 4, "rounding": "stochastic"})
  fresh.amax = 7.0
  assert torch.equal(fresh(x), first)


def test_public_names_and_presets():
  assert tb.INT8_DEFAULT_CFG["algorithm"] == "max"
  assert set(tb.choices) <= set(dir(tb))
  with pytest.raises(AttributeError, match="INT9"):
    tb.INT9_DEFAULT_CFG  # noqa: B018
