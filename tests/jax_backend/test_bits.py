"""What the JAX backend computes is `core` on the torch-layout numpy tensor, bit for bit."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import jax_backend as jb
from core.config.schema import QuantizerConfig
from jax_backend import layouts, weights
from jax_backend.layouts import Layout
from jax_backend.quantizer import Quantizer

ATTRIBUTES = {
  "int8_tensor": {"num_bits": 8},
  "int8_channel": {"num_bits": 8, "axis": 0},
  "int8_asymmetric": {"num_bits": 8, "axis": 0, "zero_point": True},
  "int4_block": {"num_bits": 4, "block_sizes": {-1: 16}},
  "int4_ragged": {"num_bits": 4, "block_sizes": {-1: 7}},
  "fp8": {"num_bits": (4, 3)},
  "fp8_tile": {"num_bits": (4, 3), "block_sizes": {-1: 8, -2: 8}},
  "fp8_token": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
  "mxfp4": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
  "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
  "nvfp4_static": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}},
  "nvfp4_46": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3), "four_over_six": True}},
  "nf4_double": {"format": "nf4_double"},
}
LAYOUTS = {
  "dense": ((20, 12), layouts.from_letters("io")),
  "dense_general": ((2, 20, 4, 3), layouts.fixed((2, 3), (0, 1))),
  "experts": ((3, 20, 4), layouts.from_letters("eio")),
  "conv": ((3, 3, 20, 6), layouts.from_letters("hwio")),
  "depthwise": ((3, 1, 8), layouts.from_letters("wio")),
  "torch_order": ((6, 20), layouts.from_letters("oi")),
}


def same_bits(a, b):
  a, b = np.asarray(a), np.asarray(b)
  assert a.dtype == b.dtype and a.shape == b.shape
  assert a.tobytes() == b.tobytes(), np.argwhere(a != b)[:5]


def torch_view(x, layout: Layout):
  """The torch-layout copy, by plain numpy."""
  dims = layout.of(x.ndim)
  order = [a for group in dims for a in group]
  return np.transpose(x, order).reshape([int(np.prod([x.shape[a] for a in group])) for group in dims])


# every format on a Dense kernel; in the other layouts, the formats that look at neighbours, tiles or one tensor scale
CASES = [("dense", a) for a in ATTRIBUTES] + [
  (w, a) for w in LAYOUTS if w != "dense" for a in ("int4_ragged", "fp8_tile", "nvfp4", "nf4_double")
]


@pytest.mark.parametrize("which, attributes", CASES)
def test_weight_quantizer_equals_core_on_the_torch_tensor(which, attributes):
  shape, layout = LAYOUTS[which]
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  x.reshape(-1)[:3] = [0.0, -0.0, 1e-30]
  config = QuantizerConfig.from_attributes(ATTRIBUTES[attributes])
  quantizer = weights.calibrate(Quantizer(config, layout=layout, param="kernel"), jnp.asarray(x), "w")
  reference = torch_view(x, layout)
  if quantizer.amax is not None:
    same_bits(quantizer.amax, core.amax(reference, config.spec))
  expected = core.fake_quantize(reference, config.spec, core.amax(reference, config.spec))
  same_bits(torch_view(np.asarray(quantizer(jnp.asarray(x))), layout), expected)
  if which == "dense":
    same_bits(torch_view(np.asarray(weights.quantized(quantizer, jnp.asarray(x))), layout), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types_come_back_and_statistics_are_float32(dtype):
  x = jax.random.normal(jax.random.key(0), (20, 12), dtype)
  config = QuantizerConfig.from_attributes(ATTRIBUTES["int8_channel"])
  quantizer = weights.calibrate(Quantizer(config, layout=layouts.from_letters("io"), param="kernel"), x, "w")
  assert quantizer.amax.dtype == jnp.float32
  expected = core.fake_quantize(np.asarray(x).T, config.spec)
  same_bits(np.ascontiguousarray(np.asarray(quantizer(x)).T), np.ascontiguousarray(expected))


@pytest.mark.parametrize("shape", [(2, 5, 20), (2, 20)])
@pytest.mark.parametrize("attributes", ["int8_tensor", "fp8_token", "mxfp4", "nvfp4"])
def test_activation_quantizer_in_eager_jit_vmap_and_remat(shape, attributes):
  x = jax.random.normal(jax.random.key(0), shape)
  config = QuantizerConfig.from_attributes(ATTRIBUTES[attributes])
  quantizer = Quantizer(config)
  expected = core.fake_quantize(np.asarray(x), config.spec)
  for run in (quantizer, jax.jit(quantizer.__call__), jax.checkpoint(quantizer.__call__)):
    same_bits(run(x), expected)
  rows = jax.vmap(quantizer.__call__)(x)
  same_bits(rows, np.stack([core.fake_quantize(np.asarray(row), config.spec) for row in x]))


def test_channels_last_axes_are_those_of_nchw():
  x = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype(np.float32)
  for attributes in ({"num_bits": 8, "axis": 1}, ATTRIBUTES["nvfp4"], {"num_bits": 4, "block_sizes": {-1: 4}}):
    config = QuantizerConfig.from_attributes(attributes)
    y = Quantizer(config, layout=Layout("channels_last", spatial=2))(jnp.asarray(x))
    nchw = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    same_bits(np.ascontiguousarray(np.moveaxis(np.asarray(y), -1, 1)), core.fake_quantize(nchw, config.spec))


def test_dense_general_flattens_its_activation():
  # torch's o_proj sees [.., heads * head_dim]; blocks of 16 cross the heads of 10
  x = np.random.default_rng(0).standard_normal((2, 3, 4, 10)).astype(np.float32)
  config = QuantizerConfig.from_attributes(ATTRIBUTES["nvfp4"])
  y = Quantizer(config, layout=Layout("flatten", axes=(-2, -1)))(jnp.asarray(x))
  same_bits(np.asarray(y).reshape(2, 3, 40), core.fake_quantize(x.reshape(2, 3, 40), config.spec))


def test_kept_scales_give_the_same_bits_as_amax():
  x = jax.random.normal(jax.random.key(0), (20, 12))
  for attributes in ("int8_channel", "int4_ragged", "nvfp4_static", "nf4_double", "int8_asymmetric"):
    quantizer = Quantizer(QuantizerConfig.from_attributes(ATTRIBUTES[attributes]), layout=layouts.from_letters("io"), param="kernel")
    quantizer = weights.calibrate(quantizer, x, "w")
    assert quantizer.scales is not None
    same_bits(quantizer(x), quantizer.replace(scales=None)(x))


def test_float64_is_carried_and_decided_in_float32():
  with jax.enable_x64(True):
    x = jax.random.normal(jax.random.key(0), (4, 16), jnp.float64)
    config = QuantizerConfig.from_attributes(ATTRIBUTES["int8_tensor"])
    y = Quantizer(config)(x)
    assert y.dtype == jnp.float64
    same_bits(y, core.fake_quantize(np.asarray(x).astype(np.float32), config.spec).astype(np.float64))


def test_weight_quantization_shows_torch_layouts(cnn):
  module, variables, x = cnn
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  shown = jb.weight_quantization(qmodule, qvariables)
  kernel = np.asarray(variables["params"]["Conv_0"]["kernel"])
  weight, config, amax = shown["Conv.0.weight_quantizer"]
  same_bits(np.ascontiguousarray(weight), np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
  assert amax.shape == (6, 1, 1, 1)
  codes = core.quantize(np.asarray(weight), config.spec, np.asarray(amax))
  folded = jb.fold_weight(qmodule, qvariables)["params"]["Conv_0"]["kernel"]
  same_bits(np.ascontiguousarray(np.asarray(folded).transpose(3, 2, 0, 1)), core.dequantize(codes))


def test_einsum_kernels_and_inputs():
  x = jax.random.normal(jax.random.key(0), (3, 4, 5))
  module = nn.Einsum((5, 6, 7), "abc,cde->abde")
  variables = module.init(jax.random.key(1), x)
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  weight, config, amax = jb.weight_quantization(qmodule, qvariables)["weight_quantizer"]
  kernel = np.asarray(variables["params"]["kernel"])
  same_bits(weight, np.ascontiguousarray(kernel.reshape(5, 42).T))
  same_bits(amax, core.amax(np.asarray(weight), config.spec))


def test_affine_bias_is_the_same_under_jit():
  # level * step + bias must not become one fused operation
  x = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32) + 3
  bias = ((x.min(0, keepdims=True) + x.max(0, keepdims=True)) / 2).astype(np.float32)
  config = QuantizerConfig.from_attributes({"num_bits": 8, "axis": -1, "bias": {-2: None, "method": "max_min"}})
  amax = core.amax(x - bias, config.spec)
  quantizer = Quantizer(config).with_amax(amax).replace(bias=jnp.asarray(bias))
  expected = core.fake_quantize(x - bias, config.spec, amax) + bias
  same_bits(quantizer(jnp.asarray(x)), expected)
  same_bits(jax.jit(quantizer.__call__)(jnp.asarray(x)), expected)


def test_another_amax_drops_the_kept_scales():
  x = jax.random.normal(jax.random.key(0), (4, 16))
  quantizer = Quantizer(QuantizerConfig.from_attributes({"num_bits": 8})).with_amax(1.0)
  same_bits(quantizer.replace(amax=jnp.float32(2.0))(x), quantizer.with_amax(2.0)(x))
