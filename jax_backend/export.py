"""export: a quantized model as a folder that serving engines load. The layouts are `core.export`'s; here the model is shown to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from core import export as core_export
from core.export import Stage
from jax_backend import layouts, tree
from jax_backend.apply import QuantModule
from jax_backend.edit import is_quantized
from jax_backend.host import WEIGHT, JaxHost
from jax_backend.quantizer import AnyQuantizer

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def export(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  directory: str | Path,
  layout: str = "compressed-tensors",
  source: str | Path | None = None,
  tokenizer: Any = None,
  max_shard_size: int | str = "5GB",
  dtype: str | None = None,
  card: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> Path:
  """Write a quantized model as a Hugging Face folder. The variables stay as they are.

  The codes and scales are those that the model computes with, bit for bit, and the tensors are the same bytes as the torch backend writes.
  Names are torch's: `model/layers_0/mlp/up_proj/kernel` becomes "model.layers.0.mlp.up_proj.weight", copies that nn.scan stacks come one by
  one. One layer at a time is in memory beside the model. The folder appears complete or not at all.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables, calibrated and not folded; compressed weights are written as they are.
    directory: folder to make.
    layout: "compressed-tensors" (transformers, vLLM), "modelopt" (vLLM, TensorRT-LLM, SGLang) or "gguf" (transformers, llama.cpp).
    source: Hugging Face folder of the float model, for config.json, generation_config.json and the tokenizer; without it config.json says
      only how the model is quantized.
    tokenizer: an object with `save_pretrained`, in place of the files in `source`.
    max_shard_size: bytes, or a text such as "500MB".
    dtype: of the unquantized tensors ("float32", "bfloat16", "float16"); None leaves each in its own.
    card: for README.md: "title", "base_model", "license", "recipe", "metrics" (`core.export.card`).
    overwrite: replace a folder that is there.

  Returns:
    The folder.

  Raises:
    ValueError: the layout cannot express the model: names layers, reasons, and the layouts that can. Nothing is written then.
    FileExistsError: the folder exists and is not empty.

  Warns:
    ConfigWarning: clients that are known to compute other numbers.
  """
  if not is_quantized(qvariables):
    raise ValueError("these variables have no quantizers; call quantize(module, variables, config, forward_loop) first")
  return core_export.write(
    ExportHost(qmodule, qvariables),
    directory,
    layout=layout,
    base=source,
    tokenizer=tokenizer,
    max_shard_size=max_shard_size,
    dtype=dtype,
    card=card,
    overwrite=overwrite,
  )


class ExportHost(JaxHost):
  """Quantized variables as `core.export.Source`."""

  def __init__(self, qmodule: QuantModule, qvariables: Mapping[str, Any]) -> None:
    super().__init__(qmodule, qvariables, None)
    self._places = self._wheres()

  def weight_stages(self, name: str) -> tuple[Stage, ...]:
    place = self.places[name]
    return _stages(self._quant[place.path, WEIGHT], place.index)

  def activation_stages(self) -> dict[str, tuple[Stage, ...]]:
    found: dict[str, tuple[Stage, ...]] = {}
    for (path, role), quantizer in self._quant.items():
      if quantizer.param is None and quantizer.is_enabled:
        for module, index in self._copies(path, quantizer):
          found[f"{module}.{role}" if module else role] = _stages(quantizer, index)
    return {name: stages for name, stages in found.items() if stages}

  def _copies(self, path: tree.Path, quantizer: AnyQuantizer) -> list[tuple[str, tuple[int, ...]]]:
    """(name, index) of every copy of a module: one, or those of a stack."""
    found = [(name, place.index) for name, place in self.places.items() if place.path == path]
    if found:
      return found
    # A module without a weight of its own, such as attention: how often it is stacked shows in what was calibrated.
    first = quantizer.leaves[0]
    sizes = () if first.amax is None else first.amax.shape[: len(first.stack)]
    name = tree.full_name(path[:-1], path[-1]) if path else ""
    return [(f"{name}[{','.join(map(str, index))}]" if index else name, index) for index in np.ndindex(sizes)]

  def folded(self) -> list[str]:
    return [n for n, place in self.places.items() if any(q.is_folded for q in self._quant[place.path, WEIGHT].leaves)]

  def is_linear(self, name: str) -> bool:
    return self._is_linear(self.places[name].path)

  def parameter_types(self) -> dict[str, str]:
    return {name: _TYPES[jnp.asarray(self._parameter(w.path[:-1], w.path[-1])).dtype.name] for name, w in self._places.items()}

  def tensor(self, name: str) -> np.ndarray:
    where = self._places[name]
    held = self._held(where) if where.stack else jnp.asarray(self._parameter(where.path[:-1], where.path[-1]))
    value = np.asarray(layouts.to_torch(held, where.layout))  # a view where nothing is transposed
    return value if value.dtype == np.float64 else value.astype(np.float32, copy=False)


def _stages(quantizer: AnyQuantizer, index: tuple[int, ...]) -> tuple[Stage, ...]:
  found = []
  for one in quantizer.leaves:
    if one.is_enabled:
      given = one.spec.two_level and not one.spec.dynamic and one.tensor_amax is not None
      amax = None if one.amax is None else np.asarray(one.amax, np.float32)[index]
      found.append(Stage(one.config, amax, np.asarray(one.tensor_amax, np.float32)[index] if given else None))
  return tuple(found)
