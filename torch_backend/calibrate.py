"""Calibration: statistics of weights and activations become amax. `max` is the largest magnitude seen."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core import compression
from core.calibrate import algorithms, driver
from core.config import ConfigWarning
from core.config.algorithms import AlgorithmConfig, read_algorithm, register_algorithm_name
from core.config.frozen import thaw
from torch_backend import groups
from torch_backend.modules import QuantWeight
from torch_backend.names import compressed_layers, is_quantized, quantizers, walk
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import Quantizer, tensor_quantizers
from torch_backend.snapshot import evaluation, restored_on_error

ForwardLoop = Callable[[nn.Module], Any]
Algorithm = Callable[..., None]

_ALGORITHMS: dict[str, Algorithm] = {}


def register_algorithm(name: str, options: Iterable[str] | None = None) -> Callable[[Algorithm], Algorithm]:
  """Decorator that makes `algorithm: name` run a function of your own.

  Args:
    name: the method's name in a configuration.
    options: names of the options it takes; None for any.

  Returns:
    A decorator for `fn(model, forward_loop, **options)`, called in evaluation mode without gradients; it sets `amax`,
    `pre_quant_scale` or weights.
  """

  def register(fn: Algorithm) -> Algorithm:
    register_algorithm_name(name, options)
    _ALGORITHMS[name] = fn
    return fn

  return register


def calibrate(
  model: nn.Module, algorithm: Any = "max", forward_loop: ForwardLoop | None = None, report: list[dict[str, Any]] | None = None
) -> nn.Module:
  """Calibrate a quantized model again, in place.

  Args:
    model: a model that `quantize` has converted.
    algorithm: name, {"method": name, ...}, a list of these, or None (nothing happens).
    forward_loop: called with the model; runs it on calibration data.
    report: a list that gets one dict per layer and algorithm: what was chosen, error before and after (`print_calibration_report`).

  Returns:
    The model.

  Raises:
    ValueError: the model is not quantized, an unknown algorithm, or non-finite calibration data; the model is then as before.
    TypeError: forward_loop is no function.
  """
  if not is_quantized(model):
    raise ValueError("the model has no quantized modules; call quantize(model, config, forward_loop) first")
  with restored_on_error(model):
    run(model, read_algorithm(algorithm), forward_loop, report)
  return model


def run(
  model: nn.Module, algorithm: tuple[AlgorithmConfig, ...], forward_loop: ForwardLoop | None, report: list[dict[str, Any]] | None = None
) -> None:
  """Run calibration steps in order."""
  if forward_loop is not None and not callable(forward_loop):
    raise TypeError(f"forward_loop must be a function of the model, got {type(forward_loop).__name__}")
  compression.refuse_compressed(compressed_layers(model), "calibration")
  with evaluation(model), torch.no_grad():
    teacher = _teacher(model, algorithm, forward_loop)
    for step in algorithm:
      options = thaw(step.options)
      if step.method in _ALGORITHMS:
        _ALGORITHMS[step.method](model, forward_loop, **options)
      else:
        from torch_backend.host import TorchHost  # it calls back into this file

        host = TorchHost(model, forward_loop, bool(options.get("exclude_padding", False)), teacher)
        driver.run(host, algorithms.find(str(step.method), "torch_backend"), options, report)
  _warn_uncalibrated(model, forward_loop)


def _teacher(model: nn.Module, algorithm: tuple[AlgorithmConfig, ...], forward_loop: ForwardLoop | None) -> Any:
  """What the float model returns, where one of the algorithms tunes the whole model towards it; else None."""
  wants = [step for step in algorithm if step.method not in _ALGORITHMS and algorithms.find(str(step.method), "torch_backend").teacher]
  if not wants or forward_loop is None:
    return None
  from torch_backend.distill import Teacher
  from torch_backend.host import unquantized

  with unquantized(model):
    return Teacher.record(model, forward_loop, bool(wants[0].options.get("exclude_padding", False)))


@register_algorithm("max")
def max_calibrate(model: nn.Module, forward_loop: ForwardLoop | None = None, exclude_padding: bool = False, **_: Any) -> None:
  """amax of every weight, and of every activation over the forward loop; siblings then share their tensor-level scales.

  While the loop runs nothing is quantized, so that no layer's statistics depend on another's format. With `exclude_padding` the loop runs
  a second time, for the tokens that the call's attention_mask does not mark as padding.
  """
  compression.refuse_compressed(compressed_layers(model), "calibration")
  for quantizer, weight in weights(model):
    calibrate_tensor(quantizer, weight)
  calibrate_activations(model, forward_loop, lambda name: True)
  groups.merge(model)
  if exclude_padding and forward_loop is not None:
    from core.calibrate.padding import max_without_padding
    from torch_backend.host import TorchHost  # it calls back into this file

    max_without_padding(TorchHost(model, forward_loop, exclude_padding=True))


def calibrate_missing(model: nn.Module, forward_loop: ForwardLoop | None, inputs: bool = True) -> None:
  """As `max_calibrate`, for those quantizers alone that have no amax yet; for weights alone without `inputs`."""
  for quantizer, weight in weights(model):
    if any(_lacks_data(one) for one in tensor_quantizers(quantizer)):
      calibrate_tensor(quantizer, weight)
  missing = {name for name, q in activations(model).items() if any(_lacks_data(one) for one in tensor_quantizers(q))}
  if missing and inputs:
    calibrate_activations(model, forward_loop, missing.__contains__)
  groups.merge(model)


def calibrate_activations(model: nn.Module, forward_loop: ForwardLoop | None, which: Callable[[str], bool]) -> None:
  """amax of the activation quantizers of these names over the forward loop; nothing runs where none of them needs data."""
  chosen = {name: q for name, q in activations(model).items() if which(name) and needs_data(q)}
  if forward_loop is None or not chosen:
    return
  with collecting(model, chosen):
    forward_loop(model)
  for quantizer in chosen.values():
    for one in tensor_quantizers(quantizer):
      if one.has_statistics:
        one.load_calib_amax()


def calibrate_tensor(quantizer: Quantizer, tensor: Tensor) -> None:
  """Calibrate on one tensor that is at hand; of a sequence, each quantizer on what the one before it returns."""
  tensor = tensor.detach()
  for one in tensor_quantizers(quantizer):
    if one.is_enabled and one.config.needs_calibration:
      one.enable_calib()
      one.disable_quant()
      one(tensor)
      one.disable_calib()
      one.enable_quant()
      if one.has_statistics:
        one.load_calib_amax()
    tensor = one(tensor)


@contextlib.contextmanager
def collecting(model: nn.Module, chosen: Mapping[str, Quantizer]) -> Iterator[None]:
  """Nothing is quantized; the chosen static activation quantizers collect statistics."""
  switched = [one for quantizer in quantizers(model).values() for one in tensor_quantizers(quantizer)]
  wanted = {id(one) for q in chosen.values() for one in tensor_quantizers(q)}
  for one in switched:
    one.disable_quant()
    if id(one) in wanted and one.is_enabled and one.config.constant_amax is None and not one.spec.is_mx:
      one.enable_calib()
  try:
    yield
  finally:
    for one in switched:
      one.enable_quant()
      one.disable_calib()


def weights(model: nn.Module) -> Iterator[tuple[Quantizer, Tensor]]:
  """(quantizer, tensor in the layout its axes refer to) of every parameter with an enabled quantizer."""
  for name, quantizer, module in walk(model):
    parameter = _parameter(name, module)
    if parameter is not None and quantizer.is_enabled:
      is_weight = isinstance(module, QuantWeight) and quantizer is module.weight_quantizer
      yield quantizer, module.canonical(parameter) if is_weight else parameter  # type: ignore[operator]


def activations(model: nn.Module) -> dict[str, Quantizer]:
  """Enabled quantizers of everything that is no parameter, by name."""
  return {name: q for name, q, module in walk(model) if q.is_enabled and _parameter(name, module) is None}


def _parameter(name: str, module: nn.Module) -> Tensor | None:
  """The parameter that a quantizer named `<parameter>_quantizer` belongs to, if there is one."""
  attribute = name.rpartition(".")[2].removesuffix("_quantizer")
  if isinstance(module, QuantWeight) and attribute == "weight":
    return module.stored_weight
  return module._parameters.get(attribute)


def needs_data(quantizer: Quantizer) -> bool:
  """Whether max calibration must see data for it."""
  return any(_waits(one) for one in tensor_quantizers(quantizer))


def _waits(quantizer: TensorQuantizer) -> bool:
  needs_bias = quantizer.config.bias is not None and not quantizer.config.bias.dynamic
  return quantizer.is_enabled and (quantizer.config.needs_calibration or needs_bias)


def _lacks_data(quantizer: TensorQuantizer) -> bool:
  if not _waits(quantizer):
    return False
  needs_bias = quantizer.config.bias is not None and not quantizer.config.bias.dynamic
  return (quantizer.config.needs_calibration and quantizer.amax is None) or (needs_bias and quantizer.bias_value is None)


def _warn_uncalibrated(model: nn.Module, forward_loop: ForwardLoop | None) -> None:
  names = [name for name, q in activations(model).items() if any(_lacks_data(one) for one in tensor_quantizers(q))]
  if names:
    reason = "no forward_loop ran" if forward_loop is None else "the calibration data never reached them, or no algorithm calibrated them"
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    warnings.warn(
      f"{len(names)} static activation quantizers have no amax ({reason}) and take it from each input, as dynamic ones do: {shown}",
      ConfigWarning,
      stacklevel=4,
    )
