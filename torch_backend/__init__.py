"""Quantization of PyTorch models, in place.

>>> from torch_backend import INT8_DEFAULT_CFG, quantize
>>> quantize(model, INT8_DEFAULT_CFG, forward_loop=lambda m: [m(batch) for batch in batches])
>>> model(x)                                       # simulated quantization; train it, compile it, fold it

The arithmetic is `core`'s and the same, bit for bit, as in JAX. Every preset of `core.config` is a name of this module.
"""

from typing import Any

from core.calibrate.report import print_calibration_report
from core.config import DEFAULT_GROUPS, EXPERT_GROUPS, PRESETS, ConfigWarning, QuantizerConfig, choices, preset
from torch_backend.calibrate import calibrate, max_calibrate, register_algorithm
from torch_backend.convert import quantize
from torch_backend.edit import disable_quantizer, enable_quantizer, set_quantizer_by_cfg
from torch_backend.fold import fold_weight
from torch_backend.modules import QuantInput, QuantModule, QuantWeight, register, unregister
from torch_backend.names import is_quantized, quantizers
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import SequentialQuantizer
from torch_backend.summary import print_quant_summary, summary
from torch_backend.weights import weight_quantization

__all__ = [
  "DEFAULT_GROUPS",
  "EXPERT_GROUPS",
  "ConfigWarning",
  "QuantInput",
  "QuantModule",
  "QuantWeight",
  "QuantizerConfig",
  "SequentialQuantizer",
  "TensorQuantizer",
  "calibrate",
  "choices",
  "disable_quantizer",
  "enable_quantizer",
  "fold_weight",
  "is_quantized",
  "max_calibrate",
  "preset",
  "print_calibration_report",
  "print_quant_summary",
  "quantize",
  "quantizers",
  "register",
  "register_algorithm",
  "set_quantizer_by_cfg",
  "summary",
  "unregister",
  "weight_quantization",
]


def __getattr__(name: str) -> Any:
  """The presets: `torch_backend.INT8_DEFAULT_CFG` and its like."""
  if name in PRESETS:
    return PRESETS[name]
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, *PRESETS]
