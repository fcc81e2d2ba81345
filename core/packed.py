"""A quantized tensor as it is held in memory: codes packed into bytes, scales in their storage type. See SPEC.md, "Packing"."""

from __future__ import annotations

import math
from typing import NamedTuple

from core import blocks, encoding
from core.arrays import Array, namespace
from core.formats import FloatFormat, IntFormat
from core.quantize import QuantizedTensor, apply_scales
from core.spec import QuantSpec


class PackedTensor(NamedTuple):
  """What `QuantizedTensor` holds, in as few bytes as the formats say.

  Attributes:
    codes: uint8, codes of `spec.element.bits` bits, lowest bits first, rows padded to a full byte: [N, ceil(K * bits / 8)], where N is
      the tensor's first axis and K all others together; [ceil(K * bits / 8)] of a vector.
    scale: one per group: uint8 codes (E8M0, E4M3, double quantization), float16, or float32.
    tensor_scale: float32 second-level scale, or None.
    zero_point: uint8, all zero points of `spec.element.bits` bits in a row, or None.
    spec: the specification.
    shape: the tensor's shape.
  """

  codes: Array
  scale: Array
  tensor_scale: Array | None
  zero_point: Array | None
  spec: QuantSpec
  shape: tuple[int, ...]


def pack_tensor(q: QuantizedTensor) -> PackedTensor:
  """A quantized tensor packed.

  Args:
    q: what `core.quantize` returned.

  Raises:
    ValueError: codes of more than 8 bits.
  """
  xp, element = namespace(q.codes), q.spec.element
  if element.bits > 8:
    raise ValueError(f"codes of {element.name} have {element.bits} bits; 1 to 8 can be packed")
  codes = encoding.pack_codes(_rows(q.codes), element.bits)
  scale = xp.float16(q.scale) if _narrow_scale(q.spec) else q.scale
  zero_point = q.zero_point
  if zero_point is not None:
    zero_point = encoding.pack_codes(zero_point.reshape(-1), element.bits)
  return PackedTensor(codes, scale, q.tensor_scale, zero_point, q.spec, tuple(q.shape))


def unpack_tensor(p: PackedTensor) -> QuantizedTensor:
  """The inverse of `pack_tensor`."""
  xp = namespace(p.codes)
  codes = encoding.unpack_codes(p.codes, p.spec.element.bits, _row_length(p.shape), _signed(p.spec)).reshape(p.shape)
  return QuantizedTensor(codes, *_scales(xp, p), p.spec, p.shape)


def dequantize_packed(p: PackedTensor) -> Array:
  """`core.dequantize(unpack_tensor(p))`, bit for bit, in fewer steps.

  Args:
    p: what `pack_tensor` returned, or the same fields read from a file.

  Returns:
    p.shape, float32.
  """
  xp = namespace(p.codes)
  levels = encoding.decode_packed(p.codes, p.spec.element, _row_length(p.shape)).reshape(p.shape)
  return apply_scales(levels, QuantizedTensor(levels, *_scales(xp, p), p.spec, p.shape))


def packed_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of `PackedTensor.codes` of a tensor of that shape."""
  return (*shape[: min(len(shape) - 1, 1)], -(-_row_length(shape) * spec.element.bits // 8))


def packed_zero_points(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int] | None:
  """Shape of `PackedTensor.zero_point` of a tensor of that shape; None where there is none."""
  count = math.prod(blocks.tiling(shape, spec).scales)
  return (-(-count * spec.element.bits // 8),) if spec.zero_point else None


def packed_bytes(p: PackedTensor) -> int:
  """Bytes of codes, scales and zero points."""
  return sum(_size(part) for part in (p.codes, p.scale, p.tensor_scale, p.zero_point) if part is not None)


def _size(array: Array) -> int:
  return math.prod(array.shape) * int(array.dtype.itemsize)


def _rows(codes: Array) -> Array:
  return codes.reshape((codes.shape[0], -1)) if codes.ndim > 2 else codes


def _row_length(shape: tuple[int, ...]) -> int:
  return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def _signed(spec: QuantSpec) -> bool:
  return isinstance(spec.element, IntFormat) and spec.element.signed


def _narrow_scale(spec: QuantSpec) -> bool:
  """Whether the one scale of a group is a float16 number."""
  return isinstance(spec.scale_format, FloatFormat) and spec.scale_format.bits == 16


def _scales(xp, p: PackedTensor) -> tuple[Array, Array | None, Array | None]:
  scale = xp.float32(p.scale) if _narrow_scale(p.spec) else p.scale
  if p.zero_point is None:
    return scale, p.tensor_scale, None
  zero_point = encoding.unpack_codes(p.zero_point, p.spec.element.bits, math.prod(scale.shape), _signed(p.spec))
  return scale, p.tensor_scale, xp.int32(zero_point).reshape(scale.shape)
