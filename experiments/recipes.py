"""Formats and calibration recipes by short names, as data: what the studies of algorithms run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from core.config import PRESETS, normalize, preset
from core.config.algorithms import read_algorithm

_OFF: dict[str, Any] = {"enable": False}
_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_MXFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


def _group(bits: int, size: int) -> dict[str, Any]:
  return {"num_bits": bits, "block_sizes": {-1: size, "type": "static"}, "pad": True}


# name -> (weight attributes, input attributes or None)
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
  "int3_g64": (_group(3, 64), None),
  "int4_g32": (_group(4, 32), None),
  "int4_g64": (_group(4, 64), None),
  "int4_g128": (_group(4, 128), None),
  "int8": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}),
  "int8_w": ({"num_bits": 8, "axis": 0}, None),
  "fp8": ({"num_bits": (4, 3), "axis": None}, {"num_bits": (4, 3), "axis": None}),
  "nvfp4": (_NVFP4, _NVFP4),
  "nvfp4_w": (_NVFP4, None),
  "mxfp4": (_MXFP4, _MXFP4),
  "mxfp4_w": (_MXFP4, None),
}

_SEQUENTIAL = {"layerwise": True, "true_sequential": True}
# name -> algorithm; every other method name stands for itself with its defaults
RECIPES: dict[str, Any] = {
  "smoothquant_half": {"method": "smoothquant", "alpha": 0.5},
  "smoothquant_search": {"method": "smoothquant", "alpha": "search"},
  "gptq_act_order": {"method": "gptq", "act_order": True},
  "gptq_layerwise": {"method": "gptq", "act_order": True, **_SEQUENTIAL},
  "gptq_best": {"method": "gptq", "act_order": True, "scale_search": "signed", "correction": 0.5, "perc_damp": 0.03, **_SEQUENTIAL},
  "svdquant_gptq": ["svdquant", {"method": "gptq", "act_order": True, **_SEQUENTIAL}],
  "gptq_distill": [
    {"method": "gptq", "act_order": True, "scale_search": "signed", "correction": 0.5, "perc_damp": 0.03, **_SEQUENTIAL},
    {"method": "distill", "epochs": 3, "parts": ["scales", "norms"]},
  ],
  "svdquant_distill": [
    "svdquant",
    {"method": "gptq", "act_order": True, **_SEQUENTIAL},
    {"method": "distill", "epochs": 2, "parts": ["norms", "low_rank"], "norm_lr": 3e-4},
  ],
}


def quant_cfg(format_name: str) -> dict[str, Any]:
  """Rules that give every weight (and input) of a model a format, without what presets leave in float.

  Raises:
    ValueError: an unknown format.
  """
  if format_name not in FORMATS:
    raise ValueError(f"format {format_name!r} is unknown; allowed are {', '.join(FORMATS)}")
  weight, inputs = FORMATS[format_name]
  rules: dict[str, Any] = {"default": _OFF, "*weight_quantizer": weight}
  if inputs is not None:
    rules["*input_quantizer"] = inputs
  base = preset("INT8_WEIGHT_ONLY_CFG")["quant_cfg"]
  return rules | {key: value for key, value in base.items() if key not in ("default", "*weight_quantizer", "*input_quantizer")}


def config(format_name: str, algorithm: Any) -> dict[str, Any]:
  """A whole configuration: a preset's name or one of FORMATS, with an algorithm."""
  rules = preset(format_name)["quant_cfg"] if format_name in PRESETS else quant_cfg(format_name)
  found = {"quant_cfg": rules, "algorithm": algorithm}
  normalize(found)
  return found


def algorithms(names: Iterable[str]) -> dict[str, Any]:
  """Name -> algorithm, from names of RECIPES, or methods with their options: "gptq:act_order=true:perc_damp=0.1", "svdquant+gptq".

  Raises:
    ValueError: an unknown name or option.
  """
  found = {}
  for name in names:
    steps = [_step(part) for part in name.split("+")]
    value = RECIPES[name] if name in RECIPES else steps[0] if len(steps) == 1 else steps
    read_algorithm(value)
    found[name] = value
  return found


def _step(text: str) -> Any:
  method, *options = text.split(":")
  if not options:
    return RECIPES[method] if isinstance(RECIPES.get(method), dict) else method
  pairs = [option.partition("=") for option in options]
  for key, between, _ in pairs:
    if not key or not between:
      raise ValueError(f"algorithm {text!r}: options are written method:key=value:key=value, for example gptq:act_order=true")
  return {"method": method, **{key: _value(value) for key, _, value in pairs}}


def _value(text: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return text
