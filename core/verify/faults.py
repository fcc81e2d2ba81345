"""Faults that exporters are known to make, injected into a copy of an exported folder: a check that cannot fail is none."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.export import gguf_layout, packing
from core.export.folder import METADATA
from core.export.layout import Stored
from core.export.read import open_files, read
from core.export.safetensors_file import Writer, to_bits, to_float
from core.formats import IntFormat
from core.tensor_header import Entry

NEUTRAL = {"F8_E4M3": 0x38, "U8": 127}  # the codes of a scale of one


@dataclasses.dataclass
class Content:
  """An exported folder in memory.

  Attributes:
    arrays: tensors, or their bits.
    dtypes: as safetensors names them.
    config: content of config.json.
    beside: content of hf_quant_config.json, or None.
    stored: layers as they are read.
    touched: names of changed tensors.
    rescaled: whether tensor scales were changed, so that the exact ones in the metadata are not theirs any more.
  """

  arrays: dict[str, np.ndarray]
  dtypes: dict[str, str]
  config: dict[str, Any]
  beside: dict[str, Any] | None
  stored: dict[str, Stored]
  touched: set[str] = dataclasses.field(default_factory=set)
  rescaled: bool = False

  def change(self, name: str, array: np.ndarray) -> int:
    """Replace a tensor; 1 where that changes a bit, else 0."""
    old = self.arrays[name]
    array = np.ascontiguousarray(array, old.dtype).reshape(old.shape)
    if array.tobytes() == old.tobytes():
      return 0
    self.arrays[name] = array
    self.touched.add(name)
    return 1

  def named(self, *suffixes: str) -> list[str]:
    """Tensors of quantized layers with one of these suffixes."""
    return [f"{layer}.{suffix}" for layer in self.stored for suffix in suffixes if f"{layer}.{suffix}" in self.arrays]


Inject = Callable[[Content], int]


@dataclasses.dataclass(frozen=True)
class Fault:
  """One fault.

  Attributes:
    name: short.
    text: what is wrong.
    inject: changes the content; returns how much it changed, 0 where it does not apply.
    needs: what an artefact must have for it to apply.
  """

  name: str
  text: str
  inject: Inject
  needs: str


def _nibbles(content: Content) -> int:
  changed = 0
  for layer, stored in content.stored.items():
    if stored.weight.spec.element.bits == 4:
      for name in (f"{layer}.weight_packed", f"{layer}.weight"):
        if name in content.arrays:
          held = np.ascontiguousarray(content.arrays[name])
          data = held.view(np.uint8)
          changed += content.change(name, ((data << 4) | (data >> 4)).view(held.dtype))
  return changed


def _inverted(content: Content) -> int:
  changed = 0
  for layer, stored in content.stored.items():
    if stored.weight.spec.two_level:
      for name in (f"{layer}.weight_global_scale", f"{layer}.weight_scale_2"):
        if name in content.arrays:
          changed += content.change(name, np.float32(1) / content.arrays[name])
  content.rescaled |= changed > 0
  return changed


def _one_tensor_scale(content: Content) -> int:
  for name in content.named("weight_global_scale", "weight_scale_2", "weight_scale"):
    if content.arrays[name].size == 1 and content.dtypes[name] == "F32":
      content.rescaled = True
      return content.change(name, content.arrays[name] * np.float32(1.01))
  return 0


def _dropped(content: Content) -> int:
  changed = 0
  for name in content.named("weight_scale"):
    held = content.arrays[name]
    neutral = 1.0 if content.dtypes[name] == "F32" else NEUTRAL[content.dtypes[name]]
    changed += content.change(name, np.full(held.shape, neutral, held.dtype))
  return changed


def _transposed(content: Content) -> int:
  changed = 0
  for name in content.named("weight_scale"):
    held = content.arrays[name]
    if held.ndim == 2 and min(held.shape) > 1:
      changed += content.change(name, np.ascontiguousarray(held.T).reshape(held.shape))
  return changed


def _one_scale(content: Content) -> int:
  for name in content.named("weight_scale"):
    held = content.arrays[name].copy()
    if held.size > 1:
      flat = held.reshape(-1)
      flat[0] = np.nextafter(flat[0], np.float32(np.inf)) if content.dtypes[name] == "F32" else flat[0] - 1 if flat[0] > 1 else flat[0] + 1
      return content.change(name, held)
  return 0


def _shifted(content: Content) -> int:
  changed = 0
  for layer, stored in content.stored.items():
    element = stored.weight.spec.element
    if isinstance(element, IntFormat):
      codes = np.asarray(stored.weight.codes).astype(np.int32)
      if stored.weight.zero_point is not None:
        points = np.asarray(stored.weight.zero_point)
        moved = np.where(points < element.max_code, points + 1, points - 1)
        name = f"{layer}.weight_zero_point"
        changed += content.change(name, packing.pack_zero_points(moved.reshape(codes.shape[0], -1), element.bits))
        continue
      moved = np.minimum(codes + 1, element.max_code).astype(np.int8)
      if f"{layer}.weight_packed" in content.arrays:
        changed += content.change(f"{layer}.weight_packed", packing.pack_words(moved, element.bits))
      elif f"{layer}.weight" in content.arrays:
        packed = content.dtypes[f"{layer}.weight"] == "U8"
        changed += content.change(f"{layer}.weight", packing.pack_rows(moved) if packed else moved)
  return changed


def _input_scale(content: Content) -> int:
  names = [name for name in content.named("input_scale") if not _two_level_input(content, name)]
  return sum(content.change(name, content.arrays[name] * np.float32(127 / 127.5)) for name in names)


def _two_level_input(content: Content, name: str) -> bool:
  """ModelOpt calls a tensor scale of inputs input_scale as well."""
  return content.beside is not None and content.stored[name.removesuffix(".input_scale")].weight.spec.two_level


def _input_tensor_scale(content: Content) -> int:
  names = content.named("input_global_scale") + [name for name in content.named("input_scale") if _two_level_input(content, name)]
  return sum(content.change(name, content.arrays[name] * np.float32(2)) for name in names)


def _groups(content: Content) -> list[dict[str, Any]]:
  settings = content.config.get("quantization_config", {})
  return list(settings.get("config_groups", {}).values()) if content.beside is None else []


def _float_inputs(content: Content) -> int:
  if content.beside is not None:
    return _weights_only_algorithm(content.beside["quantization"])
  held = [group for group in _groups(content) if group.get("input_activations")]
  for group in held:
    group["input_activations"] = None
  return len(held)


def _weights_only_algorithm(details: dict[str, Any]) -> int:
  """ModelOpt's layout names weights and inputs in one word."""
  found = 0
  for scheme in (details, *(details.get("quantized_layers") or {}).values()):
    other = {"NVFP4": "W4A16_NVFP4", "W8A8_SQ_PER_CHANNEL": "W8A16", "W4A8_AWQ": "W4A16_AWQ"}.get(str(scheme.get("quant_algo")))
    if other is not None:
      scheme["quant_algo"] = other
      found += 1
  return found


