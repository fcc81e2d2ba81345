"""Code <-> level, and packing of codes into bytes. See SPEC.md, "Codes" and "Packing"."""

from __future__ import annotations

import functools

import numpy as np

from core import bits, rounding
from core.arrays import Array, namespace
from core.formats import CodebookFormat, FloatFormat, Format, IntFormat


def encode(level: Array, fmt: Format) -> Array:
  """Codes of levels that lie on the format's grid.

  Args:
    level: [...] float32, levels of `fmt` (what `rounding.to_level` returns). NaN gets the format's NaN code, or 0 where it has none.
    fmt: element format.

  Returns:
    [...] int8 for signed integers, uint8 for everything else (int32 for formats of more than 8 bits).
  """
  xp = namespace(level)
  if isinstance(fmt, IntFormat):
    codes = xp.int32(xp.where(rounding.is_nan(level), 0.0, level))
    return xp.int8(codes) if fmt.signed else xp.uint8(codes)
  if isinstance(fmt, CodebookFormat):
    codes = rounding.codebook_index(level, fmt)
    return xp.uint8(xp.where(rounding.is_nan(level), 0, codes))
  return _encode_float(xp, level, fmt)


def _encode_float(xp, level: Array, fmt: FloatFormat) -> Array:
  assert fmt.bias is not None
  raw = xp.bits(level)
  magnitude = raw & bits.MAGNITUDE
  normal = (magnitude >> (23 - fmt.mantissa_bits)) - ((127 - fmt.bias) << fmt.mantissa_bits)
  small = magnitude < bits.power_of_two_bits(fmt.min_exponent)
  subnormal = xp.int32(xp.where(small, xp.abs(level), 0.0) * 2.0 ** (fmt.mantissa_bits - fmt.min_exponent))
  codes = xp.where(small, subnormal, normal)
  if fmt.signed:
    codes = codes | (((raw >> 31) & 1) << (fmt.bits - 1))
  codes = xp.where(magnitude > bits.INFINITY, fmt.nan_code or 0, codes)
  return xp.uint8(codes) if fmt.bits <= 8 else codes


def decode(codes: Array, fmt: Format) -> Array:
  """Levels of codes, exactly.

  Args:
    codes: [...] integers.
    fmt: element format.

  Returns:
    [...] float32; NaN and infinity where the code stores them.
  """
  xp = namespace(codes)
  codes = xp.int32(codes)
  if isinstance(fmt, IntFormat):
    return xp.float32(codes)
  if isinstance(fmt, CodebookFormat):
    return xp.take(xp.constant(fmt.levels, codes), codes)
  assert isinstance(fmt, FloatFormat) and fmt.bias is not None
  magnitude = codes & ((1 << (fmt.bits - int(fmt.signed))) - 1)
  normal = xp.from_bits((magnitude + ((127 - fmt.bias) << fmt.mantissa_bits)) << (23 - fmt.mantissa_bits))
  small = magnitude < (1 << fmt.mantissa_bits)
  level = xp.where(small, xp.float32(magnitude) * 2.0 ** (fmt.min_exponent - fmt.mantissa_bits), normal)
  level = xp.where(magnitude > fmt.max_code, float("nan"), level)
  if fmt.inf_code is not None:
    level = xp.where(magnitude == fmt.inf_code, float("inf"), level)
  return xp.where(codes != magnitude, -level, level) if fmt.signed else level


