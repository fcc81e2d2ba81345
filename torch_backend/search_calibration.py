"""Max calibration of several formats in one run of the float model, and of the model that is made of them without another run.

What an activation quantizer sees in max calibration is the float model's, whatever the format. So the float model's layers show their
inputs to the quantizers of all twins at once, and what these have found holds for the chosen mixture too. The results are those of
`max_calibrate` bit for bit.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from core.config import ConfigWarning, QuantizerConfig, read_algorithm
from torch_backend import groups
from torch_backend.calibrate import activations, calibrate_tensor, collecting, needs_data, weights
from torch_backend.modules import QuantWeight
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import Quantizer, tensor_quantizers
from torch_backend.snapshot import evaluation

ROLES = ("input_quantizer", "output_quantizer")
Key = tuple[str, tuple[QuantizerConfig, ...]]


def is_max(config: Mapping[str, Any]) -> bool:
  """Whether a configuration asks for max calibration and nothing else."""
  steps = read_algorithm(config.get("algorithm"))
  return len(steps) == 1 and steps[0].method == "max" and not steps[0].options


def without_algorithm(config: Mapping[str, Any]) -> dict[str, Any]:
  """The configuration for `quantize`, calibrating nothing."""
  return {**config, "algorithm": None}


class SharedCalibration:
  """Max calibration of twins of one float model."""

  def __init__(self, floating: nn.Module) -> None:
    self._floating = floating
    self._pending: list[tuple[nn.Module, dict[str, Quantizer]]] = []
    self._known: dict[Key, Quantizer] = {}

  def takes(self, twin: nn.Module) -> bool:
    """Whether all that a twin must see are inputs and outputs of layers with a weight, and no bias is to be found."""
    for name, quantizer in _waiting(twin).items():
      layer, _, role = name.rpartition(".")
      if role not in ROLES or not isinstance(twin.get_submodule(layer), QuantWeight):
        return False
      if any(one.config.bias is not None for one in tensor_quantizers(quantizer)):
        return False
    return True

  def add(self, twin: nn.Module) -> None:
    """Calibrate a twin's weights now, and its activations when `run` is called."""
    with torch.no_grad():
      for quantizer, weight in weights(twin):
        calibrate_tensor(quantizer, weight)
    self._pending.append((twin, _waiting(twin)))

  def run(self, loop: Callable[[nn.Module], Any] | None) -> None:
    """Run the float model once for all twins that wait."""
    pending, self._pending = self._pending, []
    if loop is not None and any(chosen for _, chosen in pending):
      with contextlib.ExitStack() as stack, evaluation(self._floating), torch.no_grad():
        for twin, chosen in pending:
          stack.enter_context(collecting(twin, chosen))
          for name, quantizer in chosen.items():
            stack.callback(self._shown(name, quantizer).remove)
        loop(self._floating)
    for twin, chosen in pending:
      for name, quantizer in chosen.items():
        for one in tensor_quantizers(quantizer):
          if one.has_statistics:
            one.load_calib_amax()
        self._known[_key(name, quantizer)] = quantizer
      groups.merge(twin)

  def _shown(self, name: str, quantizer: Quantizer) -> Any:
    layer, _, role = name.rpartition(".")
    module = self._floating.get_submodule(layer)
    if role == "input_quantizer":
      return module.register_forward_pre_hook(lambda _, args, kwargs: _show(quantizer, args, kwargs), with_kwargs=True)
    return module.register_forward_hook(lambda _, args, output: _show(quantizer, output if isinstance(output, tuple) else (output,), {}))

  def install(self, model: nn.Module) -> bool:
    """Calibrate a quantized model from what the twins have found.

    Returns:
      Whether everything was known; otherwise nothing has changed.
    """
    waiting = _waiting(model)
    if not all(_key(name, quantizer) in self._known for name, quantizer in waiting.items()):
      return False
    with torch.no_grad():
      for quantizer, weight in weights(model):
        calibrate_tensor(quantizer, weight)
    for name, quantizer in waiting.items():
      known = self._known[_key(name, quantizer)]
      for one, found in zip(tensor_quantizers(quantizer), tensor_quantizers(known), strict=True):
        _take_over(one, found)
    groups.merge(model)
    return True


@contextlib.contextmanager
def no_amax_yet() -> Iterator[None]:
  """Without the warning that static quantizers have no amax: they get it later."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*static activation quantizers have no amax", category=ConfigWarning)
    yield


def _waiting(model: nn.Module) -> dict[str, Quantizer]:
  return {name: quantizer for name, quantizer in activations(model).items() if needs_data(quantizer)}


def _key(name: str, quantizer: Quantizer) -> Key:
  return name, tuple(one.config for one in tensor_quantizers(quantizer))


def _show(quantizer: Quantizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
  """What `QuantInput` hands to its input quantizer."""
  if args or kwargs:
    quantizer(args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values())))


def _take_over(one: TensorQuantizer, found: TensorQuantizer) -> None:
  """Statistics of another quantizer of the same configuration, as they were before it shared them with its siblings."""
  if found.amax is None or found.is_dynamic or found.config.constant_amax is not None:
    return
  one.amax = found.amax
  if found.spec.two_level and not found.spec.dynamic:
    one.tensor_amax = found.tensor_amax
  if found.own_tensor_amax is not None:
    one.set_tensor_level_amax(found.own_tensor_amax)
