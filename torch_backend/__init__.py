"""Quantization of PyTorch models, in place.

>>> from torch_backend import INT8_DEFAULT_CFG, quantize
>>> quantize(model, INT8_DEFAULT_CFG, forward_loop=lambda m: [m(batch) for batch in batches])
>>> model(x)                                       # simulated quantization; train it, compile it, fold it

The arithmetic is `core`'s and the same, bit for bit, as in JAX. Every preset of `core.config` is a name of this module.
"""

import importlib
from typing import TYPE_CHECKING, Any

from core.calibrate.report import print_calibration_report
from core.config import DEFAULT_GROUPS, EXPERT_GROUPS, PRESETS, ConfigWarning, QuantizerConfig, choices, preset
from torch_backend.attention import quantize_bmm, register_attention
from torch_backend.auto_quantize import auto_quantize
from torch_backend.calibrate import calibrate, max_calibrate, register_algorithm
from torch_backend.compress import compress, compression_report, decompress, is_compressed, print_compression_report
from torch_backend.convert import quantize
from torch_backend.edit import disable_quantizer, enable_quantizer, set_quantizer_by_cfg
from torch_backend.export import export
from torch_backend.export_onnx import export_onnx
from torch_backend.fold import fold_weight
from torch_backend.modules import QuantInput, QuantModule, QuantWeight, register, unregister
from torch_backend.names import is_quantized, quantizers
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import SequentialQuantizer
from torch_backend.state import restore, save
from torch_backend.summary import print_quant_summary, summary
from torch_backend.verify import verify, verify_controls
from torch_backend.weights import weight_quantization

if TYPE_CHECKING:
  from core.search.groups import SEARCH_GROUPS
  from core.search.report import print_auto_quantize_summary
  from core.search.state import get_auto_quantize_config, pareto_front

__all__ = [
  "DEFAULT_GROUPS",
  "EXPERT_GROUPS",
  "SEARCH_GROUPS",
  "ConfigWarning",
  "QuantInput",
  "QuantModule",
  "QuantWeight",
  "QuantizerConfig",
  "SequentialQuantizer",
  "TensorQuantizer",
  "auto_quantize",
  "calibrate",
  "choices",
  "compress",
  "compression_report",
  "decompress",
  "disable_quantizer",
  "enable_quantizer",
  "export",
  "export_onnx",
  "fold_weight",
  "get_auto_quantize_config",
  "is_compressed",
  "is_quantized",
  "max_calibrate",
  "pareto_front",
  "preset",
  "print_auto_quantize_summary",
  "print_calibration_report",
  "print_compression_report",
  "print_quant_summary",
  "quantize",
  "quantize_bmm",
  "quantizers",
  "register",
  "register_algorithm",
  "register_attention",
  "restore",
  "save",
  "set_quantizer_by_cfg",
  "summary",
  "unregister",
  "verify",
  "verify_controls",
  "weight_quantization",
]


_LATER = {
  "SEARCH_GROUPS": "core.search.groups",
  "get_auto_quantize_config": "core.search.state",
  "pareto_front": "core.search.state",
  "print_auto_quantize_summary": "core.search.report",
}


def __getattr__(name: str) -> Any:
  """The presets, `torch_backend.INT8_DEFAULT_CFG` and its like, and what is imported where it is used."""
  if name in PRESETS:
    return PRESETS[name]
  if name in _LATER:
    return getattr(importlib.import_module(_LATER[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, *PRESETS]
