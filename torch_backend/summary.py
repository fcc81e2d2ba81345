"""What a quantized model consists of, as a table and as data."""

from __future__ import annotations

import pathlib
from typing import Any

from torch import nn

from core import model_table
from torch_backend import groups
from torch_backend.modules import QuantWeight
from torch_backend.names import walk
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers


def print_quant_summary(model: nn.Module, output_dir: str | pathlib.Path | None = None) -> list[dict[str, Any]]:
  """Print one line per quantizer: format, state, amax, its group of siblings and what sharing their scale costs in SQNR.

  A table on a terminal, plain text otherwise.

  Args:
    model: a quantized model.
    output_dir: also write the plain text to `quant_summary.txt` in this directory.

  Returns:
    One dict per TensorQuantizer: name, format, enabled, state, amax_min, amax_max, amax_shape, group, cost_db.
  """
  rows = summary(model)
  model_table.show(rows, output_dir)
  return rows


def summary(model: nn.Module) -> list[dict[str, Any]]:
  """The data of `print_quant_summary`, without printing."""
  return [_row(one, module) for _, quantizer, module in walk(model) for one in tensor_quantizers(quantizer)]


def _row(quantizer: TensorQuantizer, module: nn.Module) -> dict[str, Any]:
  amax = quantizer.amax
  known = None if amax is None or amax.is_meta else amax
  return {
    "name": quantizer.name,
    "format": quantizer.config.describe() if quantizer.is_enabled else "",
    "enabled": quantizer.is_enabled,
    "state": _state(quantizer, module),
    "amax_min": None if known is None else float(known.min()),
    "amax_max": None if known is None else float(known.max()),
    "amax_shape": tuple(amax.shape) if amax is not None else None,
    "group": quantizer.group if quantizer.own_tensor_amax is not None else None,
    "cost_db": groups.cost_db(module, quantizer) if isinstance(module, QuantWeight) else None,
  }


def _state(quantizer: TensorQuantizer, module: nn.Module) -> str:
  if isinstance(module, QuantWeight) and module.packed_weight is not None and quantizer is tensor_quantizers(module.weight_quantizer)[0]:
    return "compressed"
  if not quantizer.is_enabled:
    return "folded" if quantizer.is_folded else "off"
  if quantizer.amax is not None:
    return "constant" if quantizer.config.constant_amax is not None else "calibrated"
  return "not calibrated" if quantizer.config.needs_calibration else "dynamic"
