"""SequentialQuantizer: several formats one after the other on one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from core.config import QuantizerConfig
from torch_backend.quantizer import TensorQuantizer
from torch_backend.quantizer_state import Attributes


class SequentialQuantizer(nn.Sequential):
  """Quantizers applied one after the other, each calibrated on what the one before it returns (W4A8: INT4, then FP8 of that).

  Args:
    quantizers: the TensorQuantizers, in order.
  """

  def __init__(self, *quantizers: TensorQuantizer) -> None:
    if not quantizers or not all(isinstance(q, TensorQuantizer) for q in quantizers):
      raise TypeError(f"SequentialQuantizer takes one or more TensorQuantizers, got {[type(q).__name__ for q in quantizers]}")
    super().__init__(*quantizers)
    self.name = ""

  def forward(self, x: Tensor) -> Tensor:
    if not any(q.is_calibrating for q in self.quantizers):
      return super().forward(x)
    seen = x
    for quantizer in self.quantizers:
      quantizer(seen)
      seen = quantizer.preview(seen)
    return x

  @property
  def quantizers(self) -> tuple[TensorQuantizer, ...]:
    """The quantizers, in order."""
    return tuple(self._modules.values())  # type: ignore[arg-type]

  @property
  def config(self) -> tuple[QuantizerConfig, ...]:
    return tuple(q.config for q in self.quantizers)

  @property
  def is_enabled(self) -> bool:
    return any(q.is_enabled for q in self.quantizers)

  @property
  def amax(self) -> Tensor | None:
    """amax of the last one."""
    return self.quantizers[-1].amax

  @property
  def tensor_amax(self) -> Tensor | None:
    return self.quantizers[-1].tensor_amax

  def enable(self) -> None:
    for quantizer in self.quantizers:
      quantizer.enable()

  def disable(self) -> None:
    for quantizer in self.quantizers:
      quantizer.disable()

  def set_folded(self) -> None:
    for quantizer in self.quantizers:
      quantizer.set_folded()

  def reset_amax(self) -> None:
    for quantizer in self.quantizers:
      quantizer.reset_amax()

  def set_from_attribute_config(self, attributes: Sequence[Attributes]) -> None:
    """One set of attributes per quantizer.

    Raises:
      ValueError: another number of sets than there are quantizers.
    """
    if isinstance(attributes, Mapping) or len(attributes) != len(self):
      raise ValueError(f"{len(self)} quantizers in sequence need a list of {len(self)} attribute sets, got {attributes!r}")
    for quantizer, one in zip(self.quantizers, attributes, strict=True):
      quantizer.set_from_attribute_config(one)


Quantizer = TensorQuantizer | SequentialQuantizer


def tensor_quantizers(quantizer: Quantizer) -> tuple[TensorQuantizer, ...]:
  """The TensorQuantizers of one position: itself, or those of a sequence."""
  return (quantizer,) if isinstance(quantizer, TensorQuantizer) else quantizer.quantizers
