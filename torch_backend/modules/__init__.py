"""Quantized modules and the registry of which class becomes which."""

from torch_backend.modules.attention import QuantAttention
from torch_backend.modules.base import QuantInput, QuantModule, QuantTable, QuantWeight
from torch_backend.modules.registry import original_class, quantized_class, register, unregister

__all__ = [
  "QuantAttention",
  "QuantInput",
  "QuantModule",
  "QuantTable",
  "QuantWeight",
  "original_class",
  "quantized_class",
  "register",
  "unregister",
]
