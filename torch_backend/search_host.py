"""What the search for mixed precision does with a torch model (`core.search.host.SearchHost`).

Everything until `finish` happens on copies that share the storage of the user's parameters, so that the model is as it was if anything
fails. Algorithms replace tensors and never write into them.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import ConfigWarning
from core.search.driver import limited
from core.search.host import Choices, Scores, SearchLayer
from torch_backend import edit
from torch_backend.calibrate import ForwardLoop, calibrate
from torch_backend.convert import convert, quantize
from torch_backend.modules import QuantWeight
from torch_backend.modules.base import QuantTable
from torch_backend.names import is_quantized, parent_classes, quantizers
from torch_backend.search_calibration import SharedCalibration, is_max, no_amax_yet, without_algorithm
from torch_backend.search_scores import gradient_scores, hessian_traces, kl_scores
from torch_backend.sequential import tensor_quantizers
from torch_backend.snapshot import restored_on_error

ForwardStep = Callable[[nn.Module, Any], Any]


def sharing_copy(model: nn.Module, requires_grad: bool = False) -> nn.Module:
  """A copy of a model with parameters of its own that share the storage of the model's."""
  memo: dict[int, Any] = {}
  for parameter in model.parameters():
    if not isinstance(parameter, nn.UninitializedParameter):
      memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=requires_grad)
  return copy.deepcopy(model, memo)


