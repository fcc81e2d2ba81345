"""The compressed-tensors layout: what transformers and vLLM read. A plan per layer, and the configuration.

Scales of NVFP4 tensors are stored as their reciprocals (`weight_global_scale`, `input_global_scale`); since 1 / fl(1 / s) need not be s,
the exact scale stands in the file's metadata, which clients ignore.

References: github.com/vllm-project/compressed-tensors, release 0.20 (src/compressed_tensors/compressors, .../quantization).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from core import formats
from core.bits import divide
from core.export import packing
from core.export.layout import Planned, divides
from core.export.source import Granularity, Refusal, Stage, Subject, granularity, input_scales
from core.formats import FloatFormat, IntFormat
from core.quantize import QuantizedTensor
from core.spec import QuantSpec
from core.tensor_header import Entry

NAME = "compressed-tensors"
_E4M3, _U8 = "torch.float8_e4m3fn", "torch.uint8"
_MX = {"E4M3": ("mxfp8-quantized", 8), "E2M3": ("mxfp6-pack-quantized", 6), "E2M1": ("mxfp4-pack-quantized", 4)}
WORD_BITS = (2, 4, 8)  # 3, 5, 6 and 7 bits are packed differently by different releases


def reciprocal(scale: np.ndarray) -> np.ndarray:
  """Correctly rounded 1 / scale, [1] float32: how tensor scales are stored."""
  scale = np.asarray(scale, np.float32).reshape(1)
  return np.asarray(divide(np.ones_like(scale), scale), np.float32)


def _args(bits: int, kind: str, strategy: str, *, dynamic: Any = False, symmetric: bool = True, **more: Any) -> dict[str, Any]:
  args = {"num_bits": bits, "type": kind, "symmetric": symmetric, "group_size": None, "strategy": strategy, "dynamic": dynamic}
  return args | {key: value for key, value in more.items() if value is not None}


# -- weights -----------------------------------------------------------------------------------------------------------------------


def plan(subject: Subject) -> Planned:
  """How a layer is written.

  Raises:
    Refusal: the layout, or the clients that read it, cannot express it.
  """
  if subject.scale is not None:
    raise Refusal(
      "it has a pre_quant_scale, for which this layout has no place; fold it before exporting: "
      "algorithm [{'method': 'awq_lite', 'shared': True}, 'fold_pre_quant_scale']; leave layers whose scale cannot be folded (o_proj where "
      "keys are shared by heads) out with 'include': ['*[qkv]_proj', '*mlp*']"
    )
  if subject.low_rank is not None:
    raise Refusal("it has a low-rank branch (SVDQuant)")
  if len(subject.weights) > 1:
    raise Refusal(f"its weight passes {len(subject.weights)} formats in sequence ({_names(subject.weights)})")
  inputs = input_args(subject.inputs)
  weights = _weight(subject, inputs)
  extra, values = _input_tensors(subject.inputs)
  scheme = {"weights": weights.scheme["weights"], "input_activations": inputs, "format": weights.scheme["format"]}

  def make(q: QuantizedTensor) -> dict[str, np.ndarray]:
    return weights.make(q) | values

  return Planned(scheme, weights.entries | extra, make, weights.tensor_scale)


def _names(stages: tuple[Stage, ...]) -> str:
  return ", ".join(stage.config.describe() for stage in stages)


def _weight(subject: Subject, inputs: dict[str, Any] | None) -> Planned:
  spec = subject.spec
  if spec.is_mx:
    return _mx(subject)
  if spec.two_level:
    return _nvfp4(subject)
  if spec.scale_format == formats.UINT8:
    raise Refusal("its scales are quantized themselves")
  if isinstance(spec.element, IntFormat):
    return _integer(subject, inputs)
  if spec.element == formats.E4M3:
    return _float8(subject)
  raise Refusal(f"there is no {spec.element.name} weight with {'float16' if spec.scale_format else 'float32'} scales")


def _strategy(subject: Subject) -> tuple[Granularity, dict[str, Any], tuple[int, ...]]:
  """Granularity, the arguments that name it, and the shape of the stored scale."""
  g, (outputs, columns) = granularity(subject.spec), subject.shape
  if g.kind == "tensor":
    return g, {"strategy": "tensor"}, (1,)
  if g.kind == "channel":
    return g, {"strategy": "channel"}, (outputs, 1)
  if g.kind == "group":
    divides(subject.shape, g.size[0])
    return g, {"strategy": "group", "group_size": g.size[0]}, (outputs, columns // g.size[0])
  if g.kind == "block":
    divides(subject.shape, g.size[1])
    return g, {"strategy": "block", "block_structure": list(g.size)}, (-(-outputs // g.size[0]), columns // g.size[1])
  raise Refusal(f"scales of {subject.weights[0].config.describe()} are shared by no tensor, channel, group or block")


def _integer(subject: Subject, inputs: dict[str, Any] | None) -> Planned:
  spec, element = subject.spec, subject.spec.element
  assert isinstance(element, IntFormat)
  g, named, shape = _strategy(subject)
  if not element.signed:
    raise Refusal(f"its codes are unsigned ({element.name}); clients read signed ones")
  packed = inputs is None or inputs["type"] == "float"
  if packed and element.bits not in WORD_BITS:
    raise Refusal(f"{element.bits}-bit codes are packed differently by different releases; use 2, 4 or 8 bits")
  if spec.zero_point and not (packed and g.kind in ("channel", "group")):
    raise Refusal("asymmetric weights are read only packed (without a quantized input), with a scale per channel or group")
  args = _args(element.bits, "int", **named, symmetric=not spec.zero_point)
  entries = {"weight_scale": Entry("F32", shape)}  # float16 scales as well: clients compute in the type of the scale
  outputs, columns = subject.shape
  if packed:
    entries |= {
      "weight_packed": Entry("I32", (outputs, -(-columns * element.bits // 32))),
      "weight_shape": Entry("I64", (2,)),
    }
    if spec.zero_point:
      entries["weight_zero_point"] = Entry("I32", (-(-outputs * element.bits // 32), shape[1]))
  else:
    entries["weight"] = Entry("I8", subject.shape)

  def make(q: QuantizedTensor) -> dict[str, np.ndarray]:
    made = {"weight_scale": np.asarray(q.scale, np.float32).reshape(shape)}
    if not packed:
      return made | {"weight": q.codes}
    made |= {"weight_packed": packing.pack_words(q.codes, element.bits), "weight_shape": np.asarray(subject.shape, np.int64)}
    if q.zero_point is not None:
      made["weight_zero_point"] = packing.pack_zero_points(np.asarray(q.zero_point).reshape(shape), element.bits)
    return made

  return Planned({"weights": args, "format": "pack-quantized" if packed else "int-quantized"}, entries, make)


def _float8(subject: Subject) -> Planned:
  _, named, shape = _strategy(subject)
  entries = {"weight": Entry("F8_E4M3", subject.shape), "weight_scale": Entry("F32", shape)}

  def make(q: QuantizedTensor) -> dict[str, np.ndarray]:
    return {"weight": q.codes, "weight_scale": np.asarray(q.scale, np.float32).reshape(shape)}

  return Planned({"weights": _args(8, "float", **named), "format": "float-quantized"}, entries, make)


def _mx(subject: Subject) -> Planned:
  spec, (outputs, columns) = subject.spec, subject.shape
  known = _MX.get(spec.element.name) if isinstance(spec.element, FloatFormat) else None
  if known is None or granularity(spec) != Granularity("group", (32,)):
    raise Refusal(f"{subject.weights[0].config.describe()} is none of the MX formats that clients read: E4M3, E2M3 or E2M1 in blocks of 32")
  divides(subject.shape, 32)
  form, bits = known
  weight = Entry("F8_E4M3", subject.shape) if bits == 8 else Entry("U8", (outputs, columns * bits // 8))
  suffix = "weight" if bits == 8 else "weight_packed"

  def make(q: QuantizedTensor) -> dict[str, np.ndarray]:
    return {suffix: q.codes if bits == 8 else packing.pack_codes(q.codes, bits), "weight_scale": q.scale}

  args = _args(bits, "float", "group", group_size=32, scale_dtype=_U8)
  return Planned({"weights": args, "format": form}, {suffix: weight, "weight_scale": Entry("U8", (outputs, columns // 32))}, make)


def _nvfp4(subject: Subject) -> Planned:
  spec, (outputs, columns) = subject.spec, subject.shape
  if spec.element != formats.E2M1 or granularity(spec) != Granularity("group", (16,)):
    raise Refusal(f"{subject.weights[0].config.describe()}: clients read two-level scales only of E2M1 in blocks of 16")
  divides(subject.shape, 16)
  entries = {
    "weight_packed": Entry("U8", (outputs, columns // 2)),
    "weight_scale": Entry("F8_E4M3", (outputs, columns // 16)),
    "weight_global_scale": Entry("F32", (1,)),
  }

  def make(q: QuantizedTensor) -> dict[str, np.ndarray]:
    return {
      "weight_packed": packing.pack_codes(q.codes, 4),
      "weight_scale": q.scale,
      "weight_global_scale": reciprocal(np.asarray(q.tensor_scale)),
    }

  args = _args(4, "float", "tensor_group", group_size=16, scale_dtype=_E4M3)
  return Planned({"weights": args, "format": "nvfp4-pack-quantized"}, entries, make, tensor_scale=True)


# -- inputs ------------------------------------------------------------------------------------------------------------------------


def input_args(stages: tuple[Stage, ...]) -> dict[str, Any] | None:
  """Arguments of a quantized input.

  Raises:
    Refusal: clients have no such activations.
  """
  if not stages:
    return None
  stage = stages[0]
  if len(stages) > 1:
    raise Refusal(f"its input passes {len(stages)} formats in sequence ({_names(stages)})")
  spec = stage.spec
  text = stage.config.describe()
  if spec.zero_point or spec.four_over_six:
    raise Refusal(f"inputs of {text} with {'a zero point' if spec.zero_point else 'four-over-six scales'} are computed by no client")
  g = granularity(spec)
  if spec.two_level or spec.is_mx:
    return _block_input(spec, g, text)
  integer = isinstance(spec.element, IntFormat)
  if not (spec.element == formats.E4M3 or (isinstance(spec.element, IntFormat) and spec.element.signed)) or spec.scale_format is not None:
    raise Refusal(f"inputs of {text} are computed by no client")
  if spec.element_bound not in (spec.element.bound, 127.5):
    raise Refusal(f"inputs of {text} with bound {spec.element_bound:g} are computed by no client")
  kind = {"tensor": "tensor", "channel": "token", "group": "group"}.get(g.kind)
  if kind is None or (kind != "tensor" and not spec.dynamic):
    raise Refusal(f"inputs of {text} are not per tensor, nor dynamic per token or group")
  args = _args(spec.element.bits, "int" if integer else "float", kind, dynamic=spec.dynamic)
  return args | ({"group_size": g.size[0]} if g.size else {})


def _block_input(spec: QuantSpec, g: Granularity, text: str) -> dict[str, Any]:
  if spec.two_level and spec.dynamic and spec.element == formats.E2M1 and g == Granularity("group", (16,)):
    return _args(4, "float", "tensor_group", group_size=16, dynamic="local", scale_dtype=_E4M3)
  if spec.is_mx and isinstance(spec.element, FloatFormat) and spec.element.name in _MX and g == Granularity("group", (32,)):
    return _args(_MX[spec.element.name][1], "float", "group", group_size=32, dynamic=True, scale_dtype=_U8)
  raise Refusal(f"inputs of {text} are computed by no client")


def _input_tensors(stages: tuple[Stage, ...]) -> tuple[dict[str, Entry], dict[str, np.ndarray]]:
  if not stages:
    return {}, {}
  spec = stages[0].spec
  if spec.two_level:
    return {"input_global_scale": Entry("F32", (1,))}, {"input_global_scale": reciprocal(input_scales(stages[0]))}
  if spec.dynamic:
    return {}, {}
  return {"input_scale": Entry("F32", (1,))}, {"input_scale": input_scales(stages[0]).reshape(1)}


def cache_args(stage: Stage) -> tuple[dict[str, Any], str]:
  """(arguments of a key/value cache, its name in summaries).

  Raises:
    Refusal: clients have no such cache.
  """
  spec = stage.spec
  if spec.element != formats.E4M3 or granularity(spec).kind != "tensor" or spec.dynamic or stage.config.bias or stage.config.rotate:
    raise Refusal(f"a key/value cache of {stage.config.describe()}; clients have FP8 with one static scale")
  return _args(8, "float", "tensor"), "FP8"


# -- configuration -----------------------------------------------------------------------------------------------------------------


def config(plans: dict[str, Planned], unquantized: list[str], tables: list[str], cache: dict[str, Any] | None) -> dict[str, Any]:
  """`quantization_config` of config.json.

  Args:
    plans: layer -> plan.
    unquantized: layers that stay float and might be taken for quantized ones.
    tables: quantized embeddings.
    cache: arguments of the key/value cache, or None.
  """
  groups: list[tuple[dict[str, Any], list[str]]] = []
  for name, planned in plans.items():
    members = next((members for scheme, members in groups if scheme == planned.scheme), None)
    if members is None:
      groups.append((planned.scheme, [name]))
    else:
      members.append(name)
  found = {}
  for i, (scheme, members) in enumerate(groups):
    targets = ["Linear"] if len(groups) == 1 and not tables else members
    found[f"group_{i}"] = {"targets": targets, **scheme, "output_activations": None}
  forms = sorted({scheme["format"] for scheme, _ in groups})
  return {
    "quant_method": NAME,
    "format": forms[0] if len(forms) == 1 else "mixed-precision",
    "quantization_status": "compressed",
    "ignore": unquantized,
    "config_groups": found,
    "kv_cache_scheme": cache,
    "global_compression_ratio": None,
  }
