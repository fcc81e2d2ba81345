"""Finding the quantizers of a model, and the names that rules match."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from torch_backend.modules import QuantModule, QuantWeight, original_class
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import Quantizer, SequentialQuantizer


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
  """Every quantizer by its dotted name, in the model's order; a sequential one counts as one.

  >>> quantizers(model)["model.layers.0.self_attn.q_proj.weight_quantizer"].amax
  """
  return {name: quantizer for name, quantizer, _ in walk(model)}


def walk(model: nn.Module) -> Iterator[tuple[str, Quantizer, nn.Module]]:
  """(name, quantizer, the module that holds it)."""
  for path, module in model.named_modules():
    if isinstance(module, TensorQuantizer | SequentialQuantizer):
      continue
    for name, child in module.named_children():
      if isinstance(child, TensorQuantizer | SequentialQuantizer):
        yield f"{path}.{name}" if path else name, child, module


def parent_classes(module: nn.Module) -> tuple[str, ...]:
  """Names of the classes that a module is an instance of, as rules with `parent_class` write them: "nn.Linear", "my.module.MyLinear"."""
  names = []
  for cls in original_class(type(module)).__mro__:
    if issubclass(cls, nn.Module) and cls is not nn.Module:
      names.append(f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else f"{cls.__module__}.{cls.__qualname__}")
  return tuple(names)


def compressed_layers(model: nn.Module) -> list[str]:
  """Names of the layers whose weight is held as codes."""
  return [name for name, module in model.named_modules() if isinstance(module, QuantWeight) and module.packed_weight is not None]


def is_quantized(model: nn.Module) -> bool:
  """Whether any module of the model has been converted."""
  return isinstance(model, nn.Module) and any(isinstance(module, QuantModule) for module in model.modules())
