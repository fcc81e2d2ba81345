"""Reading of single quantizer attributes: number formats, axes, block sizes, scales. Every function names the key and value it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from core import formats
from core.config.frozen import as_int, check_bool, check_choice, check_keys, hint
from core.formats import CodebookFormat, Format, IntFormat, ScaleFormat
from core.spec import E8M0_RULES, NAMED, QuantSpec

BLOCK_KEYS = ("type", "scale_bits", "scale_block_sizes", "four_over_six", "e8m0_rule")
TYPES = ("static", "dynamic")
SCALE_FORMATS: dict[Any, ScaleFormat] = {
  (8, 0): formats.E8M0,
  (4, 3): formats.E4M3,
  8: formats.UINT8,
  (5, 10): formats.FLOAT16,
}
DOUBLE_QUANTIZATION_BLOCK = 256  # QLoRA's choice: Dettmers et al., 2023, arXiv:2305.14314, section 3


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What `block_sizes` says, read: sizes by axis, and how the scales themselves are stored."""

  sizes: tuple[tuple[int, int | None], ...]
  dynamic: bool | None
  scale_format: ScaleFormat | None
  scale_block: int | None
  four_over_six: bool
  e8m0_rule: str | None


def read_num_bits(value: Any) -> int | tuple[int, int]:
  """An integer width or (exponent bits, mantissa bits), from 8, (4, 3), [4, 3], "e4m3", "int8" or "8".

  Raises:
    ValueError: anything else, or a width or float format that does not exist.
  """
  bits = _spelled_bits(value) if isinstance(value, str) else value
  if isinstance(bits, list | tuple) and len(bits) == 2 and all(as_int(part) is not None for part in bits):
    pair = (int(bits[0]), int(bits[1]))
    if pair in formats.FLOAT_FORMATS:
      return pair
  elif (width := as_int(bits)) is not None and 2 <= width <= 8:
    return width
  floats = ", ".join(f"{pair} ({fmt.name})" for pair, fmt in formats.FLOAT_FORMATS.items())
  raise ValueError(f"num_bits is {value!r}; allowed are the integers 2 to 8 and (exponent bits, mantissa bits) {floats}")


def _spelled_bits(text: str) -> int | tuple[int, int] | None:
  match = re.fullmatch(r"e(\d)m(\d)", text.strip().lower())
  if match:
    return int(match[1]), int(match[2])
  match = re.fullmatch(r"(?:int)?(\d)", text.strip().lower())
  return int(match[1]) if match else None


def read_format(value: Any) -> QuantSpec:
  """The named specification behind attribute `format`, whatever its case."""
  name = value.lower() if isinstance(value, str) else value
  known = {key.lower(): key for key in NAMED}
  if name not in known:
    raise ValueError(f"format is {value!r}, which is unknown{hint(name, known)}; allowed are {', '.join(NAMED)}")
  return NAMED[known[name]]


def read_axes(key: str, value: Any) -> tuple[int, ...] | None:
  """`axis` as a tuple: None, an integer, or a list of different integers (strings such as "-1" are read as integers)."""
  if value is None:
    return None
  parts = value if isinstance(value, list | tuple) else [value]
  axes = [as_int(part) for part in parts]
  if not axes or None in axes or len(set(axes)) != len(axes):
    raise ValueError(f"{key} is {value!r}; allowed are None, an integer, or a list of different integers such as 0 or [0, 1]")
  return tuple(axis for axis in axes if axis is not None)


def read_block_sizes(value: Any) -> Blocks | None:
  """`block_sizes`: {axis: size or None, ..., "type", "scale_bits", "scale_block_sizes", "four_over_six", "e8m0_rule"}.

  Raises:
    ValueError: unknown key, impossible size, scale format or combination.
  """
  if value is None:
    return None
  if not isinstance(value, Mapping):
    raise ValueError(f"block_sizes is {value!r}; a mapping such as {{-1: 128}} is needed")
  sizes: dict[int, int | None] = {}
  options: dict[str, Any] = {}
  for key, item in value.items():
    axis = as_int(key)
    if axis is None:
      options[key] = item
    elif axis in sizes:
      raise ValueError(f"block_sizes {value!r} gives axis {axis} twice")
    else:
      sizes[axis] = _read_size(axis, item)
  check_keys("block_sizes", options, BLOCK_KEYS)
  if not sizes:
    raise ValueError(f"block_sizes {dict(value)!r} names no axis; give at least one, such as {{-1: 128}}")
  scale_format = _read_scale_bits(options.get("scale_bits"))
  return Blocks(
    sizes=tuple(sizes.items()),
    dynamic=None if options.get("type") is None else check_choice("block_sizes['type']", options["type"], TYPES) == "dynamic",
    scale_format=scale_format,
    scale_block=_read_scale_block(options.get("scale_block_sizes"), scale_format),
    four_over_six=check_bool("block_sizes['four_over_six']", options.get("four_over_six") or False),
    e8m0_rule=None if options.get("e8m0_rule") is None else check_choice("block_sizes['e8m0_rule']", options["e8m0_rule"], E8M0_RULES),
  )


