"""The verbs: quantize, dequantize, fake_quantize, and the amax they take.

`fake_quantize(x) == dequantize(quantize(x))`, bit for bit: both run `_levels`, and a code stands for exactly one level.
"""

from __future__ import annotations

from typing import NamedTuple

from core import blocks, encoding, rounding, scaling
from core.arrays import Array, namespace
from core.blocks import Tiling
from core.formats import TRACED_E4M3 as E4M3
from core.formats import TRACED_E8M0 as E8M0
from core.formats import TRACED_UINT8 as UINT8
from core.formats import IntFormat
from core.scaling import Scales
from core.spec import QuantSpec


class QuantizedTensor(NamedTuple):
  """Codes and scales of one tensor: what is stored and exported.

  Attributes:
    codes: the tensor's shape; int8 for signed integers, uint8 otherwise (not packed: see `pack`).
    scale: stored scales, one per group: float32, or uint8 codes of E8M0, E4M3 or a double-quantized scale.
    tensor_scale: float32 second-level scale, or None.
    zero_point: int32, or None.
    spec: the specification.
    shape: the tensor's shape.
  """

  codes: Array
  scale: Array
  tensor_scale: Array | None
  zero_point: Array | None
  spec: QuantSpec
  shape: tuple[int, ...]


def amax(x: Array, spec: QuantSpec) -> Array:
  """Largest finite magnitude of every group, as `quantize` and `fake_quantize` take it.

  Args:
    x: [...] floating point array.
    spec: specification.

  Returns:
    float32: `[]` per tensor and for a dynamic two-level specification (the tensor amax); kept axes with the others 1 for `axis`;
    one entry per block, for example [..., K/B], for blocks; with a leading axis of 2, (lo, hi), for spec.zero_point.

  Raises:
    TypeError: x is not floating point.
    ValueError: the specification does not fit the shape.
  """
  if spec.two_level and spec.dynamic:
    return tensor_amax(x)
  return block_amax(x, spec)


def block_amax(x: Array, spec: QuantSpec) -> Array:
  """Like `amax`, per block for dynamic two-level specifications too."""
  return scaling.block_amax_of(_as_float32(x), blocks.tiling(x.shape, spec), spec)


def tensor_amax(x: Array) -> Array:
  """Largest finite magnitude of the whole tensor. [] float32."""
  x = _as_float32(x)
  return scaling.finite_amax(x, tuple(range(x.ndim))).reshape(())


def fake_quantize(
  x: Array,
  spec: QuantSpec,
  amax: Array | None = None,
  *,
  tensor_amax: Array | None = None,
  scales: Scales | None = None,
  key: tuple[Array, Array] | None = None,
) -> Array:
  """Quantize and dequantize: what the stored codes will compute.

  Args:
    x: [...] float32, bfloat16, float16 or float64.
    spec: specification.
    amax: what `core.amax(x, spec)` returns, from calibration; None takes it from x. A negative amax is a negative scale where
      `spec.allows_signed_scale` (SPEC.md 4.1), zero elsewhere.
    tensor_amax: [] for two-level scales with a given block amax (siblings that share a tensor scale); None is the largest block amax.
    scales: scales computed before (`core.scales`); skips their computation.
    key: two int32, for spec.rounding == "stochastic".

  Returns:
    The shape and dtype of x.

  Raises:
    TypeError: x is not floating point.
    ValueError: the specification does not fit the shape, or stochastic rounding without a key.
  """
  xp = namespace(x)
  tiling = blocks.tiling(x.shape, spec)
  tiles = blocks.to_blocks(_as_float32(x), tiling)
  if scales is None:
    scales = _scales(tiles, tiling, spec, amax, tensor_amax)
  levels = _levels(tiles, tiling, spec, scales, _uniform(x, tiling, spec, key), narrow=str(x.dtype).endswith("float16"))
  y = blocks.from_blocks(xp.multiply_(levels, blocks.expand(scales.step, tiling)), tiling)
  return cast_saturating(y, x)


def quantize(
  x: Array,
  spec: QuantSpec,
  amax: Array | None = None,
  *,
  tensor_amax: Array | None = None,
  key: tuple[Array, Array] | None = None,
) -> QuantizedTensor:
  """Codes and scales.

  Args:
    x: [...] float32, bfloat16, float16 or float64.
    spec: specification.
    amax: what `core.amax(x, spec)` returns, from calibration; None takes it from x. A negative amax is a negative scale where
      `spec.allows_signed_scale` (SPEC.md 4.1), zero elsewhere.
    tensor_amax: see `fake_quantize`.
    key: two int32, for spec.rounding == "stochastic".

  Returns:
    QuantizedTensor. NaN gets the format's NaN code, or 0 where it has none.

  Raises:
    TypeError: x is not floating point.
    ValueError: the specification does not fit the shape, or stochastic rounding without a key.
  """
  tiling = blocks.tiling(x.shape, spec)
  tiles = blocks.to_blocks(_as_float32(x), tiling)
  scale = _scales(tiles, tiling, spec, amax, tensor_amax)
  levels = _levels(tiles, tiling, spec, scale, _uniform(x, tiling, spec, key))
  if scale.zero_point is not None:
    levels = levels + blocks.expand(namespace(x).float32(scale.zero_point), tiling)
  codes = blocks.from_blocks(encoding.encode(levels, spec.element), tiling)
  return QuantizedTensor(codes, scale.scale, scale.tensor_scale, scale.zero_point, spec, tiling.shape)


