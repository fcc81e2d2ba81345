"""Quantizer attributes (ModelOpt's names and ours) to frozen values and back.

A configuration is written as dicts; past this file nothing reads a dict. `QuantizerConfig` is what one quantizer needs to know: a
`QuantSpec` for the arithmetic, and the few things around it (calibrator, bias, rotation, gradient).

Attributes beyond ModelOpt's: `format` (a name of `core.spec.NAMED`: "nf4", "mxfp4", ...; its granularity holds unless `axis` or
`block_sizes` is given), `e8m0_rule` (also inside block_sizes), `rounding`, `zero_point`, `bound`, `pad`. Static E5M2 and FP6 are allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from core import formats
from core.config import attributes as read
from core.config.frozen import FrozenDict, check_bool, check_choice, check_keys
from core.config.options import HISTOGRAM_METHODS, BiasSpec, RotateSpec, read_calibrator
from core.formats import CodebookFormat, IntFormat
from core.spec import E8M0_RULES, ROUNDINGS, QuantSpec

# Spelled out in ModelOpt's order, then ours.
ATTRIBUTES = (
  "enable", "num_bits", "effective_bits", "axis", "fake_quant", "unsigned", "narrow_range", "learn_amax", "type", "block_sizes", "bias",
  "trt_high_precision_dtype", "calibrator", "rotate", "pass_through_bwd", "backend", "backend_extra_args", "use_constant_amax",
  "constant_amax", "format", "e8m0_rule", "rounding", "zero_point", "bound", "pad",
)  # fmt: skip
HIGH_PRECISION_DTYPES = ("Float", "Half", "BFloat16")
CONSTANT_AMAX = 448.0  # `use_constant_amax`: the E4M3 range, so that the scale of a key/value cache is 1


def spec_from_attributes(attributes: Mapping[str, Any]) -> QuantSpec:
  """The QuantSpec that a set of attributes describes; `pad` is False unless it is given.

  Raises:
    ValueError: unknown attribute, value that is not allowed, or a combination that cannot be.
    TypeError: `attributes` is not a mapping.
  """
  _check_mapping(attributes)
  default = read.read_format(attributes["format"]) if attributes.get("format") is not None else None
  fallback = default or QuantSpec(formats.INT8)
  axis = read.read_axes("axis", attributes.get("axis"))
  blocks = read.read_block_sizes(attributes.get("block_sizes"))
  if axis is not None and blocks is not None:
    raise ValueError(f"axis {attributes['axis']!r} and block_sizes {attributes['block_sizes']!r} exclude each other; give one of them")
  if default is not None and (axis is not None or ("block_sizes" in attributes and blocks is None)):
    default = default.replace(blocks=None, scale_format=None, scale_block=None, dynamic=False, four_over_six=False)
    fallback = default
  elif default is not None and blocks is not None:
    blocks = _inherit(blocks, default, attributes["block_sizes"])
  elif default is not None and default.blocks is not None:
    blocks = read.Blocks(default.blocks, default.dynamic, default.scale_format, default.scale_block, default.four_over_six, None)
  element = read.read_element(attributes, default, blocks)
  return QuantSpec(
    element=element,
    axis=axis,
    blocks=blocks.sizes if blocks is not None else None,
    scale_format=blocks.scale_format if blocks is not None else None,
    scale_block=blocks.scale_block if blocks is not None else None,
    dynamic=_is_dynamic(attributes, blocks),
    e8m0_rule=_e8m0_rule(attributes, blocks, default),
    four_over_six=blocks is not None and blocks.four_over_six,
    rounding=check_choice("rounding", attributes.get("rounding", fallback.rounding), ROUNDINGS),
    zero_point=_zero_point(attributes, element, fallback.zero_point),
    bound=read.read_bound(attributes.get("bound", fallback.bound), element),
    pad=check_bool("pad", attributes.get("pad", False)),
  )


def _check_mapping(attributes: Any) -> None:
  if not isinstance(attributes, Mapping):
    raise TypeError(f"quantizer attributes are {attributes!r}; a mapping such as {{'num_bits': 8, 'axis': 0}} is needed")
  check_keys("quantizer attributes", attributes, ATTRIBUTES)


def _inherit(blocks: read.Blocks, default: QuantSpec, given: Mapping[str, Any]) -> read.Blocks:
  """Block sizes given beside a `format`: what they leave open comes from the format."""
  changes: dict[str, Any] = {}
  if "scale_bits" not in given:
    changes |= {"scale_format": default.scale_format, "scale_block": default.scale_block}
  if "type" not in given:
    changes["dynamic"] = default.dynamic
  if "four_over_six" not in given:
    changes["four_over_six"] = default.four_over_six
  return dataclasses.replace(blocks, **changes)


def _is_dynamic(attributes: Mapping[str, Any], blocks: read.Blocks | None) -> bool:
  kind = check_choice("type", attributes.get("type", "static"), read.TYPES)
  in_blocks = blocks.dynamic if blocks is not None else None
  if "type" in attributes and in_blocks is not None and in_blocks != (kind == "dynamic"):
    inner = "dynamic" if in_blocks else "static"
    raise ValueError(f"type {kind!r} contradicts block_sizes['type'] {inner!r}; leave one of them out")
  if blocks is not None and blocks.scale_format == formats.E8M0:
    if in_blocks is False or ("type" in attributes and kind == "static"):
      raise ValueError("type 'static' with scale_bits (8, 0): a power-of-two scale is taken from each block; only 'dynamic' is allowed")
    return True
  return kind == "dynamic" or bool(in_blocks)


def _e8m0_rule(attributes: Mapping[str, Any], blocks: read.Blocks | None, default: QuantSpec | None) -> str:
  inner = blocks.e8m0_rule if blocks is not None else None
  outer = None if attributes.get("e8m0_rule") is None else check_choice("e8m0_rule", attributes["e8m0_rule"], E8M0_RULES)
  if inner is not None and outer is not None and inner != outer:
    raise ValueError(f"e8m0_rule {outer!r} contradicts block_sizes['e8m0_rule'] {inner!r}; leave one of them out")
  rule = outer or inner
  power_of_two = blocks is not None and blocks.scale_format == formats.E8M0
  if rule is not None and not power_of_two:
    raise ValueError(f"e8m0_rule {rule!r} needs a power-of-two scale: block_sizes with 'scale_bits': (8, 0)")
  return rule or (default.e8m0_rule if default is not None and power_of_two else "rceil")


def _zero_point(attributes: Mapping[str, Any], element: formats.Format, default: bool) -> bool:
  zero_point = check_bool("zero_point", attributes.get("zero_point", default))
  if zero_point and not isinstance(element, IntFormat):
    raise ValueError(f"zero_point is True, which needs an integer format; the element format is {element.name}")
  if zero_point and attributes.get("bound") is not None:
    raise ValueError(f"bound {attributes['bound']!r} has no meaning with zero_point True (the range is mapped onto all codes); drop one")
  return zero_point


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
  """Everything one quantizer is told. Frozen, hashable, the same for every backend.

  Attributes:
    spec: the arithmetic; axes are those of the torch layout. Ragged last blocks are padded unless `pad: False` was given.
    calibrator: "max" or "histogram".
    calibrator_options: options of the calibrator.
    pass_through_bwd: the gradient ignores clipping.
    constant_amax: pinned amax, no statistics; `use_constant_amax: True` is 448.
    bias: affine quantization, Q(x - b) + b.
    rotate: Hadamard rotation before quantization.
    effective_bits: declared cost for the mixed-precision search.
    fake_quant: False asks for codes to be stored instead of simulated values.
    trt_high_precision_dtype: type around the ONNX nodes.
    backend, backend_extra_args: name and arguments of a custom quantization function.
  """

  spec: QuantSpec
  calibrator: str = "max"
  calibrator_options: FrozenDict = dataclasses.field(default_factory=FrozenDict)
  pass_through_bwd: bool = True
  constant_amax: float | None = None
  bias: BiasSpec | None = None
  rotate: RotateSpec | None = None
  effective_bits: float | None = None
  fake_quant: bool = True
  trt_high_precision_dtype: str = "Float"
  backend: str | None = None
  backend_extra_args: FrozenDict | None = None

  @classmethod
  def from_attributes(cls, attributes: Mapping[str, Any]) -> QuantizerConfig:
    """Validates one set of attributes. `enable` is checked and left to whoever holds the quantizer.

    Raises:
      ValueError: names the key, the value and what is allowed.
      TypeError: `attributes` is not a mapping.
    """
    _check_mapping(attributes)
    check_bool("enable", attributes.get("enable", True))
    if check_bool("learn_amax", attributes.get("learn_amax", False)):
      raise ValueError("learn_amax is True, which is deprecated; allowed is False (learned scales: algorithm 'lsq')")
    calibrator, options = read_calibrator(attributes.get("calibrator", "max"))
    return cls(
      spec=spec_from_attributes({"pad": True, **attributes}),
      calibrator=calibrator,
      calibrator_options=options,
      pass_through_bwd=check_bool("pass_through_bwd", attributes.get("pass_through_bwd", True)),
      constant_amax=_constant_amax(attributes),
      bias=BiasSpec.from_attribute(attributes.get("bias")),
      rotate=RotateSpec.from_attribute(attributes.get("rotate")),
      effective_bits=_number("effective_bits", attributes.get("effective_bits"), 16.0),
      fake_quant=check_bool("fake_quant", attributes.get("fake_quant", True)),
      trt_high_precision_dtype=check_choice(
        "trt_high_precision_dtype", attributes.get("trt_high_precision_dtype", "Float"), HIGH_PRECISION_DTYPES
      ),
      backend=_backend(attributes),
      backend_extra_args=_extra_args(attributes),
    )

  @property
  def dynamic(self) -> bool:
    """Whether amax (of a block, for two-level scales) comes from each input."""
    return self.spec.dynamic

  @property
  def needs_calibration(self) -> bool:
    """Whether an activation quantizer of this kind needs data: static ones, and the tensor amax of two-level ones."""
    if self.constant_amax is not None or self.spec.is_mx:
      return False
    return not self.spec.dynamic or self.spec.two_level

  def why_no_histogram(self, method: str) -> str:
    """Why amax cannot come from a histogram of |x| by that method; "" where it can."""
    spec = self.spec
    if spec.dynamic:
      return "its scales are taken from each input"
    if spec.axis is not None or spec.blocks is not None:
      return "it has more than one scale; a histogram knows one"
    if spec.zero_point:
      return "a zero point needs a range; a histogram knows magnitudes"
    if self.bias is not None:
      return "its affine bias is not known before all data has come"
    if isinstance(spec.element, CodebookFormat) and method != "percentile":
      return f"its codebook need not be symmetric, and method {method!r} knows magnitudes"
    return ""

  def check_simulated(self, name: str) -> None:
    """Refuses what a backend that simulates quantization cannot do.

    Raises:
      ValueError: a custom quantization function, or stored codes, were asked for, or a histogram for a format that has no use for one;
        names the quantizer.
    """
    if self.backend is not None:
      raise ValueError(f"quantizer {name!r}: no quantization function named {self.backend!r} is registered; leave `backend` out")
    reason = self.why_no_histogram(self.calibrator_options.get("method", HISTOGRAM_METHODS[0])) if self.calibrator == "histogram" else ""
    if reason and self.constant_amax is None:
      raise ValueError(
        f"quantizer {name!r} ({self.describe()}) asks for calibrator 'histogram', but {reason}; use a static format with one scale per "
        "tensor, or calibrator 'max'"
      )
    if not self.fake_quant:
      raise ValueError(f"quantizer {name!r}: fake_quant=False asks for stored codes in place of simulated values; allowed here is True")

  def replace(self, **changes: Any) -> QuantizerConfig:
    """A copy with these fields changed."""
    return dataclasses.replace(self, **changes)

  def to_attributes(self) -> dict[str, Any]:
    """Plain attributes that JSON can hold; `from_attributes` gives this very config back."""
    from core.config.describe import to_attributes

    return to_attributes(self)

  def describe(self) -> str:
    """Short text, such as "INT8 axis 0" or "NVFP4 block 16 dynamic"."""
    from core.config.describe import describe

    return describe(self.spec)


def _number(key: str, value: Any, most: float = math.inf) -> float | None:
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most or math.isinf(value):
    limit = "a finite number above 0" if math.isinf(most) else f"a number above 0 and at most {most:g}"
    raise ValueError(f"{key} is {value!r}; allowed is {limit}, or None")
  return float(value)


def _constant_amax(attributes: Mapping[str, Any]) -> float | None:
  constant = _number("constant_amax", attributes.get("constant_amax"))
  if not check_bool("use_constant_amax", attributes.get("use_constant_amax", False)):
    return constant
  if constant is not None:
    raise ValueError(f"use_constant_amax True (amax {CONSTANT_AMAX:g}) and constant_amax {constant:g} exclude each other; give one of them")
  return CONSTANT_AMAX


def _backend(attributes: Mapping[str, Any]) -> str | None:
  backend = attributes.get("backend")
  if backend is not None and not (isinstance(backend, str) and backend):
    raise ValueError(f"backend is {backend!r}; allowed is the name of a registered quantization function, or None")
  return backend


def _extra_args(attributes: Mapping[str, Any]) -> FrozenDict | None:
  extra = attributes.get("backend_extra_args")
  if extra is None:
    return None
  if not isinstance(extra, Mapping):
    raise ValueError(f"backend_extra_args is {extra!r}; a mapping of JSON values is needed")
  return FrozenDict(extra)
