"""The compressed-tensors layout, read: schemes of layers, their codes and scales. Nothing in a file is trusted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from core import blocks, formats
from core.export import packing
from core.export.compressed_tensors import reciprocal
from core.export.layout import Get, Stored, expect_keys, need, scalar
from core.formats import IntFormat
from core.quantize import QuantizedTensor
from core.spec import QuantSpec


def scheme_of(settings: dict[str, Any], name: str) -> dict[str, Any]:
  """The scheme of a layer: by its name, else by a pattern, else by its class, as clients look it up.

  Raises:
    ValueError: no group has it, or the layer is to be ignored.
  """
  ignored = settings.get("ignore") or []
  groups = expect_keys("quantization_config", settings, ("config_groups", "format"))["config_groups"]
  if not isinstance(groups, dict) or not isinstance(ignored, list):
    raise ValueError("quantization_config: config_groups must be an object and ignore a list")
  if any(_hits(target, name) for target in ignored):
    raise ValueError(f"{name} has quantized tensors and is on the list of ignored layers")
  by_rank: list[dict[str, Any]] = []
  for rank in (0, 1, 2):
    for group in groups.values():
      targets = expect_keys("a config group", group, ("targets", "weights"))["targets"]
      if isinstance(targets, list) and any(_rank(target, name) == rank for target in targets):
        by_rank.append(group)
  if not by_rank:
    raise ValueError(f"{name} has quantized tensors and belongs to no config group")
  return {"format": settings["format"]} | {key: value for key, value in by_rank[0].items() if value is not None}


def _hits(target: Any, name: str) -> bool:
  if not isinstance(target, str):
    raise ValueError(f"target {target!r} of quantization_config is no string")
  if not target.startswith("re:"):
    return target == name
  try:
    return re.match(target[3:], name) is not None
  except re.error as error:
    raise ValueError(f"target {target!r} is no pattern ({error})") from error


def _rank(target: Any, name: str) -> int:
  if _hits(target, name):
    return 1 if target.startswith("re:") else 0
  return 2 if target in ("Linear", "Embedding") else 3


def weight_spec(scheme: dict[str, Any], name: str) -> QuantSpec:
  """The specification that decodes a layer.

  Raises:
    ValueError: the scheme is not understood.
  """
  args = expect_keys(f"weights of {name}", scheme.get("weights"), ("num_bits", "type", "strategy"))
  form, bits, size = scheme["format"], args["num_bits"], args.get("group_size")
  if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"):
    key = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "mxfp6-pack-quantized": "mxfp6_e2m3"}.get(form, "mxfp8_e4m3")
    spec = QuantSpec.named(key)
    if spec.blocks != ((-1, size),):
      raise ValueError(f"{name}: {form} with group_size {size!r}; {dict(spec.blocks or ())[-1]} is needed")
    return spec
  if args["type"] == "int" and form in ("pack-quantized", "int-quantized") and type(bits) is int and 2 <= bits <= 8:
    element: Any = formats.int_format(bits)
  elif args["type"] == "float" and bits == 8 and form in ("float-quantized", "naive-quantized"):
    element = formats.E4M3
  else:
    raise ValueError(f"{name}: {bits!r} bits of type {args['type']!r} in format {form!r} are not understood")
  return QuantSpec(element, **_granular(args, name), zero_point=args.get("symmetric") is False, pad=True)


def _granular(args: Any, name: str) -> dict[str, Any]:
  strategy, size, block = args["strategy"], args.get("group_size"), args.get("block_structure")
  if strategy == "tensor":
    return {}
  if strategy == "channel":
    return {"axis": (0,)}
  if strategy == "group" and type(size) is int and size > 0:
    return {"blocks": ((-1, size),)}
  if strategy == "block" and isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
    return {"blocks": ((-2, block[0]), (-1, block[1]))}
  raise ValueError(f"{name}: strategy {strategy!r} with group_size {size!r} and block_structure {block!r} is not understood")


def read(scheme: dict[str, Any], name: str, get: Get, exact: dict[str, np.ndarray]) -> Stored:
  """A layer from its tensors.

  Args:
    scheme: `scheme_of`.
    name: of the layer.
    get: its tensors.
    exact: tensor scales from the files' metadata, by layer.

  Raises:
    ValueError: a tensor is missing, has another shape, or contradicts another one.
  """
  spec = weight_spec(scheme, name)
  codes, zero_point = _codes(spec, scheme["format"], name, get)
  shape = codes.shape
  tiling = blocks.tiling(shape, spec)
  held = need(get, name, "weight_scale")
  if held.size != np.prod(tiling.scales, dtype=np.int64):
    raise ValueError(f"{name}.weight_scale has shape {list(held.shape)}; {list(tiling.scales)} was expected")
  scale = held.reshape(tiling.scales)
  narrow = spec.is_mx or spec.two_level
  if (held.dtype == np.uint8) != narrow:
    raise ValueError(f"{name}.weight_scale is {held.dtype}; {'8-bit codes' if narrow else 'floating point scales'} were expected")
  scale = scale if narrow else scale.astype(np.float32)
  tensor_scale = _tensor_scale(name, get, exact) if spec.two_level else None
  if zero_point is not None:
    zero_point = zero_point.reshape(tiling.scales)
  inputs = scalar(get, name, "input_scale")
  if inputs is None:
    stored = scalar(get, name, "input_global_scale")
    inputs = None if stored is None else reciprocal(stored).reshape(())
  return Stored(QuantizedTensor(codes, scale, tensor_scale, zero_point, spec, shape), input_scale=inputs)


def _codes(spec: QuantSpec, form: str, name: str, get: Get) -> tuple[np.ndarray, np.ndarray | None]:
  bits = spec.element.bits
  if form == "pack-quantized":
    shape = need(get, name, "weight_shape", (2,))
    packed = need(get, name, "weight_packed")
    outputs, columns = (int(n) for n in shape)
    if packed.dtype != np.int32 or packed.ndim != 2 or packed.shape[0] != outputs or packed.shape[1] != -(-columns * bits // 32):
      raise ValueError(
        f"{name}.weight_packed is {packed.dtype} {list(packed.shape)}, which does not hold {[outputs, columns]} codes of {bits} bits"
      )
    codes = packing.unpack_words(packed, bits, columns)
    if not spec.zero_point:
      return codes, None
    points = need(get, name, "weight_zero_point")
    if points.dtype != np.int32 or points.ndim != 2:
      raise ValueError(f"{name}.weight_zero_point is {points.dtype} {list(points.shape)}; int32 words of two axes were expected")
    return codes, packing.unpack_zero_points(points, bits, outputs)
  plain = form in ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
  held = need(get, name, "weight" if plain else "weight_packed")
  wanted = np.int8 if isinstance(spec.element, IntFormat) else np.uint8
  if held.ndim != 2 or held.dtype != wanted:
    raise ValueError(f"{name}: the weight is {held.dtype} {list(held.shape)}; two axes of {np.dtype(wanted)} were expected")
  return (held, None) if plain else (packing.unpack_codes(held, bits, held.shape[1] * 8 // bits), None)


def _tensor_scale(name: str, get: Get, exact: dict[str, np.ndarray]) -> np.ndarray:
  stored = scalar(get, name, "weight_global_scale")
  if stored is None:
    raise ValueError(f"{name} has no tensor 'weight_global_scale'")
  known = exact.get(name)
  if known is None:
    return reciprocal(stored).reshape(())
  if reciprocal(known).tobytes() != stored.tobytes():
    raise ValueError(
      f"{name}.weight_global_scale is {float(stored)!r}; the reciprocal of the scale in the metadata, {float(known)!r}, was expected"
    )
  return known