def _pre_quant_scale(content: Content) -> int:
  return sum(content.change(name, np.ones_like(content.arrays[name])) for name in content.named("pre_quant_scale"))


def _scale_type(content: Content) -> int:
  held = [g["input_activations"] for g in _groups(content) if (g.get("input_activations") or {}).get("strategy") == "tensor_group"]
  return sum(args.pop("scale_dtype", None) is not None for args in held)


def _head(content: Content) -> int:
  if content.beside is not None:
    listed = content.beside.get("quantization", {})
    count = len(listed.get("exclude_modules") or ())
    listed["exclude_modules"] = []
    return count
  settings = content.config["quantization_config"]
  count = len(settings.get("ignore") or ()) if any("Linear" in group.get("targets", ()) for group in _groups(content)) else 0
  settings["ignore"] = [] if count else settings.get("ignore")
  return count


def _norm(content: Content) -> int:
  for name in sorted(content.arrays):
    if "norm" in name.lower() and name.endswith(".weight") and content.dtypes[name] in ("F32", "F16", "BF16"):
      kind = content.dtypes[name]
      values = to_float(content.arrays[name], kind) * np.float32(1.01)
      return content.change(name, to_bits(values, kind))
  return 0


_SCALED = "scales with several rows and columns"
FAULTS: tuple[Fault, ...] = (
  Fault("nibble order", "the two codes of every byte swapped", _nibbles, "4-bit codes"),
  Fault("inverted tensor scale", "the tensor scale in place of its reciprocal, or the other way round", _inverted, "two-level scales"),
  Fault("one tensor scale", "one layer's tensor scale 1 % too large, as where siblings are merged", _one_tensor_scale, "a tensor scale"),
  Fault("dropped scales", "all weight scales one", _dropped, "weight scales"),
  Fault("transposed scales", "scales in column order", _transposed, _SCALED),
  Fault("one scale", "one of all weight scales a step off", _one_scale, "several weight scales"),
  Fault("shifted codes", "zero point, or the offset of symmetric codes, off by one", _shifted, "integer codes"),
  Fault("input scale", "static input scales times 127 / 127.5", _input_scale, "static input scales of one level"),
  Fault("input tensor scale", "tensor scales of inputs doubled", _input_tensor_scale, "two-level inputs"),
  Fault(
    "float inputs", "the configuration does not say that inputs are quantized", _float_inputs, "a configuration with input_activations"
  ),
  Fault("scale type", "the type of inputs' block scales left out of the configuration", _scale_type, "a configuration with scale_dtype"),
  Fault("head not ignored", "the list of unquantized layers is empty", _head, "a list of unquantized layers beside the target Linear"),
  Fault("norm", "one normalization weight 1 % too large", _norm, "an unquantized normalization weight"),
)


