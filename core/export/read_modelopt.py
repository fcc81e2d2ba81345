"""The unified layout of ModelOpt, read: schemes of layers, their codes and scales. Nothing in a file is trusted."""

from __future__ import annotations

from typing import Any

import numpy as np

from core import blocks, formats
from core.export import packing
from core.export.layout import Get, Stored, expect_keys, need, scalar
from core.export.modelopt import GROUPED, WRITERS
from core.quantize import QuantizedTensor
from core.spec import QuantSpec


def scheme_of(settings: dict[str, Any], name: str) -> dict[str, Any]:
  """The scheme of a layer.

  Raises:
    ValueError: there is none, or the layer is excluded.
  """
  details = expect_keys("hf_quant_config.json: quantization", settings.get("quantization"), ("quant_algo",))
  excluded = details.get("exclude_modules") or []
  if not isinstance(excluded, list) or name in excluded:
    raise ValueError(f"{name} has quantized tensors and is among exclude_modules")
  if details["quant_algo"] != "MIXED_PRECISION":
    return dict(details)
  layers = details.get("quantized_layers")
  return dict(expect_keys(f"quantized_layers of {name}", layers.get(name) if isinstance(layers, dict) else None, ("quant_algo",)))


def read(scheme: dict[str, Any], name: str, get: Get, exact: dict[str, np.ndarray]) -> Stored:
  """A layer from its tensors; arguments and errors as in `compressed_tensors.read`."""
  del exact  # tensor scales are stored as they are
  algorithm, size = scheme["quant_algo"], scheme.get("group_size", 0)
  if not isinstance(algorithm, str) or algorithm not in WRITERS:
    raise ValueError(f"{name}: quant_algo {algorithm!r} is unknown; known are {', '.join(WRITERS)}")
  if algorithm in GROUPED and (type(size) is not int or size < 1):
    raise ValueError(f"{name}: group_size is {size!r}; a positive integer is needed")
  weight = need(get, name, "weight")
  if weight.ndim != 2 or weight.dtype != (np.int8 if algorithm.startswith("W8") else np.uint8):
    raise ValueError(f"{name}.weight is {weight.dtype} {list(weight.shape)}, which does not fit {algorithm}")
  codes, spec = _decoded(algorithm, size, weight)
  shape = blocks.tiling(codes.shape, spec).scales
  held = need(get, name, "weight_scale")
  narrow = spec.is_mx or spec.two_level
  if held.size != np.prod(shape, dtype=np.int64) or held.dtype != (np.uint8 if narrow else np.float32):
    raise ValueError(f"{name}.weight_scale is {held.dtype} {list(held.shape)}; {list(shape)} scales of {algorithm} were expected")
  second = scalar(get, name, "weight_scale_2")
  if (spec.two_level or algorithm == "W4A8_AWQ") and second is None:
    raise ValueError(f"{name} has no tensor 'weight_scale_2'")
  low_rank = get("svdquant_lora_a"), get("svdquant_lora_b")
  return Stored(
    QuantizedTensor(codes, held.reshape(shape), second if spec.two_level else None, None, spec, codes.shape),
    second=(QuantSpec(formats.E4M3), second) if algorithm == "W4A8_AWQ" and second is not None else None,
    input_scale=scalar(get, name, "input_scale"),
    pre_quant_scale=get("pre_quant_scale"),
    low_rank=(low_rank[0], low_rank[1]) if low_rank[0] is not None and low_rank[1] is not None else None,
  )


def _decoded(algorithm: str, size: int, weight: np.ndarray) -> tuple[np.ndarray, QuantSpec]:
  if algorithm in ("W8A8_SQ_PER_CHANNEL", "W8A16"):
    return weight, QuantSpec(formats.INT8, axis=(0,))
  if algorithm == "FP8":
    return weight, QuantSpec(formats.E4M3)
  if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
    return weight, QuantSpec(formats.E4M3, axis=(0,))
  if algorithm == "FP8_PB_WO":
    return weight, QuantSpec(formats.E4M3, blocks=((-2, 128), (-1, 128)), pad=True)
  if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
    return packing.unpack_rows(weight), QuantSpec(formats.INT4, blocks=((-1, size),), pad=True)
  if algorithm == "MXFP8":
    return weight, QuantSpec.named("mxfp8_e4m3", pad=True)
  name = "mxfp4" if "MXFP4" in algorithm else "nvfp4"
  codes = packing.unpack_codes(weight, 4, 2 * weight.shape[1])
  return codes, QuantSpec.named(name, blocks=((-1, size),), pad=True)