class TorchSearchHost:
  """A torch model during a search.

  Args:
    model: the user's model.
    data_loader: batches, or None.
    num_calib_steps: how many of them calibrate.
    forward_step: runs the model on a batch.
    loss_func: output and batch to a scalar loss, or None.
    forward_backward_step: runs the model on a batch and its loss backward, in place of the two, or None.
    group_rules: siblings that share tensor-level scales, as in `quantize`.
  """

  backend = "torch"

  def __init__(
    self,
    model: nn.Module,
    data_loader: Iterable[Any] | None,
    num_calib_steps: int,
    forward_step: ForwardStep,
    loss_func: Callable[[Any, Any], Tensor] | None = None,
    forward_backward_step: Callable[[nn.Module, Any], Any] | None = None,
    group_rules: Iterable[str] | None = None,
  ) -> None:
    self._model = model
    self._data, self._calib_steps = data_loader, num_calib_steps
    self._forward_step, self._loss_func, self._backward_step = forward_step, loss_func, forward_backward_step
    self._group_rules = group_rules if group_rules is None or isinstance(group_rules, str) else tuple(group_rules)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConfigWarning)  # `finish` says them again
      converted = sharing_copy(model)
      convert(converted)
      edit.reset(converted)
    self._floating = (converted if is_quantized(model) else sharing_copy(model)).eval()
    self._layers = {name: module for name, module in converted.named_modules() if isinstance(module, QuantWeight)}
    self._twins: dict[str, dict[str, QuantWeight]] = {}
    self._shared = SharedCalibration(self._floating)

  def layers(self) -> list[SearchLayer]:
    return [_described(name, module) for name, module in self._layers.items()]

  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(self._model.named_parameters()):
      held = parameter.detach().cpu().contiguous()
      digest.update(f"{name} {list(held.shape)} {held.dtype}".encode())
      digest.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

  def _loop(self, model: nn.Module) -> None:
    for batch in limited(self._data, self._calib_steps):
      self._forward_step(model, batch)

  @property
  def _loop_or_none(self) -> ForwardLoop | None:
    return None if self._data is None else self._loop

  def prepare(self, name: str, config: Mapping[str, Any], report: list[dict[str, Any]]) -> None:
    twin = sharing_copy(self._model)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConfigWarning)
      simple = is_max(config)
      quantize(twin, without_algorithm(config) if simple else config, self._loop_or_none, self._group_rules, report)
      if simple and self._shared.takes(twin):
        self._shared.add(twin)  # its activations when they are needed, with those of the other formats
      elif simple:
        calibrate(twin, "max", self._loop_or_none)
    twin.eval().requires_grad_(False)
    self._twins[name] = {layer: module for layer, module in twin.named_modules() if isinstance(module, QuantWeight)}

  def gradient_scores(self, number: int, batch: Any, choices: Choices, by_position: bool = False) -> Scores:
    self._shared.run(self._loop_or_none)
    return gradient_scores(self._floating, self._twins, choices, number, lambda model: self._backward(model, batch), by_position)

  def _backward(self, model: nn.Module, batch: Any) -> Tensor | None:
    """The loss of a batch, still to be differentiated; None where the user's own step has done so."""
    if self._backward_step is not None:
      self._backward_step(model, batch)
      return None
    return self._loss(model, batch)

  def _loss(self, model: nn.Module, batch: Any) -> Tensor:
    if self._loss_func is None:
      raise ValueError("loss_func is missing")  # auto_quantize has checked it
    return self._loss_func(self._forward_step(model, batch), batch)

  def kl_scores(self, number: int, batch: Any, choices: Choices, groups: Mapping[str, Sequence[str]]) -> Scores:
    self._shared.run(self._loop_or_none)
    return kl_scores(self._floating, self._twins, choices, groups, number, lambda model: self._forward_step(model, batch))

  def hessian_traces(
    self, number: int, batch: Any, layers: Sequence[str], probes: Sequence[Mapping[str, Callable[[], np.ndarray]]]
  ) -> dict[str, float]:
    quantized = {name: self._layers[name] for name in layers}
    return hessian_traces(self._floating, quantized, number, lambda model: self._loss(model, batch), probes)

  @torch.no_grad()
  def weight_errors(self, choices: Choices) -> dict[str, dict[str, tuple[float, float]]]:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for layer, names in choices.items():
      module = self._layers[layer]
      weight = module.canonical(module.stored_weight.detach())
      signal = _sum_of_squares(weight)
      found[layer] = {name: (signal, _sum_of_squares(effective_weight(self._twins[name][layer]) - weight)) for name in names}
    return found

  def finish(self, config: Mapping[str, Any], report: list[dict[str, Any]]) -> None:
    self._twins.clear()
    if not is_max(config):
      quantize(self._model, config, self._loop_or_none, self._group_rules, report)
      return
    with restored_on_error(self._model):
      with no_amax_yet():
        quantize(self._model, without_algorithm(config), None, self._group_rules, report)
      if not self._shared.install(self._model):
        calibrate(self._model, "max", self._loop_or_none)


def _described(name: str, module: QuantWeight) -> SearchLayer:
  held = tuple(quantizer for quantizer in quantizers(module) if "." not in quantizer)
  if isinstance(module, QuantTable):
    held = tuple(quantizer for quantizer in held if quantizer != "input_quantizer")
  return SearchLayer(name, tuple(module.canonical(module.stored_weight).shape), held, parent_classes(module))


def _sum_of_squares(x: Tensor) -> float:
  return float(torch.linalg.vector_norm(x.to(torch.float32) if x.dtype != torch.float64 else x, dtype=torch.float64)) ** 2


def effective_weight(module: QuantWeight) -> Tensor:
  """What a quantized layer multiplies the float model's input with, in torch's layout: quantized weight times pre_quant_scale, plus b a."""
  weight = module.canonical(module.compute_weight().detach())
  first = tensor_quantizers(module.weight_quantizer)[0]
  if first.low_rank_a is not None and first.low_rank_b is not None:
    weight = weight + (first.low_rank_b @ first.low_rank_a).to(weight.dtype)
  scale = tensor_quantizers(module.input_quantizer)[0].pre_quant_scale
  if scale is None:
    return weight
  return weight * (scale if scale.ndim == 0 else scale.reshape(1, -1, *[1] * (weight.ndim - 2))).to(weight.dtype)
