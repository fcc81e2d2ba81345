"""Packing in all three frameworks: every code, every width, every byte; tensors in their storage types."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import core
from core import encoding, formats
from core.arrays import to_numpy

ARRAYS = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jnp.asarray}
FORMATS = [
  *(formats.int_format(bits, signed) for bits in range(2, 9) for signed in (True, False)),
  formats.E4M3, formats.E5M2, formats.E3M2, formats.E2M3, formats.E2M1, formats.NF4,
]  # fmt: skip
SPECS = {
  **{name: core.QuantSpec.named(name) for name in ("int8", "fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")},
  **{name: core.QuantSpec.named(name) for name in ("mxint8", "nvfp4", "nvfp4_four_over_six", "nf4", "nf4_double")},
  "int4": core.QuantSpec.named("int4", blocks=((-1, 16),)),
  "int3": core.QuantSpec(formats.int_format(3), blocks=((-1, 16),)),
  "int5": core.QuantSpec(formats.int_format(5), axis=(0,)),
  "uint4 with zero points": core.QuantSpec(formats.int_format(4, signed=False), blocks=((-1, 16),), zero_point=True),
  "int8 with zero points": core.QuantSpec(formats.INT8, axis=(0,), zero_point=True),
  "int4 under float16 scales": core.QuantSpec(formats.INT4, blocks=((-1, 16),), scale_format=formats.FLOAT16),
  "fp8 2-D": core.QuantSpec(formats.E4M3, blocks=((0, 8), (-1, 64))),
  "ragged": core.QuantSpec.named("mxfp4", pad=True),
}  # fmt: skip

# Eager jax compiles every operation for every shape: its other shapes are slow tests.
SHAPES = [
  pytest.param(framework, shape, name, marks=pytest.mark.slow if framework == "jax" and len(shape) != 2 else ())
  for framework in ARRAYS
  for shape in ((8, 192), (4, 64, 3, 2), (128,))
  for name, spec in SPECS.items()
  if len(shape) > 1 or ("2-D" not in name and spec.axis != (0,))  # two axes, or fewer scales than codes
]


def raw(x) -> bytes:
  return to_numpy(x).tobytes()


WIDTHS = [
  pytest.param(framework, width, marks=[pytest.mark.slow] if framework == "jax" and width not in (4, 6) else [])
  for framework in ARRAYS
  for width in range(1, 9)
]


@pytest.mark.parametrize(("framework", "width"), WIDTHS)
def test_every_code_in_every_place(framework, width, compared):
  """Each code of a width at each place of its group, rows of every length up to three groups; and the bytes of numpy's bit order."""
  for length in range(1, 26) if framework != "jax" else (8, 13):  # eager jax compiles every operation for every length
    codes = (np.arange(2**width)[:, None] + np.arange(length)[None] * 3).astype(np.uint8) & (2**width - 1)
    packed = encoding.pack_codes(ARRAYS[framework](codes), width)
    bits = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :width].reshape(len(codes), -1)
    assert raw(packed) == np.packbits(bits, axis=-1, bitorder="little").tobytes()
    assert raw(encoding.unpack_codes(packed, width, length)) == codes.tobytes()
    signed = ((codes.astype(np.int16) ^ (1 << (width - 1))) - (1 << (width - 1))).astype(np.int8)
    assert raw(encoding.unpack_codes(encoding.pack_codes(ARRAYS[framework](signed), width), width, length, signed=True)) == signed.tobytes()
    compared(2 * codes.size)


@pytest.mark.parametrize("framework", ARRAYS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_byte_decodes_alike(framework, fmt, compared):
  """The look-up table of bytes against the arithmetic on codes; NaN and the sign of zero included."""
  data = np.arange(256 * 3, dtype=np.uint8).reshape(4, 192)
  length = 192 * 8 // fmt.bits
  signed = isinstance(fmt, formats.IntFormat) and fmt.signed
  expected = encoding.decode(encoding.unpack_codes(data, fmt.bits, length, signed), fmt)
  found = to_numpy(encoding.decode_packed(ARRAYS[framework](data), fmt, length))
  numbers = ~np.isnan(expected)
  assert np.array_equal(np.isnan(found), ~numbers) and found[numbers].tobytes() == expected[numbers].tobytes()
  compared(expected.size)


@pytest.mark.parametrize(("framework", "shape", "name"), SHAPES, ids=str)
def test_tensors(framework, shape, name, compared):
  """Packed and unpacked again: the same codes, scales, values; as many bytes as `effective_bits` counts."""
  spec = SPECS[name]
  if len(shape) == 4 and spec.blocks is not None:
    spec = spec.replace(blocks=tuple((1 if axis == -1 else axis, size if axis == -1 else 4) for axis, size in spec.blocks))
  x = ARRAYS[framework](np.random.default_rng(0).normal(size=shape).astype(np.float32))
  q = core.quantize(x, spec)
  p = core.pack_tensor(q)
  again = core.unpack_tensor(p)
  assert again.codes.dtype == q.codes.dtype and again.spec == q.spec and tuple(p.codes.shape) == core.packed_shape(spec, shape)
  for one, other in zip(q[:4], again[:4], strict=True):
    assert (one is None) == (other is None)
    assert one is None or raw(one) == raw(other)
  assert raw(core.dequantize(q)) == raw(core.dequantize_packed(p)) == raw(core.dequantize(again))
  compared(4 * q.codes.size if framework != "torch" else 4 * q.codes.numel())
  counted = core.effective_bits(spec, shape) * np.prod(shape)
  assert counted <= 8 * core.packed_bytes(p) < counted + 8 * (shape[0] + 1)  # each row, and the zero points, end on a byte


def test_signed_scales():
  """A negative amax: the scale's sign survives."""
  x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
  spec = SPECS["int4"]
  amax = -core.amax(x, spec)
  p = core.pack_tensor(core.quantize(x, spec, amax))
  assert (p.scale < 0).all()
  assert raw(core.dequantize_packed(p)) == raw(core.fake_quantize(x, spec, amax))


def test_too_wide():
  spec = core.QuantSpec(formats.FloatFormat("E5M6", 5, 6, 100.0))
  wide = core.QuantizedTensor(np.zeros(4, np.int32), np.ones(()), None, None, spec, (4,))
  with pytest.raises(ValueError, match="E5M6 have 12 bits; 1 to 8 can be packed"):
    core.pack_tensor(wide)
