"""File to file: the weights of a safetensors folder quantized tensor by tensor, without building the model.

Everything that needs no data: weights in any format that a layout has, inputs whose scales are taken from each input. One tensor and its
codes are in memory, however large the model. What comes out is what `quantize(model, config)` and `export` would have written; siblings
share their tensor scales as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import core
from core.config import QuantConfig, Resolved, check_effect, group, normalize
from core.export.folder import write
from core.export.read import open_files
from core.export.safetensors_file import to_bits, to_float
from core.export.source import Stage, few
from core.formats import FloatFormat
from core.quantize import QuantizedTensor

FLOATS = ("F64", "F32", "F16", "BF16")
_TABLES = ("embed", "wte", "wpe")  # what module names of embeddings hold; a file does not tell them from linear layers


class FolderSource:
  """A folder of safetensors under a quantization config, as `core.export.Source`.

  Args:
    folder: Hugging Face folder of a float model.
    config: quantization config; its algorithm must be "max" or None.
    group_rules: siblings that share tensor-level scales; None is the default list.

  Raises:
    ValueError: the config needs data, or quantizes nothing; the folder is quantized already, or damaged.
  """

  def __init__(self, folder: str | Path, config: Mapping[str, Any], group_rules: Iterable[str] | None = None) -> None:
    self.folder = Path(folder)
    files = open_files(self.folder)
    self._files = {name: file for file in files for name in file.entries}
    coded = [name for name, file in self._files.items() if file.entries[name].dtype.startswith("F8") or name.endswith("weight_scale")]
    if coded:
      raise ValueError(f"{folder} is quantized already ({few(coded)}); start from the float model")
    names = sorted(n for n, f in self._files.items() if f.entries[n].dtype in FLOATS)
    self._shapes = {name: self._files[name].entries[name].shape for name in names}
    self._layers = [n.removesuffix(".weight") for n in names if n.endswith(".weight") and len(self._shapes[n]) == 2]
    self._resolved = _resolve(normalize(config), {layer: self.is_table(layer) for layer in self._layers})
    self._amax: dict[str, list[Stage]] = {}
    self._amax |= _calibrate(self, group_rules)

  def weighted(self) -> list[str]:
    return list(self._layers)

  def weight_stages(self, name: str) -> tuple[Stage, ...]:
    state = self._resolved[f"{name}.weight_quantizer"]
    stages = self._amax.get(name)
    return tuple(stages) if stages is not None else tuple(Stage(config) for config in state.configs) if state.enable else ()

  def activation_stages(self) -> dict[str, tuple[Stage, ...]]:
    found = {name: state for name, state in self._resolved.items() if name.endswith("input_quantizer") and state.enable}
    return {name: tuple(_input(config.constant_amax, config) for config in state.configs) for name, state in found.items()}

  def folded(self) -> list[str]:
    return []

  def is_table(self, name: str) -> bool:
    return any(word in name.rpartition(".")[2] for word in _TABLES)

  def is_linear(self, name: str) -> bool:
    return not self.is_table(name)

  def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
    return dict(self._shapes)

  def parameter_types(self) -> dict[str, str]:
    return {name: self._files[name].entries[name].dtype for name in self._shapes}

  def parameter(self, name: str) -> np.ndarray | None:
    return self.tensor(name) if name in self._shapes else None

  def tensor(self, name: str) -> np.ndarray:
    file = self._files[name]
    return to_float(file.read(name), file.entries[name].dtype)

  def stored(self, name: str) -> QuantizedTensor | None:
    return None

  def pre_quant_scale(self, name: str) -> np.ndarray | None:
    return None

  def low_rank(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    return None


def _input(constant: float | None, config: Any) -> Stage:
  return Stage(config, None if constant is None else np.asarray(constant, np.float32))


def _resolve(plan: QuantConfig, layers: Mapping[str, bool]) -> dict[str, Resolved]:
  """What the rules make of every quantizer.

  Raises:
    ValueError: something needs data.
  """
  methods = [step.method for step in plan.algorithm if step.method not in (None, "max")]
  if methods:
    raise ValueError(f"the algorithm {', '.join(map(str, methods))} needs the model; without it only 'max' and None can be done")
  names = {}
  for layer, table in layers.items():
    classes = ("nn.Embedding",) if table else ("nn.Linear",)
    names[f"{layer}.weight_quantizer"] = classes
    if not table:
      names[f"{layer}.input_quantizer"] = classes
  resolved = check_effect(plan.entries, names, stacklevel=5)
  needy = [n for n, s in resolved.items() if s.enable and n.endswith("input_quantizer") and any(c.needs_calibration for c in s.configs)]
  if needy:
    raise ValueError(
      f"the inputs {few(needy)} have static scales, which need data; switch them off, make them dynamic, or quantize the model itself"
    )
  return resolved


def _calibrate(source: FolderSource, rules: Iterable[str] | None) -> dict[str, list[Stage]]:
  """amax of what siblings share, and of sequences; everything else is taken from the weight when it is written."""
  found: dict[str, list[Stage]] = {}
  enabled = [layer for layer in source.weighted() if source._resolved[f"{layer}.weight_quantizer"].enable]
  for layer in enabled:
    stages = source.weight_stages(layer)
    if len(stages) > 1 or any(map(_shares, stages)):
      found[layer] = _measured(source, layer, stages)
  for members in group(source.weighted(), rules):
    _merge([found[name] for name in members if name in found])
  return found


def _shares(stage: Stage) -> bool:
  spec = stage.spec
  return spec.two_level or (spec.axis is None and spec.blocks is None and isinstance(spec.element, FloatFormat))


def _measured(source: FolderSource, layer: str, stages: tuple[Stage, ...]) -> list[Stage]:
  weight = source.tensor(f"{layer}.weight")
  like = source.parameter_types()[f"{layer}.weight"]
  done = []
  for stage in stages:
    amax = core.amax(weight, stage.spec)
    tensor = core.tensor_amax(weight) if stage.spec.two_level and not stage.spec.dynamic else None
    done.append(Stage(stage.config, amax, tensor))
    if len(stages) > 1:
      weight = _rounded(core.fake_quantize(weight, stage.spec, amax, tensor_amax=tensor), like)
  return done


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
  """Values in the model's type, as its quantizer returns them."""
  limit = 65504.0 if dtype == "F16" else np.inf
  return to_float(to_bits(np.clip(values, -limit, limit), dtype), dtype)


