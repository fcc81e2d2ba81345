"""The torch model as `core.calibrate.relations` looks at it: any parameter by name, what norms do, and the scales of layers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.calibrate.relations import norm_kind
from core.quantize import QuantizedTensor
from torch_backend.modules import QuantWeight
from torch_backend.modules.base import QuantTable
from torch_backend.quantizer import TensorQuantizer
from torch_backend.quantizer_state import QuantizerState
from torch_backend.sequential import tensor_quantizers


class Parameters:
  """The part of `TorchHost` that deals with parameters of any module."""

  model: nn.Module
  _modules: dict[str, QuantWeight]
  _users: dict[int, int]
  _changed_inputs: list[str]
  _set: Callable[..., None]
  _calibrate_weight: Callable[..., None]

  def weighted(self) -> list[str]:
    return list(self._modules)

  def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
    found = {}
    for path, module in self.model.named_modules():
      if not isinstance(module, QuantizerState):
        for name, held in module._parameters.items():
          if held is not None:
            found[f"{path}.{name}" if path else name] = tuple(self._canonical(module, name, held).shape)
    return found

  def parameter(self, name: str) -> np.ndarray | None:
    module, leaf = self._owner(name)
    held = None if module is None else module._parameters.get(leaf)
    if module is None or held is None:
      return None
    wide = torch.promote_types(held.dtype, torch.float32)
    return np.array(self._canonical(module, leaf, held.detach()).to("cpu", wide).numpy(), order="C")

  def set_parameter(self, name: str, value: np.ndarray) -> None:
    module, leaf = self._owner(name)
    held = None if module is None else module._parameters.get(leaf)
    if module is None or held is None:
      raise ValueError(f"the model has no parameter {name!r}; it has {', '.join(list(self.parameter_shapes())[:8])}, ...")
    tensor = torch.from_numpy(np.array(value, order="C"))
    if self._users[id(held)] > 1:
      note_untied(self.model)
    is_weight = isinstance(module, QuantWeight) and leaf == "weight"
    self._set(name.rpartition(".")[0], module, leaf, module.stored(tensor) if is_weight else tensor)  # type: ignore[operator]
    if is_weight:
      tensor_quantizers(module.weight_quantizer)[0].reset_amax()  # type: ignore[union-attr, arg-type]
      self._calibrate_weight(module, keep_first=False)

  def norm(self, name: str) -> str:
    module = self.model.get_submodule(name)
    held = module._parameters.get("weight")
    if held is None or held.ndim != 1:
      return "other"

    def call(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
      values = {"weight": torch.from_numpy(weight).to(held)}
      if module._parameters.get("bias") is not None:
        values["bias"] = torch.zeros_like(held)
      with torch.no_grad(), _off(module):
        return torch.func.functional_call(module, values, (torch.from_numpy(x).to(held),)).to("cpu", torch.float64).numpy()

    try:
      return norm_kind(call, held.shape[0])
    except Exception:  # whatever a module raises that is not called with one tensor of feature vectors
      return "other"

  def is_table(self, name: str) -> bool:
    return isinstance(self._modules[name], QuantTable)

  def head_dim(self) -> int | None:
    config = getattr(self.model, "config", None)
    given, hidden, heads = (getattr(config, key, None) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    return given or (hidden // heads if hidden and heads else None)

  def pre_quant_scale(self, name: str) -> np.ndarray | None:
    held = tensor_quantizers(self._modules[name].input_quantizer)[0].pre_quant_scale
    return None if held is None else held.detach().cpu().numpy()

  def clear_pre_quant_scale(self, name: str) -> None:
    tensor_quantizers(self._modules[name].input_quantizer)[0].pre_quant_scale = None

  def low_rank(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    first = tensor_quantizers(self._modules[name].weight_quantizer)[0]
    a, b = first.low_rank_a, first.low_rank_b
    return None if a is None or b is None else (a.detach().cpu().numpy(), b.detach().cpu().numpy())

  def stored(self, name: str) -> QuantizedTensor | None:
    held = self._modules[name].packed_weight
    return None if held is None else held.quantized()

  def recalibrate(self, names: Iterable[str]) -> None:
    for name in names:
      module, _, role = name.rpartition(".")
      held = tensor_quantizers(getattr(self.model.get_submodule(module), role))
      if any(q.is_enabled and q.config.needs_calibration for q in held):
        self._changed_inputs.append(name)

  def _owner(self, name: str) -> tuple[nn.Module | None, str]:
    path, _, leaf = name.rpartition(".")
    try:
      return self.model.get_submodule(path), leaf
    except AttributeError:
      return None, leaf

  def _canonical(self, module: nn.Module, name: str, held: Tensor) -> Tensor:
    return module.canonical(held) if isinstance(module, QuantWeight) and name == "weight" else held


@contextlib.contextmanager
def _off(module: nn.Module) -> Any:
  """The module's own quantizers let values pass."""
  held = [m for m in module.modules() if isinstance(m, TensorQuantizer) and m.is_quantizing]
  for quantizer in held:
    quantizer.disable_quant()
  try:
    yield
  finally:
    for quantizer in held:
      quantizer.enable_quant()


def note_untied(model: nn.Module) -> None:
  """Say in the model's config that head and table are two tensors now, so that saving and loading keeps both."""
  config: Any = getattr(model, "config", None)
  if not getattr(config, "tie_word_embeddings", False):
    return
  try:
    config.tie_word_embeddings = False
  except dataclasses.FrozenInstanceError:
    model.config = dataclasses.replace(config, tie_word_embeddings=False)