def open_content(folder: Path) -> Content:
  """The folder in memory.

  Raises:
    ValueError: it is damaged, or a GGUF file.
  """
  artefact = read(folder)
  if artefact.layout == gguf_layout.NAME:
    raise ValueError(f"{folder} holds a GGUF file; controls inject their faults into safetensors folders and ONNX files only")
  files = open_files(folder)
  arrays = {name: file.read(name) for file in files for name in file.entries}
  dtypes = {name: file.entries[name].dtype for file in files for name in file.entries}
  beside = folder / "hf_quant_config.json"
  stored = {layer: artefact.stored(layer) for layer in artefact.layers}
  return Content(arrays, dtypes, dict(artefact.config), json.loads(beside.read_text("utf-8")) if beside.exists() else None, stored)


def write_faulty(folder: Path, content: Content, fault: Fault, target: Path) -> bool:
  """Write a copy of a folder with one fault.

  Args:
    folder: the artefact.
    content: `open_content` of it; it is not changed.
    fault: the fault.
    target: folder to make.

  Returns:
    Whether the fault applies; if not, nothing is written.
  """
  made = dataclasses.replace(
    content, arrays=dict(content.arrays), config=copy.deepcopy(content.config), beside=copy.deepcopy(content.beside), touched=set()
  )
  if not fault.inject(made):
    return False
  target.mkdir(parents=True)
  weights = {file.path.name: file for file in open_files(folder)}
  for path in folder.iterdir():
    if path.is_file() and path.name not in weights:
      shutil.copyfile(path, target / path.name)
  for name, file in weights.items():
    if made.touched & set(file.entries) or made.rescaled:
      metadata = {key: value for key, value in file.metadata.items() if not (made.rescaled and key == METADATA)}
      with Writer(target / name, {key: Entry(entry.dtype, entry.shape) for key, entry in file.entries.items()}, metadata) as writer:
        for key in file.entries:
          writer.write(key, made.arrays[key])
    else:
      shutil.copyfile(file.path, target / name)
  (target / "config.json").write_text(json.dumps(made.config, indent=2), "utf-8")
  if made.beside is not None:
    (target / "hf_quant_config.json").write_text(json.dumps(made.beside, indent=2), "utf-8")
  return True
