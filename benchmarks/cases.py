"""The formats that are timed, and what each is measured against."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import core
from core import QuantSpec, formats

SCALES, AMAX, NOTHING = "scales", "amax", "nothing"


@dataclasses.dataclass(frozen=True)
class Case:
  """One row of the tables.

  Attributes:
    key: short name, for `--formats`.
    title: what it is.
    spec: specification.
    kept: what calibration has left behind, as a quantizer keeps it: "scales" (amax and the scales made from it), "amax" (the tensor amax of
      a dynamic two-level format) or "nothing" (everything is taken from each input).
    target: largest allowed ratio to a copy when compiled, or None.
  """

  key: str
  title: str
  spec: QuantSpec
  kept: str = NOTHING
  target: float | None = None

  def state(self, x: np.ndarray) -> tuple[Any, ...]:
    """What is kept of a calibration on x, in numpy: (Scales,), (amax,) or ()."""
    if self.kept == NOTHING:
      return ()
    amax = core.amax(x, self.spec)
    return (core.scales(np.asarray(amax), self.spec),) if self.kept == SCALES else (np.asarray(amax),)

  def function(self, x: Any, *state: Any) -> Any:
    """What is timed."""
    if self.kept == SCALES:
      return core.fake_quantize(x, self.spec, scales=state[0])
    return core.fake_quantize(x, self.spec, *state)


_TOKEN = ((-1, None),)
_TILE = ((-2, 16), (-1, 16))

CASES = (
  Case("int8", "INT8 per tensor, calibrated", QuantSpec.named("int8"), SCALES, 1.3),
  Case("int8_channel", "INT8 per channel, calibrated", QuantSpec.named("int8", axis=(0,)), SCALES, 1.3),
  Case("int8_channel_dynamic", "INT8 per channel, dynamic", QuantSpec.named("int8", axis=(0,)), NOTHING, 1.9),
  Case("fp8", "FP8 E4M3 per tensor, calibrated", QuantSpec.named("fp8_e4m3"), SCALES, 1.6),
  Case("fp8_token", "FP8 E4M3 per token", QuantSpec.named("fp8_e4m3", blocks=_TOKEN, dynamic=True), NOTHING, 2.3),
  Case("int4_block", "INT4 block 128", QuantSpec.named("int4"), NOTHING, 2.3),
  Case("mxfp8", "MXFP8 E4M3", QuantSpec.named("mxfp8_e4m3"), NOTHING, 2.6),
  Case("mxfp4", "MXFP4", QuantSpec.named("mxfp4"), NOTHING, 2.6),
  Case("nvfp4", "NVFP4, calibrated tensor amax", QuantSpec.named("nvfp4"), AMAX, 3.5),
  Case("int4_block_kept", "INT4 block 128, calibrated", QuantSpec.named("int4"), SCALES),
  Case("int8_zero_point", "INT8 zero point, dynamic", QuantSpec(formats.INT8, axis=(0,), zero_point=True)),
  Case("fp8_e5m2", "FP8 E5M2 per tensor, calibrated", QuantSpec.named("fp8_e5m2"), SCALES),
  Case("fp8_tile", "FP8 E4M3 128x128 tiles", QuantSpec.named("fp8_e4m3", blocks=((-2, 128), (-1, 128)))),
  Case("mxint8", "MXINT8", QuantSpec.named("mxint8")),
  Case("mxfp6", "MXFP6 E2M3", QuantSpec.named("mxfp6_e2m3")),
  Case("nvfp4_tile", "NVFP4 16x16, static", QuantSpec.named("nvfp4", blocks=_TILE, dynamic=False), SCALES),
  Case("nvfp4_four_over_six", "NVFP4 four-over-six", QuantSpec.named("nvfp4_four_over_six")),
  Case("nf4", "NF4 block 64", QuantSpec.named("nf4")),
)


def select(keys: str) -> tuple[Case, ...]:
  """Cases by their keys: comma-separated, "targets" (those with a target) or "all".

  Raises:
    ValueError: an unknown key.
  """
  if keys == "all":
    return CASES
  if keys == "targets":
    return tuple(case for case in CASES if case.target is not None)
  known = {case.key: case for case in CASES}
  wanted = [key for key in keys.split(",") if key]
  unknown = [key for key in wanted if key not in known]
  if unknown or not wanted:
    raise ValueError(f"unknown format {', '.join(unknown) or '(none)'}; allowed are all, targets, {', '.join(known)}")
  return tuple(known[key] for key in wanted)
