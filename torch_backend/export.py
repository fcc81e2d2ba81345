"""export: a quantized model as a folder that serving engines load. The layouts are `core.export`'s; here the model is shown to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core import export as core_export
from core.export import Stage
from torch_backend.host import TorchHost, array_of
from torch_backend.modules import QuantWeight
from torch_backend.modules.layers import InOutWeight
from torch_backend.names import is_quantized, quantizers
from torch_backend.sequential import Quantizer, tensor_quantizers

_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def export(
  model: nn.Module,
  directory: str | Path,
  layout: str = "compressed-tensors",
  source: str | Path | None = None,
  tokenizer: Any = None,
  max_shard_size: int | str = "5GB",
  dtype: str | None = None,
  card: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> Path:
  """Write a quantized model as a Hugging Face folder. The model stays as it is.

  The codes and scales are those that the model computes with, bit for bit, and the tensors are the same bytes as the JAX backend writes.
  One layer at a time is in memory beside the model. The folder appears complete or not at all.

  Args:
    model: what `quantize` returned, calibrated and not folded; compressed weights are written as they are.
    directory: folder to make.
    layout: "compressed-tensors" (transformers, vLLM), "modelopt" (vLLM, TensorRT-LLM, SGLang) or "gguf" (transformers, llama.cpp).
    source: Hugging Face folder of the float model, for config.json, generation_config.json and the tokenizer; None takes the model's own
      `config` and `generation_config`, where it has them.
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
  if not is_quantized(model):
    raise ValueError("the model has no quantized modules; call quantize(model, config, forward_loop) first")
  return core_export.write(
    ExportHost(model),
    directory,
    layout=layout,
    base=source,
    config=None if source is not None else _config(model),
    generation=None if source is not None else _generation(model),
    tokenizer=tokenizer,
    max_shard_size=max_shard_size,
    dtype=dtype,
    card=card,
    overwrite=overwrite,
  )


class ExportHost(TorchHost):
  """A quantized model as `core.export.Source`."""

  def __init__(self, model: nn.Module) -> None:
    super().__init__(model, None)
    self._tensors = _tensors(model, self._modules)

  def weight_stages(self, name: str) -> tuple[Stage, ...]:
    return _stages(self._modules[name].weight_quantizer)

  def activation_stages(self) -> dict[str, tuple[Stage, ...]]:
    weights = {id(module.weight_quantizer) for module in self._modules.values()}
    found = {name: _stages(q) for name, q in quantizers(self.model).items() if id(q) not in weights}
    return {name: stages for name, stages in found.items() if stages}

  def folded(self) -> list[str]:
    return [n for n, module in self._modules.items() if any(q.is_folded for q in tensor_quantizers(module.weight_quantizer))]

  def is_linear(self, name: str) -> bool:
    module = self._modules[name]
    return isinstance(module, nn.Linear) and not isinstance(module, InOutWeight)

  def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

  def parameter_types(self) -> dict[str, str]:
    return {name: _TYPES[tensor.dtype] for name, tensor in self._tensors.items()}

  def tensor(self, name: str) -> np.ndarray:
    held = self._tensors[name].detach()
    return held.to("cpu", torch.promote_types(held.dtype, torch.float32)).contiguous().numpy()


def _stages(quantizer: Quantizer) -> tuple[Stage, ...]:
  found = []
  for one in tensor_quantizers(quantizer):
    if one.is_enabled:
      given = one.spec.two_level and not one.spec.dynamic and one.tensor_amax is not None
      tensor_amax = array_of(one.tensor_amax) if given else None  # type: ignore[arg-type]
      found.append(Stage(one.config, None if one.amax is None else array_of(one.amax), tensor_amax))
  return tuple(found)


def _tensors(model: nn.Module, layers: Mapping[str, QuantWeight]) -> dict[str, Tensor]:
  """Parameters and persistent buffers of floating point, without the quantizers'. One that several modules share comes once, unless some
  of them quantize it."""
  held = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.dtype in _TYPES}
  inside = tuple(f"{name}." for name in quantizers(model)) + tuple(f"{name}.packed_weight." for name in layers)
  enabled = {f"{name}.weight" for name, layer in layers.items() if layer.weight_quantizer.is_enabled}
  found: dict[str, Tensor] = {}
  seen: set[int] = set()
  for name, tensor in held.items():
    if name.startswith(inside) or (id(tensor) in seen and name not in enabled):
      continue
    seen |= set() if name in enabled else {id(tensor)}
    found[name] = tensor
  return found


def _config(model: nn.Module) -> dict[str, Any] | None:
  config = getattr(model, "config", None)
  if config is None or not callable(getattr(config, "to_dict", None)):
    return None
  found = dict(config.to_dict())
  if not found.get("architectures"):
    found["architectures"] = [type(model).__name__]
  return {key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value for key, value in found.items()}


def _generation(model: nn.Module) -> dict[str, Any] | None:
  held = getattr(model, "generation_config", None)
  return dict(held.to_diff_dict()) if held is not None and callable(getattr(held, "to_diff_dict", None)) else None