def dequantize(q: QuantizedTensor) -> Array:
  """Values of codes and scales.

  Args:
    q: what `quantize` returned, or the same fields read from a file.

  Returns:
    q.shape, float32.
  """
  return apply_scales(encoding.decode(q.codes, q.spec.element), q)


def apply_scales(levels: Array, q: QuantizedTensor) -> Array:
  """Values of levels under the scales and zero points of q, whose codes are not looked at.

  Args:
    levels: q.shape, float32: what the codes stand for (`encoding.decode`).
    q: scales, zero point, specification and shape.

  Returns:
    q.shape, float32.
  """
  tiling = blocks.tiling(q.shape, q.spec)
  xp = namespace(levels)
  levels = blocks.to_blocks(levels, tiling)
  if q.zero_point is not None:
    levels = levels - blocks.expand(xp.float32(q.zero_point), tiling)
  if q.spec.scale_format == E8M0:
    # 2^-127 is no normal float32: as 2^-126 / 2 it is not flushed before it meets the level
    levels = levels * blocks.expand(1.0 - 0.5 * xp.float32(q.scale == 0), tiling)
  step = blocks.expand(step_of(q), tiling)
  return blocks.from_blocks(levels * step, tiling)


def step_of(q: QuantizedTensor) -> Array:
  """The float32 that each level of a group is multiplied by, from the stored scales."""
  xp, fmt = namespace(q.scale), q.spec.scale_format
  if fmt == E8M0:
    (step,) = xp.barrier(scaling.e8m0_step(q.scale))
    return step
  if q.spec.two_level:
    (step,) = xp.barrier(encoding.decode(q.scale, E4M3) * q.tensor_scale)
    return step
  if fmt == UINT8:
    size = min(q.spec.scale_block or q.scale.shape[-1], q.scale.shape[-1])
    index = xp.int32(xp.arange(q.scale.shape[-1], q.scale)) // size
    (step,) = xp.barrier(xp.float32(q.scale) * xp.take_last(q.tensor_scale, index))
    return step
  return q.scale


def pack(codes: Array | QuantizedTensor, width: int | None = None) -> Array:
  """Codes as bytes along the last axis, lowest bits first (nibbles: low one first); see `encoding.pack_codes`.

  Args:
    codes: a QuantizedTensor, or an array of codes with `width`.
    width: bits per code.

  Raises:
    ValueError: an array without width.
  """
  if isinstance(codes, QuantizedTensor):
    return encoding.pack_codes(codes.codes, codes.spec.element.bits)
  if width is None:
    raise ValueError("packing an array of codes needs `width`, their number of bits (1 to 8)")
  return encoding.pack_codes(codes, width)


def unpack(packed: Array, spec: QuantSpec, length: int) -> Array:
  """The inverse of `pack`: codes of `spec.element`, `length` of them along the last axis."""
  signed = isinstance(spec.element, IntFormat) and spec.element.signed
  return encoding.unpack_codes(packed, spec.element.bits, length, signed)


def _levels(tiles: Array, tiling: Tiling, spec: QuantSpec, scales: Scales, uniform: Array | None, narrow: bool = False) -> Array:
  xp = namespace(tiles)
  with xp.quiet():  # infinity and the far side of a given amax overflow here, and saturate in the next step
    scaled = tiles * blocks.expand(scales.inv_step, tiling)
    if scales.zero_point is None:
      return rounding.to_level(scaled, spec.element, uniform, overwrite=True, narrow=narrow)
    assert isinstance(spec.element, IntFormat)
    zero_point = blocks.expand(xp.float32(scales.zero_point), tiling)
    low, high = spec.element.min_code - zero_point, spec.element.max_code - zero_point
    rounded = rounding.to_integer(scaled, uniform)
    return xp.positive_zero_(xp.minimum(xp.maximum(rounded, low), high))


def _scales(tiles: Array, tiling: Tiling, spec: QuantSpec, amax: Array | None, tensor_amax: Array | None) -> Scales:
  xp = namespace(tiles)
  if amax is not None and spec.two_level and spec.dynamic:
    tensor_amax, amax = amax, None
  signed = amax is not None
  if amax is not None:
    amax = xp.float32(amax)
    group = amax
  elif spec.zero_point:
    group = scaling.value_range(tiles, tiling.reduce).reshape((2, *tiling.scales))
  else:
    group = scaling.finite_amax(tiles, tiling.reduce).reshape(tiling.scales)
  if tensor_amax is not None:
    tensor_amax = xp.float32(tensor_amax).reshape(())
  return scaling.scales(group, spec, tensor_amax, tiles=tiles, tiling=tiling, signed=signed)


def _uniform(x: Array, tiling: Tiling, spec: QuantSpec, key: tuple[Array, Array] | None) -> Array | None:
  if spec.rounding != "stochastic":
    return None
  if key is None:
    raise ValueError('rounding="stochastic" needs key=(k0, k1), two int32; the same key gives the same bits in every framework')
  return blocks.to_blocks(rounding.random_uniform(key, x.shape, x), tiling)


def _as_float32(x: Array) -> Array:
  xp = namespace(x)
  if not xp.is_float(x):
    raise TypeError(f"expected a floating point array, got dtype {x.dtype} (shape {list(x.shape)}); convert it to float32 first")
  return xp.float32(x)


def cast_saturating(y: Array, like: Array) -> Array:
  """y (float32) in the dtype of `like`. Only float16 has a finite range that a level times its step can leave; infinity saturates too."""
  xp = namespace(y)
  if like.dtype == y.dtype:
    return y
  if str(like.dtype).endswith("float16") and not str(like.dtype).endswith("bfloat16"):
    y = xp.clip(y, -65504.0, 65504.0)
  return xp.cast(y, like.dtype)
