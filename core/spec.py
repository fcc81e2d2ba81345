"""QuantSpec: everything that decides the codes and scales of one tensor, as one frozen value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from core import formats
from core.formats import Format, IntFormat, ScaleFormat

E8M0_RULES = ("rceil", "floor", "ceil", "even")
ROUNDINGS = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """Element format, granularity, scale rule and rounding of one tensor.

  Axes are those of the tensor that is handed to the verbs (torch layout inside a quantizer: [out, in], OIHW). Granularity is `axis`
  (axes kept; one scale per index), or `blocks` (axis -> block size; None is the whole axis; unnamed axes keep one scale per index), or
  neither (one scale).

  Attributes:
    element: format of the codes.
    axis: kept axes, or None.
    blocks: ((axis, size or None), ...), or None.
    scale_format: None (float32 scale), E8M0 (power of two), E4M3 (two-level: block scale times a float32 tensor scale), UINT8
      (double quantization, with `scale_block`), FLOAT16 (one level).
    scale_block: number of neighbouring scales that share a second-level scale (double quantization only).
    dynamic: block amax is taken from each input. For a two-level scale, the tensor amax may still be given.
    e8m0_rule: "rceil" (nothing clips), "floor" (OCP v1.0), "ceil" or "even".
    four_over_six: two-level scales only: per block, map amax to 6 or to 4, whichever errs less.
    rounding: "nearest" (ties to even) or "stochastic" (needs a key).
    zero_point: asymmetric integers, x = scale * (code - zero_point).
    bound: level that amax maps to; None is the format's own (127 for INT8; compressed-tensors' dynamic INT8 wants 127.5).
    pad: allow a last block that is not full; padding never changes amax.
  """

  element: Format
  axis: tuple[int, ...] | None = None
  blocks: tuple[tuple[int, int | None], ...] | None = None
  scale_format: ScaleFormat | None = None
  scale_block: int | None = None
  dynamic: bool = False
  e8m0_rule: str = "rceil"
  four_over_six: bool = False
  rounding: str = "nearest"
  zero_point: bool = False
  bound: float | None = None
  pad: bool = False

  def __post_init__(self) -> None:
    if self.axis is not None and self.blocks is not None:
      raise ValueError(f"axis {self.axis} and block sizes {dict(self.blocks)} exclude each other; give one of them")
    for axis, size in self.blocks or ():
      if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"block size {size!r} on axis {axis} is not allowed; use a positive integer, or None for the whole axis")
    if self.e8m0_rule not in E8M0_RULES:
      raise ValueError(f"e8m0_rule {self.e8m0_rule!r} is unknown; allowed are {', '.join(E8M0_RULES)}")
    if self.rounding not in ROUNDINGS:
      raise ValueError(f"rounding {self.rounding!r} is unknown; allowed are {', '.join(ROUNDINGS)}")
    if self.zero_point and (not isinstance(self.element, IntFormat) or self.scale_format is not None):
      raise ValueError(f"zero_point=True needs an integer element format and a float32 scale; got {self.element.name}")
    if self.four_over_six and not (self.two_level and self.element == formats.E2M1):
      raise ValueError(f"four_over_six=True needs E2M1 elements with an E4M3 block scale; got {self.element.name}")
    if self.scale_block is not None and self.scale_format != formats.UINT8:
      raise ValueError(f"scale_block {self.scale_block} needs an 8-bit integer scale format (double quantization)")
    if self.scale_format is not None and self.blocks is None:
      raise ValueError(f"scale format {self.scale_format.name} needs block sizes, for example {{-1: 16}}; got none")

  @property
  def two_level(self) -> bool:
    """Whether an E4M3 block scale stands under a float32 tensor scale (NVFP4)."""
    return self.scale_format == formats.TRACED_E4M3

  @property
  def is_mx(self) -> bool:
    """Whether the scale is a bare power of two, so that no calibration is ever needed."""
    return self.scale_format == formats.TRACED_E8M0

  @property
  def allows_signed_scale(self) -> bool:
    """Whether a negative amax means a negative scale, which turns the one code more that two's complement has to the positive side.

    True of signed integers of full range under a plain float32 or float16 scale. Elsewhere a negative amax counts as zero.
    """
    element, scale = self.element, self.scale_format
    asymmetric_codes = isinstance(element, IntFormat) and element.signed and not element.narrow_range
    return asymmetric_codes and not self.zero_point and (scale is None or scale == formats.TRACED_FLOAT16)

  @property
  def element_bound(self) -> float:
    return self.element.bound if self.bound is None else self.bound

  def replace(self, **changes: Any) -> QuantSpec:
    """A copy with these fields changed."""
    return dataclasses.replace(self, **changes)

  @classmethod
  def named(cls, name: str, **overrides: Any) -> QuantSpec:
    """The specification of that name (see `core.spec.NAMED`), with fields overridden.

    Raises:
      ValueError: unknown name; the message lists the known ones.
    """
    if name not in NAMED:
      raise ValueError(f"unknown format name {name!r}; known are {', '.join(NAMED)}")
    return NAMED[name].replace(**overrides) if overrides else NAMED[name]

  @classmethod
  def from_attributes(cls, attributes: Mapping[str, Any]) -> QuantSpec:
    """The specification that these quantizer attributes describe (ModelOpt's names; see `core.config.schema`)."""
    from core.config import schema

    return schema.spec_from_attributes(attributes)


def _mx(element: Format, size: int = 32) -> QuantSpec:
  return QuantSpec(element, blocks=((-1, size),), scale_format=formats.E8M0, dynamic=True)


_NVFP4 = QuantSpec(formats.E2M1, blocks=((-1, 16),), scale_format=formats.E4M3, dynamic=True)

NAMED: dict[str, QuantSpec] = {
  "int8": QuantSpec(formats.INT8),
  "int4": QuantSpec(formats.INT4, blocks=((-1, 128),)),
  "fp8_e4m3": QuantSpec(formats.E4M3),
  "fp8_e5m2": QuantSpec(formats.E5M2),
  "mxfp8_e4m3": _mx(formats.E4M3),
  "mxfp8_e5m2": _mx(formats.E5M2),
  "mxfp6_e2m3": _mx(formats.E2M3),
  "mxfp6_e3m2": _mx(formats.E3M2),
  "mxfp4": _mx(formats.E2M1),
  "mxint8": _mx(formats.int_format(8, narrow_range=True)),
  "nvfp4": _NVFP4,
  "nvfp4_four_over_six": _NVFP4.replace(four_over_six=True),
  "nf4": QuantSpec(formats.NF4, blocks=((-1, 64),)),
  "nf4_double": QuantSpec(formats.NF4, blocks=((-1, 64),), scale_format=formats.UINT8, scale_block=256),
}
