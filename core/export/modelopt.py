"""The unified layout of ModelOpt (`hf_quant_config.json`): what TensorRT-LLM, vLLM and SGLang read. Plan and configuration.

Where the peer's own export computes other numbers than its simulation (weights rounded in bfloat16, sibling scales merged on the way out),
this one writes what the model computes with.

References: nvidia-modelopt 0.47, modelopt/torch/export (quant_utils.py, unified_export_hf.py, convert_hf_config.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import core
from core import formats
from core.export import packing
from core.export.compressed_tensors import cache_args as _fp8_cache
from core.export.layout import Planned, divides
from core.export.source import Granularity, Refusal, Stage, Subject, granularity, input_scales
from core.formats import Format
from core.quantize import QuantizedTensor
from core.spec import QuantSpec
from core.tensor_header import Entry

NAME = "modelopt"
GROUPED = ("W4A16_AWQ", "W4A8_AWQ", "NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP8", "MXFP4")
SCALED = ("W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ", "NVFP4_SVD")


@dataclasses.dataclass(frozen=True)
class _Kind:
  """Format and granularity of one quantizer: the words that algorithm names are made of."""

  text: str
  size: int = 0


def _kind(spec: QuantSpec) -> _Kind:
  """ "int8", "int4", "fp8", "mxfp8", "mxfp4", "nvfp4" with their granularity; "" for anything else."""
  g = granularity(spec)
  size = g.size[-1] if g.size else 0
  if spec.zero_point or (spec.scale_format is not None and not (spec.is_mx or spec.two_level)):
    return _Kind("")
  family = _family(spec)
  if spec.is_mx or spec.two_level:
    return _Kind(family, size) if g.kind == "group" and family else _Kind("")
  word = {"channel": "token" if spec.dynamic else "channel"}.get(g.kind, g.kind)
  return _Kind(f"{family} {word}{' dynamic' if spec.dynamic and word != 'token' else ''}", size) if family else _Kind("")


def _family(spec: QuantSpec) -> str:
  element: Format = spec.element
  if spec.two_level:
    return "nvfp4" if element == formats.E2M1 else ""
  if spec.is_mx:
    return {"E4M3": "mxfp8", "E2M1": "mxfp4"}.get(element.name, "")
  if isinstance(element, formats.IntFormat):
    return f"int{element.bits}" if element.signed and element.bits in (4, 8) else ""
  return "fp8" if element == formats.E4M3 else ""


# (weight, input) -> quant_algo; block sizes are checked beside it
_ALGORITHMS: dict[tuple[str, str], str] = {
  ("int8 channel", "int8 tensor"): "W8A8_SQ_PER_CHANNEL",
  ("int8 channel", ""): "W8A16",
  ("int4 group", ""): "W4A16_AWQ",
  ("int4 group, fp8 tensor", "fp8 tensor"): "W4A8_AWQ",
  ("fp8 tensor", "fp8 tensor"): "FP8",
  ("fp8 channel", "fp8 token"): "FP8_PER_CHANNEL_PER_TOKEN",
  ("fp8 block", ""): "FP8_PB_WO",
  ("nvfp4", "nvfp4"): "NVFP4",
  ("nvfp4", ""): "W4A16_NVFP4",
  ("nvfp4", "fp8 tensor"): "W4A8_NVFP4_FP8",
  ("mxfp4", "fp8 tensor"): "W4A8_MXFP4_FP8",
  ("mxfp8", "mxfp8"): "MXFP8",
  ("mxfp4", "mxfp4"): "MXFP4",
  ("mxfp4", ""): "MXFP4",
}


def plan(subject: Subject) -> Planned:
  """How a layer is written.

  Raises:
    Refusal: the layout has no name for it.
  """
  if subject.table:
    raise Refusal("it is an embedding, which this layout keeps in float")
  algorithm, size = _algorithm(subject)
  scheme: dict[str, Any] = {"quant_algo": algorithm}
  if algorithm in GROUPED:
    divides(subject.shape, size)
    scheme["group_size"] = size
  if algorithm in SCALED:
    scheme |= {"has_zero_point": False, "pre_quant_scale": subject.scale is not None}
  elif subject.scale is not None:
    scheme["pre_quant_scale"] = True
  entries, make = WRITERS[algorithm](subject)
  extra: dict[str, np.ndarray] = {}
  if subject.inputs and (subject.inputs[0].spec.two_level or not subject.inputs[0].spec.dynamic):
    extra["input_scale"] = input_scales(subject.inputs[0])
  if subject.scale is not None:
    extra["pre_quant_scale"] = np.ascontiguousarray(np.broadcast_to(subject.scale, (subject.shape[-1],)), np.float32)
  if subject.low_rank is not None:
    a, b = (np.ascontiguousarray(part, np.float32) for part in subject.low_rank)
    extra |= {"svdquant_lora_a": a, "svdquant_lora_b": b}
    scheme["lora_rank"] = int(a.shape[0])
  entries = entries | {key: Entry("F32", value.shape) for key, value in extra.items()}
  return Planned(scheme, entries, lambda q: make(q) | extra)


def _algorithm(subject: Subject) -> tuple[str, int]:
  kinds = [_kind(stage.spec) for stage in subject.weights]
  inputs = [_kind(stage.spec) for stage in subject.inputs]
  described = ", ".join(stage.config.describe() for stage in subject.weights) + " weights"
  described += f" and {', '.join(stage.config.describe() for stage in subject.inputs)} inputs" if subject.inputs else ""
  if not all(kind.text for kind in (*kinds, *inputs)) or len(inputs) > 1:
    raise Refusal(f"{described} have no name in this layout")
  size = kinds[0].size
  algorithm = _ALGORITHMS.get((", ".join(kind.text for kind in kinds), inputs[0].text if inputs else ""))
  wanted = {"NVFP4": (16,), "W4A16_NVFP4": (16,), "W4A8_NVFP4_FP8": (16, 32)}.get(algorithm or "")
  wanted = (32,) if algorithm and "MXFP" in algorithm else wanted
  if algorithm is None or (wanted and size not in wanted):
    raise Refusal(f"{described} have no name in this layout")
  if subject.inputs and kinds[0].text == inputs[0].text and inputs[0].size != size:
    raise Refusal(f"{described}: blocks of the input and of the weight differ")
  for stage in subject.inputs:
    if stage.spec.four_over_six or stage.spec.element_bound != stage.spec.element.bound:
      raise Refusal(f"{described}: no client computes inputs with {'four-over-six scales' if stage.spec.four_over_six else 'that bound'}")
  if algorithm == "NVFP4" and subject.low_rank is not None:
    return "NVFP4_SVD", size
  if subject.low_rank is not None:
    raise Refusal(f"{described} with a low-rank branch (SVDQuant) have no name in this layout; NVFP4 has one")
  return ("NVFP4_AWQ" if algorithm == "NVFP4" and subject.scale is not None else algorithm), size


Made = tuple[dict[str, Entry], Callable[[QuantizedTensor], dict[str, np.ndarray]]]


def _plain(dtype: str, per_channel: bool) -> Callable[[Subject], Made]:
  def write(subject: Subject) -> Made:
    shape = (subject.shape[0],) if per_channel else ()
    entries = {"weight": Entry(dtype, subject.shape), "weight_scale": Entry("F32", shape)}
    return entries, lambda q: {"weight": q.codes, "weight_scale": np.asarray(q.scale, np.float32).reshape(shape)}

  return write


def _blocks_2d(subject: Subject) -> Made:
  g, (outputs, columns) = granularity(subject.spec), subject.shape
  divides(subject.shape, g.size[1])
  shape = (-(-outputs // g.size[0]), columns // g.size[1])
  if g.size != (128, 128):
    raise Refusal(f"blocks of {g.size[0]}x{g.size[1]}; clients of FP8_PB_WO expect 128x128")
  entries = {"weight": Entry("F8_E4M3", subject.shape), "weight_scale": Entry("F32", shape)}
  return entries, lambda q: {"weight": q.codes, "weight_scale": np.asarray(q.scale, np.float32)}


def _int4(subject: Subject) -> Made:
  outputs, columns = subject.shape
  if outputs % 2:
    raise Refusal(f"this layout packs two rows in one, and the weight has {outputs}, an odd number")
  size = granularity(subject.spec).size[0]
  entries = {"weight": Entry("U8", (outputs // 2, columns)), "weight_scale": Entry("F32", (outputs, columns // size))}
  second: dict[str, np.ndarray] = {}
  if len(subject.weights) > 1:
    second["weight_scale_2"] = _static_scale(subject.weights[1])
    entries["weight_scale_2"] = Entry("F32", ())

  def make(q: QuantizedTensor) -> dict[str, np.ndarray]:
    return {"weight": packing.pack_rows(q.codes), "weight_scale": np.asarray(q.scale, np.float32)} | second

  return entries, make


def _static_scale(stage: Stage) -> np.ndarray:
  if stage.amax is None:
    raise Refusal(f"the second format of its weight ({stage.config.describe()}) was not calibrated")
  return np.asarray(core.scales(np.asarray(stage.amax, np.float32), stage.spec).scale, np.float32).reshape(())


def _fp4(subject: Subject) -> Made:
  outputs, columns = subject.shape
  size = granularity(subject.spec).size[0]
  two = subject.spec.two_level
  entries = {"weight": Entry("U8", (outputs, columns // 2)), "weight_scale": Entry("F8_E4M3" if two else "U8", (outputs, columns // size))}
  if two:
    entries["weight_scale_2"] = Entry("F32", ())

  def make(q: QuantizedTensor) -> dict[str, np.ndarray]:
    made = {"weight": packing.pack_codes(q.codes, 4), "weight_scale": q.scale}
    return made | ({"weight_scale_2": np.asarray(q.tensor_scale, np.float32).reshape(())} if two else {})

  return entries, make


def _mxfp8(subject: Subject) -> Made:
  outputs, columns = subject.shape
  entries = {"weight": Entry("F8_E4M3", subject.shape), "weight_scale": Entry("U8", (outputs, columns // 32))}
  return entries, lambda q: {"weight": q.codes, "weight_scale": q.scale}


WRITERS: dict[str, Callable[[Subject], Made]] = {
  "W8A8_SQ_PER_CHANNEL": _plain("I8", per_channel=True),
  "W8A16": _plain("I8", per_channel=True),
  "FP8": _plain("F8_E4M3", per_channel=False),
  "FP8_PER_CHANNEL_PER_TOKEN": _plain("F8_E4M3", per_channel=True),
  "FP8_PB_WO": _blocks_2d,
  "W4A16_AWQ": _int4,
  "W4A8_AWQ": _int4,
  "MXFP8": _mxfp8,
} | dict.fromkeys(("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP4"), _fp4)


def cache_args(stage: Stage) -> tuple[dict[str, Any], str]:
  """(arguments of a key/value cache, `kv_cache_quant_algo`).

  Raises:
    Refusal: clients have no such cache.
  """
  spec = stage.spec
  fp4 = spec.two_level and spec.element == formats.E2M1 and granularity(spec) == Granularity("group", (16,))
  if fp4 and stage.config.rotate is None and stage.config.bias is None:
    return {"num_bits": 4, "type": "float", "dynamic": False}, "NVFP4"
  return _fp8_cache(stage)


# -- configuration -----------------------------------------------------------------------------------------------------------------


def config(plans: dict[str, Planned], unquantized: list[str], cache: str | None) -> dict[str, Any]:
  """The content of hf_quant_config.json.

  Args:
    plans: layer -> plan.
    unquantized: layers that stay float.
    cache: `kv_cache_quant_algo`, or None.
  """
  schemes = {name: planned.scheme for name, planned in plans.items()}
  details: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": cache}
  several = any(scheme != next(iter(schemes.values())) for scheme in schemes.values())
  if several:
    details |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": schemes, "exclude_modules": unquantized}
  else:
    details |= next(iter(schemes.values()), {})
    details["exclude_modules"] = unquantized
  return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": details}


def hf_config(settings: dict[str, Any]) -> dict[str, Any]:
  """`quantization_config` of config.json that goes with it."""
  details = settings["quantization"]
  kept = {key: value for key, value in details.items() if key not in ("exclude_modules", "kv_cache_quant_algo")}
  cache = details["kv_cache_quant_algo"]
  if cache is not None:
    kept["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache
  groups = _groups(details)
  kept |= {"config_groups": groups} if groups else {}
  return kept | {"ignore": details["exclude_modules"], "producer": settings["producer"], "quant_method": NAME}


_PARTS: dict[str, tuple[tuple[int, bool], tuple[int, bool] | None]] = {  # (bits, dynamic) of weights and of inputs
  "FP8": ((8, False), (8, False)),
  "NVFP4": ((4, False), (4, False)),
  "NVFP4_SVD": ((4, False), (4, False)),
  "W4A16_NVFP4": ((4, False), None),
  "MXFP8": ((8, False), (8, True)),
  "FP8_PER_CHANNEL_PER_TOKEN": ((8, False), (8, True)),
}


def _groups(details: dict[str, Any]) -> dict[str, Any]:
  if details["quant_algo"] != "MIXED_PRECISION":
    group = _group(details)
    return {"group_0": group | {"targets": ["Linear"]}} if group else {}
  found: list[tuple[dict[str, Any], list[str]]] = []
  for name, scheme in details["quantized_layers"].items():
    members = next((members for other, members in found if other == scheme), None)
    if members is None:
      found.append((scheme, [name]))
    else:
      members.append(name)
  return {
    f"group_{i}": (_group(scheme) or {"quant_algo": scheme["quant_algo"]}) | {"targets": members}
    for i, (scheme, members) in enumerate(found)
  }


def _group(scheme: dict[str, Any]) -> dict[str, Any]:
  parts = _PARTS.get(scheme["quant_algo"])
  if parts is None:
    return {}
  size = {"group_size": scheme["group_size"]} if "group_size" in scheme else {}
  weight, inputs = ({"dynamic": part[1], "num_bits": part[0], "type": "float"} | size if part else None for part in parts)
  return {"weights": weight} | ({"input_activations": inputs} if inputs else {})
