"""How layouts put codes side by side. All bit fiddling on exported codes is here; both directions."""

from __future__ import annotations

import numpy as np

from core.encoding import pack_codes, unpack_codes


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
  """compressed-tensors' `weight_packed`: codes plus 2^(bits-1), `bits` each, lowest first, in little-endian int32 along the last axis.

  Args:
    codes: [..., K] int8, signed codes of `bits` bits.
    bits: 2, 4 or 8.

  Returns:
    [..., ceil(K * bits / 32)] int32.
  """
  packed = pack_codes(codes.astype(np.int32) + (1 << (bits - 1)), bits)
  missing = -packed.shape[-1] % 4
  padded = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, missing)]) if missing else packed
  return np.ascontiguousarray(padded).view("<i4").astype(np.int32)


def unpack_words(words: np.ndarray, bits: int, length: int) -> np.ndarray:
  """The inverse of `pack_words`: [..., length] int8.

  Raises:
    ValueError: another number of words than `length` codes take.
  """
  if words.shape[-1] != -(-length * bits // 32):
    raise ValueError(f"{words.shape[-1]} words of 32 bits do not hold {length} codes of {bits} bits")
  codes = unpack_codes(np.ascontiguousarray(words, "<i4").view(np.uint8), bits, length)
  return (codes.astype(np.int32) - (1 << (bits - 1))).astype(np.int8)


def pack_zero_points(points: np.ndarray, bits: int) -> np.ndarray:
  """compressed-tensors' packed zero points: as `pack_words`, along the first axis. [N, G] -> [ceil(N * bits / 32), G] int32."""
  return np.ascontiguousarray(pack_words(np.ascontiguousarray(points.astype(np.int8).T), bits).T)


def unpack_zero_points(words: np.ndarray, bits: int, length: int) -> np.ndarray:
  """The inverse of `pack_zero_points`: [length, G] int32."""
  return np.ascontiguousarray(unpack_words(np.ascontiguousarray(words.T), bits, length).T).astype(np.int32)


def pack_rows(codes: np.ndarray) -> np.ndarray:
  """ModelOpt's INT4: two rows in one, low nibble row 2i, two's complement. [N, K] int8 -> [N/2, K] uint8."""
  nibbles = codes.astype(np.uint8) & 0xF
  return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_rows(packed: np.ndarray) -> np.ndarray:
  """The inverse of `pack_rows`: [N/2, K] uint8 -> [N, K] int8."""
  nibbles = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(2 * packed.shape[0], *packed.shape[1:])
  return ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)
