"""Which quantized class stands for which original class."""

from __future__ import annotations

import functools
import sys

from torch import nn

from torch_backend.modules.attention import QuantTransformersAttention, is_transformers_attention
from torch_backend.modules.base import QuantModule
from torch_backend.modules.layers import LAYERS, InOutWeight
from torch_backend.modules.multihead import QuantMultiheadAttention

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
  layer.__mro__[layer.__mro__.index(QuantModule) + 1]: layer for layer in (*LAYERS, QuantMultiheadAttention)
}
_REGISTERED: dict[type[nn.Module], type[nn.Module]] = {}


def register(original_cls: type[nn.Module], quantized_cls: type[nn.Module]) -> None:
  """Convert modules of `original_cls` (and its subclasses, unless they have an entry of their own) to `quantized_cls`.

  `quantized_cls` has a method `_setup(self)` that creates its TensorQuantizers, and a forward that calls them:

  >>> class QuantNorm(nn.LayerNorm):
  ...   def _setup(self):
  ...     self.input_quantizer = TensorQuantizer()
  ...   def forward(self, x):
  ...     return super().forward(self.input_quantizer(x))
  >>> register(nn.LayerNorm, QuantNorm)

  A registration replaces an earlier one, the built-in included, until `unregister`.

  Raises:
    TypeError: the arguments are no nn.Module classes, or `quantized_cls` has no `_setup`.
  """
  for cls in (original_cls, quantized_cls):
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
      raise TypeError(f"register takes two nn.Module classes, got {cls!r}")
  if not callable(getattr(quantized_cls, "_setup", None)):
    raise TypeError(f"{quantized_cls.__name__} needs a method _setup(self) that creates its quantizers")
  _REGISTERED[original_cls] = quantized_cls
  _derived.cache_clear()


def unregister(original_cls: type[nn.Module]) -> None:
  """Undo `register`; modules that are already converted stay so.

  Raises:
    KeyError: the class was not registered.
  """
  if original_cls not in _REGISTERED:
    known = ", ".join(cls.__name__ for cls in _REGISTERED) or "none"
    raise KeyError(f"{original_cls.__name__} was not registered; registered are: {known}")
  del _REGISTERED[original_cls]
  _derived.cache_clear()


def quantized_class(cls: type[nn.Module]) -> type[nn.Module] | None:
  """The class that a module of this class becomes, a subclass of both `cls` and QuantModule; None if it stays as it is."""
  if issubclass(cls, QuantModule) or issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear):
    # The latter is nn.MultiheadAttention's output projection: attention reads its weight and never calls it.
    return None
  for base in cls.__mro__:
    target = _REGISTERED.get(base) or _LAYERS.get(base) or _loaded(base)
    if target is not None:
      return _derived(cls, target)
  return _derived(cls, QuantTransformersAttention) if is_transformers_attention(cls) else None


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
  """The class that a quantized class was made from."""
  return cls.__dict__.get("_original_class", cls) if issubclass(cls, QuantModule) else cls


def _loaded(base: type) -> type[nn.Module] | None:
  """Classes of libraries that are imported only by the models that use them."""
  transformers = sys.modules.get("transformers.pytorch_utils")
  if transformers is not None and base is getattr(transformers, "Conv1D", None):
    return InOutWeight
  return None


@functools.cache
def _derived(cls: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
  """A subclass of `target`, `cls` and QuantModule, in that order of lookup; `target` itself where it is one already."""
  derived = target
  if not (issubclass(target, QuantModule) and issubclass(target, cls)):
    bases = [target]
    bases += [] if issubclass(target, cls) else [cls]
    bases += [] if issubclass(target, QuantModule) else [QuantModule]
    derived = type(f"Quant{cls.__name__}", tuple(bases), {"__module__": cls.__module__, "__doc__": target.__doc__})
  if "_original_class" not in derived.__dict__:
    derived._original_class = cls  # type: ignore[attr-defined]
  return derived