def _merge(members: list[list[Stage]]) -> None:
  """The largest tensor-level amax for all members of one format."""
  for place in range(max(map(len, members), default=0)):
    by_spec: dict[Any, list[list[Stage]]] = {}
    for stages in members:
      if place < len(stages) and _shares(stages[place]):
        by_spec.setdefault(stages[place].spec, []).append(stages)
    for same in by_spec.values():
      static = same[0][place].spec.two_level and not same[0][place].spec.dynamic
      values = [stages[place].tensor_amax if static else stages[place].amax for stages in same]
      largest = np.max(np.stack([np.asarray(value, np.float32) for value in values]), axis=0)
      for stages in same:
        one = stages[place]
        stages[place] = one._replace(tensor_amax=largest) if static else one._replace(amax=largest)


def export_weights(
  source: str | Path,
  directory: str | Path,
  config: Mapping[str, Any],
  *,
  layout: str = "compressed-tensors",
  group_rules: Iterable[str] | None = None,
  max_shard_size: int | str = "5GB",
  dtype: str | None = None,
  card: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> Path:
  """Quantize the weights of a folder into another folder, tensor by tensor.

  Args:
    source: Hugging Face folder of a float model.
    directory: folder to make.
    config: quantization config whose inputs are off or dynamic and whose algorithm is "max" or None.
    layout: "compressed-tensors", "modelopt" or "gguf".
    group_rules: siblings that share tensor-level scales; None is the default list.
    max_shard_size: bytes, or "500MB".
    dtype: of the unquantized tensors; None leaves each in its own.
    card: for README.md.
    overwrite: replace a folder that is there.

  Returns:
    The folder.

  Raises:
    ValueError: the config needs data, the layout cannot express it, or the folder is damaged or quantized already.
    FileExistsError: the folder exists and is not empty.
  """
  options: dict[str, Any] = {"layout": layout, "max_shard_size": max_shard_size, "dtype": dtype, "card": card, "overwrite": overwrite}
  return write(FolderSource(source, config, group_rules), directory, base=source, **options)
