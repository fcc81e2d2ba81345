"""What an ONNX graph needs to know of one quantizer: the same for both backends."""

from __future__ import annotations

import dataclasses
from typing import Any

import core
from core.spec import QuantSpec

FORMS = ("standard", "exact")
FP4 = ("portable", "native")
OPSETS = (21, 22, 23, 24, 25)
NATIVE_FP4_OPSET = 23
DOMAIN, PLACEHOLDER = "twinquant", "Quantizer"


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
  """How quantizers are written.

  Attributes:
    opset: version of the standard operator set, 21 to 25.
    form: "standard" quantizes activations by QuantizeLinear(x, scale), which divides; "exact" multiplies by the correctly rounded
      reciprocal first, as `core` does, so that no rounding can fall the other way for that reason.
    fp4: "portable" writes E2M1 by arithmetic and 4-bit codes with a table of levels, which onnxruntime runs; "native" uses FLOAT4E2M1.
  """

  opset: int = OPSETS[0]
  form: str = FORMS[0]
  fp4: str = FP4[0]

  @classmethod
  def make(cls, opset: int | None, form: str, fp4: str) -> OnnxOptions:
    """Checked options; opset None is the lowest that has all types.

    Raises:
      ValueError: a value that is not allowed.
    """
    for key, value, allowed in (("form", form, FORMS), ("fp4", fp4, FP4)):
      if value not in allowed:
        raise ValueError(f"{key} {value!r} is unknown; allowed are {', '.join(map(repr, allowed))}")
    if opset is None:
      opset = NATIVE_FP4_OPSET if fp4 == "native" else OPSETS[0]
    if opset not in OPSETS:
      raise ValueError(f"opset {opset!r} is not allowed; use one of {', '.join(map(str, OPSETS))}")
    if fp4 == "native" and opset < NATIVE_FP4_OPSET:
      raise ValueError(f'fp4="native" needs opset {NATIVE_FP4_OPSET} or later (FLOAT4E2M1), got {opset}; or use fp4="portable"')
    return cls(opset, form, fp4)


@dataclasses.dataclass(frozen=True)
class Piece:
  """One quantizer, in the axes of the tensor that its placeholder node receives. All arrays are numpy's.

  Attributes:
    name: dotted name of the quantizer; nodes and initializers are named after it.
    spec: the arithmetic.
    amax: calibrated amax as `core.fake_quantize` takes it, or None (taken from each input).
    tensor_amax: tensor amax of a two-level specification with a given block amax.
    weight: codes and scales where the tensor is a weight; the placeholder's input is then dropped.
  """

  name: str
  spec: QuantSpec
  amax: Any = None
  tensor_amax: Any = None
  weight: core.QuantizedTensor | None = None

  def __post_init__(self) -> None:
    if self.weight is None and self.spec.rounding == "stochastic":
      raise ValueError(f"quantizer {self.name!r} rounds stochastically, which ONNX cannot express; set rounding to 'nearest' to export")
