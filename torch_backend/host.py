"""What calibration sees of a torch model: layers as numpy arrays, their inputs, and the chain of blocks (`core.calibrate.host.Host`)."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.calibrate.host import PREPARED, TensorVisit, Visit
from core.calibrate.layer import Change, Layer
from core.calibrate.padding import tokens_first
from core.config import ConfigWarning
from core.config.schema import QuantizerConfig
from core.spec import QuantSpec
from torch_backend import groups
from torch_backend.blocks import Chain, TorchBlock
from torch_backend.calibrate import activations, calibrate_activations, calibrate_missing, calibrate_tensor
from torch_backend.distill import Distillation, Teacher
from torch_backend.inputs import InputWatch, PaddingMask, without_padding
from torch_backend.modules import QuantWeight
from torch_backend.modules.base import QuantTable
from torch_backend.parameters import Parameters
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers


def array_of(tensor: Tensor) -> np.ndarray:
  """A tensor as float32 numpy, without a copy where it is one already."""
  return tensor.detach().to("cpu", torch.float32).numpy()


class TorchHost(Parameters):
  """A quantized torch model during calibration.

  Args:
    model: a quantized model, in evaluation mode.
    forward_loop: runs it on calibration data, or None.
    exclude_padding: leave out tokens that the call's `attention_mask` [B, T] marks as padding.
    teacher: what the float model returned, for algorithms that tune the whole model.
  """

  backend = "torch"

  def __init__(
    self,
    model: nn.Module,
    forward_loop: Callable[[nn.Module], Any] | None,
    exclude_padding: bool = False,
    teacher: Teacher | None = None,
  ) -> None:
    self.model = model
    self._teacher = teacher
    self._loop = forward_loop
    self._exclude_padding = exclude_padding
    self._modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}
    self._users = _users(model)
    self._changed_inputs: list[str] = []
    self._chain: Chain | None = None

  def layers(self) -> list[str]:
    return [name for name, m in self._modules.items() if m.weight_quantizer.is_enabled or m.input_quantizer.is_enabled]

  def layer(self, name: str) -> Layer:
    module = self._modules[name]
    held = tensor_quantizers(module.weight_quantizer)
    weights = [q for q in held if q.is_enabled]
    inputs = [q for q in tensor_quantizers(module.input_quantizer) if q.is_enabled]
    first = weights[0] if weights else None
    given = first is not None and first.spec.two_level and not first.spec.dynamic and first.tensor_amax is not None
    bias = module._parameters.get("bias")
    return Layer(
      name=name,
      weight=array_of(module.canonical(module.stored_weight)),
      specs=tuple(q.spec for q in weights),
      input_specs=tuple(q.spec for q in inputs),
      amax=None if first is None or first.amax is None else array_of(first.amax),
      tensor_amax=array_of(first.tensor_amax) if given else None,  # type: ignore[union-attr, arg-type]
      input_amax=None if not inputs or inputs[0].amax is None else array_of(inputs[0].amax),
      bias=None if bias is None else array_of(bias),
      linear=is_linear(module) and all(q.config.rotate is None and q.config.bias is None for q in held),
    )

  def apply(self, name: str, change: Change) -> None:
    module = self._modules[name]
    first = tensor_quantizers(module.weight_quantizer)[0]
    if change.pre_quant_scale is not None:
      self._scale_input(name, module, change.pre_quant_scale)
    if change.weight is not None:
      weight = torch.from_numpy(np.array(change.weight, np.float32))
      self._set(name, module, "weight", module.stored(weight))
      if change.amax is None:
        first.reset_amax()
    if change.low_rank is not None:
      first.set_low_rank(*change.low_rank)
    if change.amax is not None and not first.is_dynamic:
      first.amax = None
      first.amax = torch.from_numpy(np.array(change.amax, np.float32))
      if first.spec.two_level and not first.spec.dynamic and change.tensor_amax is not None:
        first.tensor_amax = torch.from_numpy(np.array(change.tensor_amax, np.float32))
    if change.weight is not None or change.amax is not None:
      self._calibrate_weight(module, keep_first=change.amax is not None)
    if change.bias is not None and module._parameters.get("bias") is not None:
      self._set(name, module, "bias", torch.from_numpy(np.array(change.bias, np.float32)))
    if change.input_amax is not None and not (change.pre_quant_scale is not None and self._by_histogram(module)):
      self.set_amax(f"{name}.input_quantizer", change.input_amax)

  def _by_histogram(self, module: QuantWeight) -> bool:
    """Whether amax of a scaled input is not the largest magnitude but what a histogram says: `settle` finds it."""
    return tensor_quantizers(module.input_quantizer)[0].config.calibrator == "histogram"

  def _calibrate_weight(self, module: QuantWeight, keep_first: bool) -> None:
    """amax of the weight's quantizers: of all of them, or of those behind the first, each on what the one before returns."""
    held = tensor_quantizers(module.weight_quantizer)
    tensor = module.canonical(module.stored_weight).detach()
    for place, one in enumerate(held):
      if not (place == 0 and keep_first):
        calibrate_tensor(one, tensor)
      if place + 1 < len(held):
        tensor = one(tensor)

  def _scale_input(self, name: str, module: QuantWeight, scale: np.ndarray) -> None:
    first = tensor_quantizers(module.input_quantizer)[0]
    factor = torch.from_numpy(np.array(scale, np.float32)).to(module.stored_weight.device)
    before = first.pre_quant_scale
    first.pre_quant_scale = factor if before is None else before * factor
    if any(q.is_enabled and q.config.needs_calibration for q in tensor_quantizers(module.input_quantizer)):
      self._changed_inputs.append(f"{name}.input_quantizer")

  def _set(self, name: str, module: QuantWeight, parameter: str, value: Tensor) -> None:
    """Another value of a parameter, which stays the same object; one that other modules share is replaced for this module alone."""
    held = module._parameters[parameter]
    if held is None:
      raise ValueError(f"{name} has no parameter {parameter!r}; calibration cannot change it")
    value = value.to(held.device, held.dtype).contiguous()
    if self._users[id(held)] > 1:
      warnings.warn(
        f"{name}.{parameter} is shared with a module that is not calibrated with it; it becomes a parameter of its own",
        ConfigWarning,
        stacklevel=6,
      )
      module._parameters[parameter] = nn.Parameter(value, requires_grad=held.requires_grad)
      self._users[id(held)] -= 1
      self._users[id(module._parameters[parameter])] = 1
    else:
      held.data = value

  def set_amax(self, name: str, amax: np.ndarray | float) -> None:
    first = self._activation(name)
    first.amax = None
    first.amax = torch.as_tensor(np.array(amax, np.float32))
    if name in self._changed_inputs:
      self._changed_inputs.remove(name)

  def settle(self) -> None:
    if self._changed_inputs and self._loop is not None:
      wanted = set(self._changed_inputs)
      calibrate_activations(self.model, self._loop, lambda name: name in wanted)
    self._changed_inputs = []
    groups.merge(self.model)

  def calibrate_missing(self, inputs: bool = True) -> None:
    calibrate_missing(self.model, self._loop, inputs)

  def activation_specs(self) -> dict[str, QuantSpec]:
    found = {}
    for name, quantizer in activations(self.model).items():
      first = tensor_quantizers(quantizer)[0]
      if first.is_enabled and first.config.constant_amax is None:
        found[name] = first.spec
    return found

  def activation_configs(self) -> dict[str, QuantizerConfig]:
    held = {name: tensor_quantizers(q)[0].config for name, q in activations(self.model).items()}
    return {name: held[name] for name in self.activation_specs()}

  def activation_amax(self, name: str) -> np.ndarray | None:
    amax = self._activation(name).amax
    return None if amax is None else array_of(amax)

  def _activation(self, name: str) -> TensorQuantizer:
    module, _, role = name.rpartition(".")
    return tensor_quantizers(getattr(self.model.get_submodule(module), role))[0]

  def observe(self, visit: Visit, names: Collection[str] | None = None, point: str = PREPARED) -> None:
    if self._loop is None:
      return
    wanted = {name: self._modules[name] for name in (self._modules if names is None else names)}
    with unquantized(self.model), PaddingMask(self.model, self._exclude_padding) as mask, InputWatch(wanted, visit, point, mask):
      self._loop(self.model)

  def observe_tensors(self, visit: TensorVisit, names: Collection[str]) -> None:
    if self._loop is None:
      return
    found = {name: q for name, q in activations(self.model).items() if name in names}
    handles = []

    with unquantized(self.model), PaddingMask(self.model, self._exclude_padding) as mask:

      def tell(name: str) -> Callable[..., None]:
        def hook(quantizer: TensorQuantizer, inputs: tuple[Tensor, ...]) -> None:
          if inputs[0].numel():
            x, left_out = quantizer.scaled(inputs[0]), mask()
            visit(name, array_of(x if left_out is None else without_padding(tokens_first(name, x), left_out)))

        return hook

      try:
        handles += [tensor_quantizers(q)[0].register_forward_pre_hook(tell(name)) for name, q in found.items()]
        self._loop(self.model)
      finally:
        for handle in handles:
          handle.remove()

  def blocks(self) -> Sequence[TorchBlock]:
    return self._found().blocks

  def block_inputs(self) -> list[Tensor]:
    return list(self._found().hidden)

  def _found(self) -> Chain:
    if self._chain is None:
      with unquantized(self.model), PaddingMask(self.model, self._exclude_padding) as mask:
        self._chain = Chain.find(self.model, self._loop, self._modules, mask)
    return self._chain

  def student(self) -> Distillation:
    if self._teacher is None:
      raise ValueError("nothing of the float model was recorded; this algorithm needs a forward_loop")
    return Distillation(self.model, self._teacher)

  def float_weights(self) -> dict[str, np.ndarray]:
    return {} if self._teacher is None else self._teacher.weights

  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for name, module in sorted(self._modules.items()):
      digest.update(name.encode())
      digest.update(repr([q.config for q in tensor_quantizers(module.weight_quantizer)]).encode())
      layer = self.layer(name)
      for part in (layer.weight, layer.amax, layer.tensor_amax, layer.bias, self.pre_quant_scale(name)):
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def is_linear(module: QuantWeight) -> bool:
  """Whether a module multiplies feature vectors with its weight: [..., K] x [N, K]."""
  return module.stored_weight.ndim == 2 and not isinstance(module, QuantTable)


@contextlib.contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
  """The model in float (scales and rotations of inputs stay)."""
  held = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
  before = [q.is_quantizing for q in held]
  for quantizer in held:
    quantizer.disable_quant()
  try:
    with torch.no_grad():
      yield
  finally:
    for quantizer, was in zip(held, before, strict=True):
      if was:
        quantizer.enable_quant()


def _users(model: nn.Module) -> dict[int, int]:
  counts: dict[int, int] = {}
  for module in model.modules():
    for parameter in module._parameters.values():
      if parameter is not None:
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
  return counts
