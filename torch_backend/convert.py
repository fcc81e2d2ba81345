"""quantize: convert a model's layers in place, apply the rules, calibrate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from core import compression
from core.config import ConfigWarning, check_effect, normalize
from core.state import as_given
from torch_backend import edit, groups
from torch_backend.calibrate import ForwardLoop, run
from torch_backend.modules import QuantModule, quantized_class
from torch_backend.names import compressed_layers, quantizers
from torch_backend.sequential import tensor_quantizers
from torch_backend.snapshot import restored_on_error


def quantize(
  model: nn.Module,
  config: Mapping[str, Any],
  forward_loop: ForwardLoop | None = None,
  group_rules: Iterable[str] | None = None,
  report: list[dict[str, Any]] | None = None,
) -> nn.Module:
  """Quantize a model in place: convert its layers, apply the rules, calibrate.

  The model computes with simulated quantization afterwards and can be trained. A model that is quantized already starts over with the
  new configuration. If anything raises, the model is left as it was.

  Args:
    model: any nn.Module; its parameters change only by algorithms that find new weights (GPTQ, AWQ, ...).
    config: {"quant_cfg": ..., "algorithm": ...}, for example `INT8_DEFAULT_CFG`.
    forward_loop: called with the model, in evaluation mode without gradients; runs it on calibration data. Static activation quantizers
      need it; without data they warn and take amax from each input.
    group_rules: siblings that share tensor-level scales, for example ["q_proj|k_proj|v_proj"]; None is the default list, () turns it off.
    report: a list that gets one dict per layer and algorithm: what was chosen, error before and after (`print_calibration_report`).

  Returns:
    The same model.

  Raises:
    ValueError: the configuration is wrong or quantizes nothing, or the calibration data hold NaN or infinity.
    TypeError: model is no nn.Module, or forward_loop no function.
  """
  if not isinstance(model, nn.Module):
    raise TypeError(f"quantize takes an nn.Module, got {type(model).__name__}")
  compression.refuse_compressed(compressed_layers(model), "quantize")
  plan = normalize(config)
  with restored_on_error(model):
    convert(model)
    check_effect(plan.entries, edit.names_with_classes(model))
    edit.reset(model)
    edit.apply(model, plan.entries)
    groups.assign(model, group_rules)
    run(model, plan.algorithm, forward_loop, report)
    model.__dict__["_quantization_config"] = as_given(config)  # for `save`
  return model


def convert(model: nn.Module) -> None:
  """Give every module that has a quantized class that class, with all quantizers off. Converted modules are left alone."""
  for name, module in list(model.named_modules()):
    target = quantized_class(type(module))
    if target is not None and _can_hold(module, name):
      module.__class__ = target
      module._setup()  # type: ignore[operator]
      _settle(module)
  _open_fused_layers(model)
  for name, quantizer in quantizers(model).items():
    quantizer.name = name
    for place, one in enumerate(tensor_quantizers(quantizer)):
      one.name = name if one is quantizer else f"{name}.{place}"


def _open_fused_layers(model: nn.Module) -> None:
  """Keep torch's fused layers from reading weights past the quantizers, and name those that do so by design."""
  attention = []
  for name, module in model.named_modules():
    if isinstance(module, nn.MultiheadAttention):
      attention.append(name)
    if isinstance(module, nn.TransformerEncoderLayer):
      # Its path for evaluation uses the weights of its layers without calling them; this attribute is what it asks first.
      module.activation_relu_or_gelu = 0
  if attention:
    warnings.warn(
      f"nn.MultiheadAttention computes its projections without calling a layer, so they stay unquantized: {', '.join(attention)}",
      ConfigWarning,
      stacklevel=4,
    )


def _can_hold(module: nn.Module, name: str) -> bool:
  weight = module._parameters.get("weight")
  if weight is None or (weight.is_floating_point() and not isinstance(weight, nn.UninitializedParameter)):
    return True
  what = "not initialized yet" if isinstance(weight, nn.UninitializedParameter) else f"of dtype {weight.dtype}"
  warnings.warn(f"{name} ({type(module).__name__}) stays unquantized: its weight is {what}", ConfigWarning, stacklevel=4)
  return False


def _settle(module: nn.Module) -> None:
  """Quantizers of a new quantized module: on its device, in its mode, off until a rule says otherwise."""
  device = next((p.device for p in module.parameters()), torch.device("cpu"))
  for child in module.children():
    if not isinstance(child, QuantModule) and child in quantizers(module).values():
      child.to(device)
      child.train(module.training)
