"""Specifications and inputs shared by the parity tests."""

from __future__ import annotations

import numpy as np

from core import QuantSpec, formats

_INT4_TWO_LEVEL = QuantSpec(formats.INT4, blocks=((-1, 32),), scale_format=formats.E4M3)

SPECS = {
  "int8": QuantSpec.named("int8"),
  "int8 axis 0": QuantSpec(formats.INT8, axis=(0,)),
  "int4 block 128": QuantSpec.named("int4"),
  "int8 zero point": QuantSpec(formats.INT8, axis=(0,), zero_point=True),
  "e4m3 token": QuantSpec(formats.E4M3, blocks=((-1, None),), dynamic=True),
  "e5m2": QuantSpec.named("fp8_e5m2"),
  "e4m3 tiles": QuantSpec(formats.E4M3, blocks=((-2, 16), (-1, 16))),
  "mxfp8": QuantSpec.named("mxfp8_e4m3"),
  "mxfp6 even": QuantSpec.named("mxfp6_e2m3", e8m0_rule="even"),
  "mxfp4": QuantSpec.named("mxfp4"),
  "mxfp4 floor, ragged": QuantSpec.named("mxfp4", e8m0_rule="floor", blocks=((-1, 24),), pad=True),
  "mxint8": QuantSpec.named("mxint8"),
  "nvfp4": QuantSpec.named("nvfp4"),
  "nvfp4 tiles": QuantSpec.named("nvfp4", blocks=((-2, 16), (-1, 16)), dynamic=False),
  "nvfp4 four over six": QuantSpec.named("nvfp4_four_over_six"),
  "int4 two-level": _INT4_TWO_LEVEL,
  "nf4 double": QuantSpec.named("nf4_double", blocks=((-1, 16),), scale_block=4),
  "nvfp4 stochastic": QuantSpec.named("nvfp4", rounding="stochastic"),
}
KEY = (-7, 123456789)
SHAPE = (48, 128)


def stress(seed: int = 0) -> np.ndarray:
  """[48, 128] float32: random bit patterns, rows times 2^k, ties, subnormals, zero rows, one NaN, rows of 1e-30 and 1e30."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=SHAPE).astype(np.float32)
  patterns = rng.integers(0, 2**32, (8, SHAPE[1]), dtype=np.uint64).astype(np.uint32).view(np.float32)
  x[:8] = np.where(np.isfinite(patterns), patterns, np.float32(0))
  x[8:20] *= (2.0 ** rng.integers(-110, 110, (12, 1))).astype(np.float32)
  x[20:24] = np.round(x[20:24] * 8) / 4  # many exact ties
  x[24] = rng.integers(1, 2**23, SHAPE[1]).astype(np.uint32).view(np.float32)
  x[25] = 0.0
  x[26, ::2] = -0.0
  x[26, 1::2] = 0.0
  x[27, 5] = np.nan
  x[28] *= np.float32(1e-30)
  x[29] *= np.float32(1e30)
  x[30, 7] = 1e4
  x[31, ::3] = np.float32(1e-40)
  return x


def plain(seed: int = 1) -> np.ndarray:
  """[48, 128] float32 of one magnitude, so that specifications with one scale for all of it do not round everything to zero."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=SHAPE).astype(np.float32)
  x[:4] = np.round(x[:4] * 8) / 4
  x[0, 0], x[1] = 6.0, 0.0
  return x
