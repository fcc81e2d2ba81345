"""Quantization of JAX models: pure functions over unmodified Flax linen modules.

>>> from jax_backend import INT8_DEFAULT_CFG, quantize
>>> qmodule, qvariables = quantize(module, variables, INT8_DEFAULT_CFG, forward_loop=lambda m: [m(batch) for batch in batches])
>>> qmodule.apply(qvariables, x)                   # simulated quantization; jit it, train qvariables["params"], fold it

The arithmetic is `core`'s and the same, bit for bit, as in PyTorch. Every preset of `core.config` is a name of this module.
"""

import importlib
from typing import TYPE_CHECKING, Any

from core.calibrate.report import print_calibration_report
from core.config import DEFAULT_GROUPS, EXPERT_GROUPS, PRESETS, ConfigWarning, QuantizerConfig, choices, preset
from jax_backend.apply import QuantModule
from jax_backend.attention import dot_product_attention, quantize_bmm
from jax_backend.auto_quantize import auto_quantize
from jax_backend.calibrate import Runner, calibrate, max_calibrate, register_algorithm
from jax_backend.compress import compress, compression_report, decompress, is_compressed, print_compression_report
from jax_backend.convert import quantize
from jax_backend.edit import disable_quantizer, enable_quantizer, is_quantized, quantizers, set_quantizer_by_cfg
from jax_backend.export import export
from jax_backend.export_onnx import export_onnx
from jax_backend.fold import fold_weight
from jax_backend.modules import register, unregister
from jax_backend.quantizer import Quantizer, SequentialQuantizer
from jax_backend.state import restore, save
from jax_backend.summary import print_quant_summary, summary
from jax_backend.verify import verify, verify_controls
from jax_backend.weights import weight_quantization

if TYPE_CHECKING:
  from core.search.groups import SEARCH_GROUPS
  from core.search.report import print_auto_quantize_summary
  from core.search.state import get_auto_quantize_config, pareto_front

__all__ = [
  "DEFAULT_GROUPS",
  "EXPERT_GROUPS",
  "SEARCH_GROUPS",
  "ConfigWarning",
  "QuantModule",
  "Quantizer",
  "QuantizerConfig",
  "Runner",
  "SequentialQuantizer",
  "auto_quantize",
  "calibrate",
  "choices",
  "compress",
  "compression_report",
  "decompress",
  "disable_quantizer",
  "dot_product_attention",
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
  """The presets, `jax_backend.INT8_DEFAULT_CFG` and its like, and what is imported where it is used."""
  if name in PRESETS:
    return PRESETS[name]
  if name in _LATER:
    return getattr(importlib.import_module(_LATER[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, *PRESETS]