def pack_codes(codes: Array, width: int) -> Array:
  """Codes of `width` bits in bytes along the last axis, lowest bits first (4 bits: low nibble first), zero padded to a full byte.

  Args:
    codes: [..., K] integers; negative ones are taken modulo 2^width (two's complement).
    width: 1 to 8.

  Returns:
    [..., ceil(K * width / 8)] uint8.
  """
  xp = namespace(codes)
  _check_width(width)
  codes = xp.int32(codes) & ((1 << width) - 1)
  if width == 8:
    return xp.uint8(codes)
  per_group, bytes_per_group = _group(width)
  length = codes.shape[-1]
  codes = _pad_last(xp, codes, per_group)
  groups = codes.reshape((*codes.shape[:-1], codes.shape[-1] // per_group, per_group))
  out = []
  for byte in range(bytes_per_group):
    value: Array = None
    for j in range(per_group):
      shift = j * width - byte * 8
      if -width < shift < 8:
        part = groups[..., j] << shift if shift >= 0 else groups[..., j] >> -shift
        value = part if value is None else value | part
    out.append(value & 0xFF)
  packed = xp.stack(out, -1)
  packed = packed.reshape((*codes.shape[:-1], packed.shape[-2] * bytes_per_group))
  return xp.uint8(packed[..., : -(-length * width // 8)])


def unpack_codes(packed: Array, width: int, length: int, signed: bool = False) -> Array:
  """The inverse of `pack_codes`.

  Args:
    packed: [..., P] uint8.
    width: 1 to 8.
    length: K, the number of codes along the last axis.
    signed: two's complement codes.

  Returns:
    [..., K] int8 if signed, else uint8.

  Raises:
    ValueError: `length` codes do not fit the packed bytes.
  """
  xp = namespace(packed)
  _check_width(width)
  if packed.shape[-1] * 8 < length * width:
    raise ValueError(f"{packed.shape[-1]} packed bytes hold {packed.shape[-1] * 8 // width} codes of {width} bits; {length} were asked for")
  if width == 8:
    return xp.int8_view(packed[..., :length]) if signed else packed[..., :length]
  data = xp.int32(packed)
  per_group, bytes_per_group = _group(width)
  data = _pad_last(xp, data, bytes_per_group)
  groups = data.reshape((*data.shape[:-1], data.shape[-1] // bytes_per_group, bytes_per_group))
  out = []
  for j in range(per_group):
    byte, offset = divmod(j * width, 8)
    value = groups[..., byte] >> offset
    if offset + width > 8:
      value = value | (groups[..., byte + 1] << (8 - offset))
    out.append(value & ((1 << width) - 1))
  data = xp.stack(out, -1)
  data = data.reshape((*packed.shape[:-1], data.shape[-2] * per_group))
  data = data[..., :length]
  if not signed:
    return xp.uint8(data)
  sign = 1 << (width - 1)
  return xp.int8((data ^ sign) - sign)


def decode_packed(packed: Array, fmt: Format, length: int) -> Array:
  """Levels of packed codes: `decode(unpack_codes(packed, ...))`, bit for bit.

  Args:
    packed: [..., P] uint8.
    fmt: element format of at most 8 bits.
    length: K, the number of codes along the last axis.

  Returns:
    [..., K] float32.
  """
  xp = namespace(packed)
  if not xp.likes_tables(packed):
    return decode(unpack_codes(packed, fmt.bits, length, isinstance(fmt, IntFormat) and fmt.signed), fmt)
  if isinstance(fmt, IntFormat) and fmt.bits == 8:
    return xp.float32(unpack_codes(packed, 8, length, fmt.signed))
  if 8 % fmt.bits:
    return xp.take_rows(_table(fmt, 1), unpack_codes(packed, fmt.bits, length))[..., 0]
  per_byte = 8 // fmt.bits
  levels = xp.take_rows(_table(fmt, per_byte), packed)
  return levels.reshape((*packed.shape[:-1], packed.shape[-1] * per_byte))[..., :length]


@functools.cache
def _table(fmt: Format, count: int) -> np.ndarray:
  """[2^(bits * count), count] float32: the levels of the codes in every byte that holds that many."""
  signed = isinstance(fmt, IntFormat) and fmt.signed
  every = np.arange(2 ** (fmt.bits * count), dtype=np.uint8)[:, None]
  return decode(unpack_codes(every, fmt.bits, count, signed), fmt)


def _group(width: int) -> tuple[int, int]:
  """The least number of codes that fill whole bytes, and that number of bytes."""
  per_group = next(n for n in (1, 2, 4, 8) if n * width % 8 == 0)
  return per_group, per_group * width // 8


def _pad_last(xp, x: Array, multiple: int) -> Array:
  missing = -x.shape[-1] % multiple
  return xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _check_width(width: int) -> None:
  if not 1 <= width <= 8:
    raise ValueError(f"packing width {width} is not allowed; use 1 to 8 bits")
