"""What the checkpoint layouts have in common: the plan of a layer, and what is read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import core
from core import scaling
from core.export.source import Refusal
from core.quantize import QuantizedTensor
from core.scaling import Scales
from core.spec import QuantSpec
from core.tensor_header import Entry


class Planned(NamedTuple):
  """How one layer is written, before any of its numbers are computed.

  Attributes:
    scheme: its part of the configuration; layers with equal ones form a group.
    entries: suffix ("weight_packed") -> dtype and shape.
    make: codes and scales of the weight -> suffix -> array.
    tensor_scale: whether the exact tensor scale must be kept beside the file's rounded reciprocal.
  """

  scheme: dict[str, Any]
  entries: dict[str, Entry]
  make: Callable[[QuantizedTensor], dict[str, np.ndarray]]
  tensor_scale: bool = False


@dataclasses.dataclass(frozen=True)
class Stored:
  """One layer as a checkpoint holds it.

  Attributes:
    weight: codes and scales.
    second: (format, scale) of a second rounding of the dequantized weight (W4A8), or None.
    input_scale: [] scale of a static input, or tensor scale of a two-level one; None where the input has none.
    pre_quant_scale: [K] or [] factor on the input, or None.
    low_rank: (a [r, K], b [N, r]), or None.
  """

  weight: QuantizedTensor
  second: tuple[QuantSpec, np.ndarray] | None = None
  input_scale: np.ndarray | None = None
  pre_quant_scale: np.ndarray | None = None
  low_rank: tuple[np.ndarray, np.ndarray] | None = None

  def values(self, like: np.ndarray | None = None) -> np.ndarray:
    """The weight that the model computes with.

    Args:
      like: an array of the model's type (float32, float16, or bfloat16 of ml_dtypes); None is float32.

    Returns:
      [N, K] of that type, cast once per rounding, as a quantizer does.
    """
    values = core.cast_saturating(core.dequantize(self.weight), np.zeros((), np.float32) if like is None else like)
    if self.second is None:
      return values
    spec, step = self.second
    return core.fake_quantize(values, spec, scales=Scales(step, scaling.reciprocal(step), step))


Get = Callable[[str], np.ndarray | None]
"""The tensor of a layer by its suffix; None where there is none."""


def need(get: Get, name: str, suffix: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
  """A tensor that must be there, of that shape.

  Raises:
    ValueError: names what is missing or has another shape.
  """
  found = get(suffix)
  if found is None:
    raise ValueError(f"{name} has no tensor {suffix!r}")
  if shape is not None and found.shape != shape:
    raise ValueError(f"{name}.{suffix} has shape {list(found.shape)}; expected {list(shape)}")
  return found


def scalar(get: Get, name: str, suffix: str) -> np.ndarray | None:
  """A tensor of one float32 element, as []; None where there is none.

  Raises:
    ValueError: it has more elements, or is not a positive finite number.
  """
  found = get(suffix)
  if found is None:
    return None
  if found.size != 1 or found.dtype != np.float32 or not np.isfinite(found).all() or not (found > 0).all():
    raise ValueError(f"{name}.{suffix} is {found.dtype} {list(found.shape)}; expected one positive finite float32")
  return found.reshape(())


def divides(subject_shape: tuple[int, ...], size: int) -> None:
  """Raises:
  Refusal: the group does not divide the inputs.
  """
  if subject_shape[-1] % size:
    raise Refusal(f"groups of {size} do not divide its {subject_shape[-1]} inputs, and clients refuse a last group that is not full")


def expect_keys(where: str, value: Any, keys: tuple[str, ...]) -> Mapping[str, Any]:
  """A JSON object that has these keys.

  Raises:
    ValueError: it is none, or lacks one.
  """
  if not isinstance(value, dict) or not set(keys) <= set(value):
    raise ValueError(f"{where} is {str(value)[:120]}; an object with {', '.join(keys)} is needed")
  return value
