"""From frozen values back to words: attributes that JSON can hold, and short names for tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core import formats
from core.config.attributes import SCALE_FORMATS
from core.config.frozen import thaw
from core.formats import Format, IntFormat
from core.spec import NAMED, QuantSpec

if TYPE_CHECKING:
  from core.config.schema import QuantizerConfig


# Fields whose value stands in the attributes as it is, with the value that is left out.
_PLAIN = {
  "constant_amax": None,
  "effective_bits": None,
  "backend": None,
  "pass_through_bwd": True,
  "fake_quant": True,
  "trt_high_precision_dtype": "Float",
}


def to_attributes(config: QuantizerConfig) -> dict[str, Any]:
  """See `QuantizerConfig.to_attributes`."""
  attributes = spec_attributes(config.spec)
  if attributes.pop("pad", False) is False:
    attributes["pad"] = False
  attributes |= {key: getattr(config, key) for key, default in _PLAIN.items() if getattr(config, key) != default}
  if config.calibrator_options:
    attributes["calibrator"] = [config.calibrator, thaw(config.calibrator_options)]
  elif config.calibrator != "max":
    attributes["calibrator"] = config.calibrator
  if config.bias is not None:
    attributes["bias"] = config.bias.to_attribute()
  if config.rotate is not None:
    attributes["rotate"] = config.rotate.to_attribute()
  if config.backend_extra_args is not None:
    attributes["backend_extra_args"] = thaw(config.backend_extra_args)
  return attributes


def spec_attributes(spec: QuantSpec) -> dict[str, Any]:
  """Attributes of a QuantSpec; `spec_from_attributes` gives it back.

  Raises:
    ValueError: the element format has no name yet; the message says how to give it one.
  """
  attributes = _element_attributes(spec)
  named = "format" in attributes  # then whatever is left out would come from the named specification
  if spec.axis is not None:
    attributes["axis"] = spec.axis[0] if len(spec.axis) == 1 else list(spec.axis)
  if spec.blocks is not None:
    attributes["block_sizes"] = _block_attributes(spec, named)
  elif named and spec.axis is None:
    attributes["block_sizes"] = None
  if spec.dynamic and spec.blocks is None:
    attributes["type"] = "dynamic"
  if spec.is_mx and (named or spec.e8m0_rule != "rceil"):
    attributes["e8m0_rule"] = spec.e8m0_rule
  for key, default in (("rounding", "nearest"), ("bound", None), ("zero_point", False)):
    if named or getattr(spec, key) != default:
      attributes[key] = getattr(spec, key)
  if spec.pad:
    attributes["pad"] = True
  return attributes


def _element_attributes(spec: QuantSpec) -> dict[str, Any]:
  element = spec.element
  if isinstance(element, IntFormat) and element == formats.int_format(element.bits, element.signed, element.narrow_range):
    # Four bits under 8-bit scales would be read as NF4.
    attributes: dict[str, Any] = {"num_bits": element.bits}
    if element.bits == 4 and spec.scale_format == formats.UINT8:
      attributes["format"] = "int4"
    if not element.signed:
      attributes["unsigned"] = True
    if element.narrow_range and not spec.is_mx:
      attributes["narrow_range"] = True
    return attributes
  for pair, known in formats.FLOAT_FORMATS.items():
    if known == element:
      return {"num_bits": list(pair)}
  return {"format": _format_name(element)}


def _format_name(element: Format) -> str:
  for name, named in NAMED.items():
    if named.element == element:
      return name
  raise ValueError(
    f"element format {element.name!r} has no name in core.spec.NAMED, so attributes cannot express it; "
    f"add core.spec.NAMED[{element.name.lower()!r}] = QuantSpec(element)"
  )


def _block_attributes(spec: QuantSpec, named: bool) -> dict[str, Any]:
  sizes: dict[str, Any] = {str(axis): size for axis, size in spec.blocks or ()}
  sizes["type"] = "dynamic" if spec.dynamic else "static"
  for bits, scale_format in SCALE_FORMATS.items():
    if scale_format == spec.scale_format:
      sizes["scale_bits"] = list(bits) if isinstance(bits, tuple) else bits
  if named:
    sizes.setdefault("scale_bits", None)
  if spec.scale_block is not None:
    sizes["scale_block_sizes"] = {"-1": spec.scale_block}
  if named or spec.four_over_six:
    sizes["four_over_six"] = spec.four_over_six
  return sizes


def describe(spec: QuantSpec) -> str:
  """Short text: block format, granularity, what deviates from the ordinary ("NVFP4 block 16 dynamic", "E4M3 per token dynamic")."""
  words = [_name(spec), _granularity(spec)]
  if spec.dynamic and not spec.is_mx:
    words.append("dynamic")
  if spec.two_level and not spec.dynamic:
    words.append("static")
  if spec.scale_format == formats.UINT8:
    words.append("double")
  if spec.scale_format == formats.FLOAT16:
    words.append("fp16-scale")
  if spec.four_over_six:
    words.append("four-over-six")
  if spec.is_mx and spec.e8m0_rule != "rceil":
    words.append(spec.e8m0_rule)
  if spec.zero_point:
    words.append("zero-point")
  if spec.bound is not None:
    words.append(f"bound {spec.bound:g}")
  if spec.rounding != "nearest":
    words.append(spec.rounding)
  return " ".join(words)


def _name(spec: QuantSpec) -> str:
  element = spec.element
  if spec.is_mx:
    if isinstance(element, IntFormat):
      return f"MX{element.name}"
    # Two 6-bit and two 8-bit formats exist; the 4-bit one is alone.
    return f"MXFP{element.bits}" if element in (formats.E2M1, formats.E4M3) else f"MXFP{element.bits}-{element.name}"
  if spec.two_level:
    return "NVFP4" if element == formats.E2M1 else f"{element.name}+E4M3"
  narrow = isinstance(element, IntFormat) and element.narrow_range
  return f"{element.name} narrow" if narrow else element.name


def _granularity(spec: QuantSpec) -> str:
  if spec.axis is not None:
    return f"axis {','.join(map(str, spec.axis))}"
  if spec.blocks is None:
    return "per tensor"
  if spec.blocks == ((-1, None),):
    return "per token"
  # {-1: 64, -2: 32} reads as rows x columns.
  sizes = [("all" if size is None else str(size)) for _, size in sorted(spec.blocks, key=lambda pair: pair[0])]
  axes = sorted(axis for axis, _ in spec.blocks)
  plain = axes == list(range(-len(axes), 0))
  return f"block {'x'.join(sizes)}" + ("" if plain else f" of axis {','.join(map(str, axes))}")
