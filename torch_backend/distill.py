"""The whole model as something to tune: what the float model returned, and gradients of the distance to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_backend.inputs import PaddingMask
from torch_backend.modules import QuantWeight
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers

KEPT = torch.float16  # logits of the float model: 10^4 tokens of a large vocabulary are gigabytes


@dataclasses.dataclass
class Teacher:
  """What the float model returned for every call of the forward loop.

  Attributes:
    calls: arguments of each call.
    outputs: logits, or last hidden states, of each.
    masks: attention mask [B, T] where padding is left out, or None.
    weights: the float weights of the quantized layers, [N, K], by name (the model's own memory until something replaces it).
  """

  calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
  outputs: list[Tensor]
  masks: list[Tensor | None]
  weights: dict[str, np.ndarray]

  @classmethod
  def record(cls, model: nn.Module, loop: Callable[[nn.Module], Any], exclude_padding: bool) -> Teacher:
    """Run the forward loop in float and keep calls and outputs."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantWeight)}
    weights = {name: m.canonical(m.stored_weight).detach().to("cpu", torch.float32).numpy() for name, m in layers.items()}
    found = cls([], [], [], weights)
    with PaddingMask(model, exclude_padding) as mask:

      def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kept = {**kwargs, "use_cache": False} if "use_cache" in kwargs else dict(kwargs)
        kept.pop("past_key_values", None)
        found.calls.append((args, kept))
        found.outputs.append(result_of(output).detach().to(KEPT))
        found.masks.append(mask())

      handle = model.register_forward_hook(hook, with_kwargs=True)
      try:
        loop(model)
      finally:
        handle.remove()
    return found


def result_of(output: Any) -> Tensor:
  """Logits of a language model, last hidden state of an encoder, the first of a tuple, or the tensor itself.

  Raises:
    TypeError: none of these is there.
  """
  for name in ("logits", "last_hidden_state"):
    if isinstance(getattr(output, name, None), Tensor):
      return getattr(output, name)
  first = output[0] if isinstance(output, tuple | list) and output else output
  if not isinstance(first, Tensor):
    raise TypeError(f"the model returns {type(output).__name__}; tuning needs logits, a last_hidden_state, or a tensor")
  return first


class Distillation:
  """Gradients of the distance between a quantized model and its teacher (`core.calibrate.distill.Student`)."""

  def __init__(self, model: nn.Module, teacher: Teacher) -> None:
    self._model = model
    self._teacher = teacher
    self._layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantWeight)}

  def batches(self) -> int:
    return len(self._teacher.calls)

  def norms(self) -> dict[str, np.ndarray]:
    owners = dict(self._model.named_modules())
    found = {}
    for name, parameter in self._model.named_parameters():
      owner = owners[name.rpartition(".")[0]]
      if parameter.ndim == 1 and name.endswith(".weight") and not isinstance(owner, QuantWeight | TensorQuantizer):
        found[name] = parameter.detach().to("cpu", torch.float32).numpy().copy()
    return found

  def low_rank(self) -> dict[str, np.ndarray]:
    found = {}
    for name, layer in self._layers.items():
      first = tensor_quantizers(layer.weight_quantizer)[0]
      if first.low_rank_a is not None and first.low_rank_b is not None:
        for part, value in (("a", first.low_rank_a), ("b", first.low_rank_b)):
          found[f"{name}.weight_quantizer.low_rank_{part}"] = value.detach().to("cpu", torch.float32).numpy().copy()
    return found

  def set(self, values: dict[str, np.ndarray]) -> None:
    for name, value in values.items():
      held = self._model.get_parameter(name)
      held.data = torch.from_numpy(np.array(value, np.float32)).to(held.device, held.dtype)

  def gradient(self, batch: int, values: dict[str, np.ndarray], loss: str) -> tuple[float, dict[str, np.ndarray]]:
    args, kwargs = self._teacher.calls[batch]
    leaves = {name: torch.from_numpy(np.ascontiguousarray(value)).requires_grad_() for name, value in values.items()}
    own = [tensor_quantizers(m.weight_quantizer) for name, m in self._layers.items() if f"{name}.weight" in values]
    switched = [q for held in own for q in held if q.is_quantizing]
    for quantizer in switched:
      quantizer.disable_quant()
    try:
      with torch.enable_grad():
        placed = {name: self._stored(name, leaf) for name, leaf in leaves.items()}
        output = result_of(torch.func.functional_call(self._model, placed, args, kwargs))
        distance = _distance(output, self._teacher.outputs[batch], self._teacher.masks[batch], loss)
        found = torch.autograd.grad(distance, list(leaves.values()))
    finally:
      for quantizer in switched:
        quantizer.enable_quant()
    return float(distance), {name: gradient.numpy() for name, gradient in zip(leaves, found, strict=True)}

  def _stored(self, name: str, value: Tensor) -> Tensor:
    layer = self._layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    held = self._model.get_parameter(name)
    return (value if layer is None else layer.stored(value)).to(held.device, held.dtype)


def _distance(output: Tensor, teacher: Tensor, mask: Tensor | None, loss: str) -> Tensor:
  """Mean over tokens of KL(teacher || output) or of the squared difference."""
  rows, expected = output.to(torch.float32), teacher.to(torch.float32)
  if mask is not None and tuple(mask.shape) == tuple(rows.shape[:-1]):
    rows, expected = rows[mask.to(torch.bool)], expected[mask.to(torch.bool)]
  if loss == "mse":
    return (rows - expected).square().mean()
  rows, expected = rows.reshape(-1, rows.shape[-1]), expected.reshape(-1, expected.shape[-1])
  return nn.functional.kl_div(rows.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True)