def _read_size(axis: int, value: Any) -> int | None:
  size = None if value is None else as_int(value)
  if value is not None and (size is None or size < 1):
    raise ValueError(f"block_sizes[{axis}] is {value!r}; allowed are a positive integer, or None for the whole axis")
  return size


def _read_scale_bits(value: Any) -> ScaleFormat | None:
  if value is None:
    return None
  if isinstance(value, str):
    match = re.fullmatch(r"e(\d+)m(\d+)", value.strip().lower())
    key: Any = (int(match[1]), int(match[2])) if match else as_int(value)
  else:
    key = tuple(value) if isinstance(value, list | tuple) else value
  if isinstance(key, bool) or not isinstance(key, int | tuple) or key not in SCALE_FORMATS:
    known = ", ".join(f"{bits} ({fmt.name})" for bits, fmt in SCALE_FORMATS.items())
    raise ValueError(f"block_sizes['scale_bits'] is {value!r}; allowed are {known}, or none for float32 scales")
  return SCALE_FORMATS[key]


def _read_scale_block(value: Any, scale_format: ScaleFormat | None) -> int | None:
  if scale_format != formats.UINT8:
    if value is not None:
      raise ValueError(f"block_sizes['scale_block_sizes'] is {value!r}, which needs 'scale_bits': 8 (double quantization)")
    return None
  if isinstance(value, Mapping):
    if [as_int(key) for key in value] != [-1]:
      raise ValueError(f"block_sizes['scale_block_sizes'] is {dict(value)!r}; allowed is one size for axis -1, such as {{-1: 256}}")
    value = next(iter(value.values()))
  size = DOUBLE_QUANTIZATION_BLOCK if value is None else as_int(value)
  if size is None or size < 1:
    raise ValueError(f"block_sizes['scale_block_sizes'] is {value!r}; allowed is a positive integer, such as {{-1: 256}}")
  return size


def read_element(attributes: Mapping[str, Any], default: QuantSpec | None, blocks: Blocks | None) -> Format:
  """The element format that `num_bits`, `format`, `unsigned`, `narrow_range` and the scale format together describe.

  Four bits with 8-bit scales are NF4, as in ModelOpt (there the combination means QLoRA's format; its fake quantization nevertheless
  computes plain INT4, which is not repeated here). `format: "int4"` asks for integers under 8-bit scales.
  """
  scale_format = blocks.scale_format if blocks is not None else default.scale_format if default is not None else None
  if default is not None:
    element = default.element
    _check_same_width(attributes, element)
  else:
    bits = read_num_bits(attributes.get("num_bits", 8))
    if bits == 4 and scale_format == formats.UINT8:
      element = formats.NF4
    else:
      element = formats.FLOAT_FORMATS[bits] if isinstance(bits, tuple) else formats.int_format(bits)
  flags = {key: check_bool(key, attributes[key]) for key in ("unsigned", "narrow_range") if key in attributes}
  if not isinstance(element, IntFormat):
    for key, value in flags.items():
      if value:
        raise ValueError(f"{key} is True, which needs an integer format; the element format is {element.name}")
    return element
  signed = not flags.get("unsigned", not element.signed)
  # OCP MX v1.0, 5.3.4: MXINT8 drops -128, so that the codes are symmetric under the power-of-two scale.
  narrow = flags.get("narrow_range", element.narrow_range) or (scale_format == formats.E8M0 and signed)
  if narrow and not signed:
    raise ValueError("narrow_range is True together with unsigned True; an unsigned format has no most negative code to drop")
  return formats.int_format(element.bits, signed, narrow)


def _check_same_width(attributes: Mapping[str, Any], element: Format) -> None:
  if "num_bits" not in attributes:
    return
  bits = read_num_bits(attributes["num_bits"])
  fields = None if isinstance(element, IntFormat | CodebookFormat) else (element.exponent_bits, element.mantissa_bits)
  if bits not in (element.bits, fields):
    raise ValueError(
      f"num_bits {attributes['num_bits']!r} contradicts format {attributes['format']!r} ({element.bits} bits); leave num_bits out"
    )


def read_bound(value: Any, element: Format) -> float | None:
  """`bound`: the level that amax maps to, None for the format's own; "127.5" is read as a number."""
  if value is None:
    return None
  try:
    bound = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    bound = math.nan
  if not 0 < bound <= 2 * element.bound:
    raise ValueError(f"bound is {value!r}; allowed is a number above 0 and at most {2 * element.bound:g} for {element.name}")
  return None if bound == element.bound else bound
