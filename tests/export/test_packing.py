"""Packing against its inverse, and against the packages whose layouts it writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.export import packing

RNG = np.random.default_rng(0)


def codes(bits: int, shape: tuple[int, int]) -> np.ndarray:
  return RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 32, 64, 100])
def test_words(bits: int, columns: int) -> None:
  from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

  values = codes(bits, (5, columns))
  packed = packing.pack_words(values, bits)
  assert packed.dtype == np.int32 and np.array_equal(packed, pack_to_int32(torch.from_numpy(values), bits).numpy())
  assert np.array_equal(packing.unpack_words(packed, bits, columns), values)
  with pytest.raises(ValueError, match="do not hold"):
    packing.unpack_words(packed, bits, columns + 33)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [3, 16])
def test_zero_points(bits: int, rows: int) -> None:
  from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

  values = codes(bits, (rows, 6))
  packed = packing.pack_zero_points(values.astype(np.int32), bits)
  assert np.array_equal(packed, pack_to_int32(torch.from_numpy(values), bits, packed_dim=0).numpy())
  assert np.array_equal(packing.unpack_zero_points(packed, bits, rows), values)


def test_rows() -> None:
  values = codes(4, (6, 5))
  packed = packing.pack_rows(values)
  assert packed.shape == (3, 5) and packed.dtype == np.uint8 and packed[1, 2] == (int(values[2, 2]) & 15) + 16 * (int(values[3, 2]) & 15)
  assert np.array_equal(packing.unpack_rows(packed), values)
