"""Peers' arithmetic: equal where the convention is the same; where it is known to differ, the stated difference is still there.

SPEC.md, section 8, lists the disagreements. A test of a disagreement that starts to fail means that a peer changed: then change SPEC.md.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import core
from core import formats
from tests.spec.specs import plain

FLOATS = {"e4m3": formats.E4M3, "e5m2": formats.E5M2, "e3m2": formats.E3M2, "e2m3": formats.E2M3, "e2m1": formats.E2M1}


def weights(seed: int = 0, shape: tuple[int, ...] = (32, 256)) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def equal_bits(a, b) -> bool:
  return np.array_equal(np.asarray(a, np.float32).view(np.int32), np.asarray(b, np.float32).view(np.int32))


# ---------------------------------------------------------------- gfloat, jax, torch


@pytest.mark.parametrize("name", FLOATS)
def test_gfloat_rounds_and_decodes_alike(name, compared):
  import gfloat
  from gfloat import formats as theirs

  info, fmt = getattr(theirs, f"format_info_ocp_{name}"), FLOATS[name]
  x = np.concatenate([weights(1, (2000,)) * fmt.bound / 3, np.float32(fmt.bound) * np.float32([1, 1.2, -5, 0, -0.0])]).astype(np.float32)
  ours = core.fake_quantize(x, core.QuantSpec(fmt), np.float32(fmt.bound))
  expected = [gfloat.round_float(info, float(v), sat=True) for v in x]
  codes = core.quantize(x, core.QuantSpec(fmt), np.float32(fmt.bound)).codes
  compared(2 * x.size)
  assert equal_bits(ours, expected)
  assert equal_bits(ours, [gfloat.decode_float(info, int(c)).fval for c in codes])


@pytest.mark.parametrize("key", ((0, 0), (1, 2), (0xFFFFFFFF, 7), (123456789, 0x80000000)))
def test_threefry_equals_jax(key, compared):
  import jax

  data = jax.numpy.array(key, jax.numpy.uint32)
  assert jax.config.jax_threefry_partitionable
  words = jax.random.bits(jax.random.wrap_key_data(data, impl="threefry2x32"), (37, 101), "uint32")
  ours = core.bits.threefry2x32(key, np.arange(37 * 101, dtype=np.int32)).view(np.uint32).reshape(37, 101)
  compared(ours.size)
  assert np.array_equal(np.asarray(words), ours)


def test_torch_float8_casts(compared):
  """A native cast after a clip, the legitimate fast path."""
  x = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
  x = x[np.isfinite(x)]
  for fmt, dtype in ((formats.E4M3, torch.float8_e4m3fn), (formats.E5M2, torch.float8_e5m2)):
    theirs = torch.from_numpy(np.clip(x, -fmt.bound, fmt.bound)).to(dtype).view(torch.uint8).numpy()
    compared(x.size)
    assert np.array_equal(theirs, core.quantize(x, core.QuantSpec(fmt), np.float32(fmt.bound)).codes)


def test_ml_dtypes_beyond_the_bound_differs():
  """Ours saturates; a bare cast gives NaN (E4M3) or infinity (E5M2)."""
  import ml_dtypes

  x = np.float32([465.0, 1e6])
  assert np.isnan(x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).all()
  assert np.isinf(np.float32([1e6]).astype(ml_dtypes.float8_e5m2).astype(np.float32)).all()
  assert core.fake_quantize(x, core.QuantSpec(formats.E4M3), np.float32(448)).tolist() == [448, 448]


# ---------------------------------------------------------------- torchao


@pytest.mark.parametrize("rule", ("floor", "rceil", "ceil", "even"))
@pytest.mark.parametrize("name", ("e4m3", "e2m1"))
def test_torchao_mx(name, rule, compared):
  from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

  dtype = torch.float8_e4m3fn if name == "e4m3" else torch.float4_e2m1fn_x2
  x = weights(3) * np.float32(1.7)
  scale, data = to_mx(torch.from_numpy(x), dtype, 32, ScaleCalculationMode(rule))
  q = core.quantize(x, core.QuantSpec.named("mxfp8_e4m3" if name == "e4m3" else "mxfp4", e8m0_rule=rule))
  compared(q.codes.size + q.scale.size)
  assert np.array_equal(scale.view(torch.uint8).numpy().reshape(q.scale.shape), q.scale)
  ours = q.codes if name == "e4m3" else core.pack(q)
  assert np.array_equal(data.view(torch.uint8).numpy().reshape(ours.shape), ours)


def test_torchao_nvfp4_scales_and_codes(compared):
  """Equal on normal data (0 of 10^6 codes), although theirs multiplies by the two inverses in turn and may differ at near-ties."""
  from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

  x = weights(4)
  spec = core.QuantSpec.named("nvfp4")
  q = core.quantize(x, spec)
  scale, data = nvfp4_quantize(torch.from_numpy(x), 16, torch.tensor(float(q.tensor_scale)))
  codes = core.unpack(data.view(torch.uint8).numpy().reshape(x.shape[0], -1), spec, x.shape[1])
  compared(q.codes.size + q.scale.size)
  assert np.array_equal(scale.view(torch.uint8).numpy().reshape(q.scale.shape), q.scale)
  assert np.array_equal(codes, q.codes)


# ---------------------------------------------------------------- compressed-tensors


def test_compressed_tensors_packs_int4_alike(compared):
  """Their int32 words hold eight offset-binary nibbles, low one first: our packed bytes with the sign bit of each nibble flipped."""
  from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

  codes = core.quantize(weights(5), core.QuantSpec.named("int4")).codes
  theirs = pack_to_int32(torch.from_numpy(codes), 4).numpy()
  ours = (core.pack(codes, 4) ^ np.uint8(0x88)).view(np.int32)
  compared(codes.size)
  assert np.array_equal(theirs, ours)


def test_compressed_tensors_fp4_cast(compared):
  from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

  x = np.concatenate([weights(6, (5000,)) * 3, np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5, 100, 0])]).astype(np.float32)
  theirs = FP4_E2M1_DATA.cast_to_fp4(torch.from_numpy(x)).numpy()
  compared(x.size)
  assert np.array_equal(theirs, core.fake_quantize(x, core.QuantSpec(formats.E2M1), np.float32(6)))


def test_bound_127_5_is_the_scale_of_compressed_tensors_and_qwix():
  """amax / 127.5 for symmetric INT8: another scale than ours on every row, ours by name."""
  from compressed_tensors.quantization import QuantizationArgs
  from compressed_tensors.quantization.utils import calculate_qparams

  x = weights(7, (16, 64))
  low, high = torch.from_numpy(x.min(1, keepdims=True)), torch.from_numpy(x.max(1, keepdims=True))
  scale, _ = calculate_qparams(low, high, QuantizationArgs(num_bits=8, symmetric=True))
  spec = core.QuantSpec(formats.INT8, axis=(0,))
  assert np.array_equal(scale.numpy(), core.quantize(x, spec.replace(bound=127.5)).scale)
  assert (scale.numpy() != core.quantize(x, spec).scale).all()


def test_qwix_maps_amax_to_127_5():
  import jax.numpy as jnp
  from qwix._src.core import qarray

  x = weights(8, (16, 64))
  how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes={}, calibration_method="absmax")
  scale = np.asarray(qarray.quantize(jnp.asarray(x), how).scale)
  ratio = scale / core.quantize(x, core.QuantSpec(formats.INT8, axis=(0,))).scale
  assert np.allclose(ratio, 127 / 127.5, rtol=1e-6)  # 1e-6: both scales are one or two float32 roundings from the true quotient


# ---------------------------------------------------------------- ModelOpt


@pytest.fixture(scope="module")
def modelopt():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization.qtensor as qtensor
    from modelopt.torch.quantization import tensor_quant
  return tensor_quant, qtensor


@pytest.mark.parametrize(("width", "block"), ((8, None), (4, 128)))
def test_modelopt_int_weights(modelopt, width, block, compared):
  """Codes equal; values within two float32 roundings (they divide by Q/amax, we multiply by amax/Q): 27 to 36 % differ in the last bit."""
  x = weights(9, (64, 512))
  spec = core.QuantSpec(formats.int_format(width), axis=(0,)) if block is None else core.QuantSpec(formats.INT4, blocks=((-1, block),))
  rows = x if block is None else x.reshape(-1, block)
  amax = torch.from_numpy(np.abs(rows).max(axis=1, keepdims=True))
  theirs = modelopt[0].fake_tensor_quant(torch.from_numpy(rows), amax, None, width, False, False).numpy().reshape(x.shape)
  ours = core.fake_quantize(x, spec)
  far = np.abs(theirs - ours) > 4e-7 * np.abs(x).max()  # a float32 ulp of the largest value; a differing code is a whole step
  compared(x.size)
  assert not far.any()
  assert (theirs != ours).any()  # the values differ in their last bit: they divide by Q/amax, we multiply by amax/Q


def test_modelopt_fp8_weights(modelopt, compared):
  x = weights(10, (64, 512))
  theirs = modelopt[0]._fp8_eager(torch.from_numpy(x), torch.tensor(np.abs(x).max())).numpy()
  ours = core.fake_quantize(x, core.QuantSpec.named("fp8_e4m3"))
  # 4e-7: their scale is rounded three times, ours once
  compared(x.size)
  assert np.allclose(theirs, ours, rtol=4e-7, atol=0)


def test_modelopt_bfloat16_simulation_is_not_its_export(modelopt):
  """INT8 from bfloat16: their fake values and their own dequantized weights differ in many elements; ours never do."""
  x = torch.from_numpy(weights(11, (64, 512))).bfloat16()
  amax = x.float().abs().amax(dim=1, keepdim=True)
  fake = modelopt[0].fake_tensor_quant(x, amax.bfloat16(), None, 8, False, False)
  scale = (amax / 127).bfloat16()
  real = (x / scale).round().clamp(-128, 127) * scale  # INT8QTensor's arithmetic, in the weight's own type
  assert 0.05 < (fake != real).float().mean() < 0.5
  spec = core.QuantSpec(formats.INT8, axis=(0,))
  assert torch.equal(core.fake_quantize(x, spec), core.dequantize(core.quantize(x, spec)).bfloat16())


def test_modelopt_nvfp4_tensor(modelopt, compared):
  """Tensor scale, block scales and codes equal on normal data (0 of 10^6 codes differ), although they divide by the step."""
  x = weights(12)
  stored, scale, second = modelopt[1].NVFP4QTensor.quantize(torch.from_numpy(x), 16)
  spec = core.QuantSpec.named("nvfp4")
  q = core.quantize(x, spec)
  codes = core.unpack(stored._quantized_data.numpy(), spec, x.shape[1])
  compared(q.codes.size + q.scale.size + 1)
  assert np.array_equal(scale.view(torch.uint8).numpy().reshape(q.scale.shape), q.scale)
  assert equal_bits(second.numpy().reshape(()), q.tensor_scale)
  assert np.array_equal(codes, q.codes)


def test_modelopt_nvfp4_zero_tensor_is_nan_there_and_zero_here(modelopt):
  zero = np.zeros((2, 32), np.float32)
  _, scale, _ = modelopt[1].NVFP4QTensor.quantize(torch.from_numpy(zero), 16)
  assert torch.isnan(scale.float()).all()
  q = core.quantize(zero, core.QuantSpec.named("nvfp4"))
  assert not q.codes.any() and (q.scale == 0x38).all()


def test_modelopt_mxfp8_tensor(modelopt, compared):
  x = weights(13)
  stored, scale = modelopt[1].MXFP8QTensor.quantize(torch.from_numpy(x))
  q = core.quantize(x, core.QuantSpec.named("mxfp8_e4m3"))
  compared(q.codes.size + q.scale.size)
  assert np.array_equal(scale.numpy().reshape(q.scale.shape), q.scale)
  assert np.array_equal(stored._quantized_data.view(torch.uint8).numpy(), q.codes)


def test_modelopt_mxfp4_ties_go_toward_zero(modelopt, compared):
  """Off ties equal, up to the code of zero; on ties theirs is the lower magnitude: 0.75 -> 0.5, 1.75 -> 1.5, 3.5 -> 3."""
  x = weights(14)
  spec = core.QuantSpec.named("mxfp4")
  stored, scale = modelopt[1].MXFP4QTensor.quantize(torch.from_numpy(x), 32)
  q = core.quantize(x, spec)
  codes = core.unpack(stored._quantized_data.numpy().reshape(x.shape[0], -1), spec, x.shape[1])
  compared(q.codes.size + q.scale.size)
  assert np.array_equal(scale.numpy().reshape(q.scale.shape), q.scale)
  assert ((codes & 7) == (q.codes & 7)).all()
  ties = np.tile(np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]), (1, 4))
  stored, _ = modelopt[1].MXFP4QTensor.quantize(torch.from_numpy(ties), 32)
  theirs = core.unpack(stored._quantized_data.numpy().reshape(1, -1), spec, 32)[0, :8]
  assert theirs.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
  assert core.quantize(ties, spec).codes[0, :8].tolist() == [0, 2, 2, 4, 4, 6, 6, 7]


def test_plain_data_is_what_the_parity_tests_use():
  """Guard of the oracles' inputs: unit-variance data with exact ties in it."""
  assert np.isfinite(plain()).all() and (np.abs(plain()[0]) <= 6).all()
