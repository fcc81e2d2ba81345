"""What a quantizer remembers: its configuration, switches and statistics. `quantizer.TensorQuantizer` adds the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

import core
from core.config import QuantizerConfig, RotateSpec
from torch_backend import statistics

Attributes = Mapping[str, Any] | QuantizerConfig


class QuantizerState(nn.Module):
  """Configuration, switches and float32 statistics of one quantizer."""

  def __init__(self, config: Attributes | None = None, *, enable: bool = True, share_leading: bool = False) -> None:
    super().__init__()
    self.name = ""
    self.group: str | None = None
    self.own_tensor_amax: float | None = None
    self._share_leading = share_leading
    self._calibrating = False
    self._quantizing = True
    self._folded = False
    self._enabled = enable
    self._epoch = 0
    self._running = statistics.Running()
    self._scales: core.Scales | None = None
    self._scales_from: tuple[int, int] | None = None
    for buffer in ("_amax", "_tensor_amax", "_pre_quant_scale", "_bias_value", "_key"):
      self.register_buffer(buffer, None)
    for parameter in ("low_rank_a", "low_rank_b"):
      self.register_parameter(parameter, None)
    self._configure(config_of(config or {"num_bits": 8}))

  # -- configuration -------------------------------------------------------------------------------------------------------------

  def set_from_attribute_config(self, attributes: Attributes) -> None:
    """Replace the whole configuration; an "enable" among the attributes is applied as well. A changed format drops the statistics.

    Raises:
      ValueError: unknown or contradictory attributes.
    """
    config = config_of(attributes)
    enable = attributes.get("enable", True) if isinstance(attributes, Mapping) else True
    if config.spec != self.config.spec or config.bias != self.config.bias:
      self.reset_amax()
      self._bias_value = None
    self._configure(config)
    self.enable() if enable else self.disable()

  def _configure(self, config: QuantizerConfig) -> None:
    config.check_simulated(self.name)
    self.config = config
    self.spec = config.spec
    stochastic = config.spec.rounding == "stochastic"
    self._key = torch.zeros(2, dtype=torch.int32) if stochastic else None
    if config.constant_amax is not None:
      self._amax = torch.tensor(float(config.constant_amax), dtype=torch.float32)
    self._refresh()

  def enable(self) -> None:
    self._enabled, self._folded = True, False
    self._refresh()

  def disable(self) -> None:
    self._enabled = False
    self._refresh()

  @property
  def is_enabled(self) -> bool:
    return self._enabled

  def enable_quant(self) -> None:
    self._quantizing = True

  def disable_quant(self) -> None:
    """Let values pass unquantized; statistics are still collected where calibration is on."""
    self._quantizing = False

  def enable_calib(self) -> None:
    """Collect statistics from every input until `disable_calib`."""
    self._calibrating = True
    self._running = statistics.Running()

  def disable_calib(self) -> None:
    self._calibrating = False

  @property
  def is_folded(self) -> bool:
    return self._folded

  @property
  def is_quantizing(self) -> bool:
    return self._quantizing

  @property
  def acts(self) -> bool:
    """Whether a call changes its input at all (a rotation acts while the quantizer is off)."""
    return not self._passes

  @property
  def is_pass_through(self) -> bool:
    """Whether the gradient of a call is the identity, whatever the values."""
    return self.config.pass_through_bwd and not self._transforms

  @property
  def is_calibrating(self) -> bool:
    return self._calibrating

  def set_folded(self) -> None:
    """The tensor has been quantized in place: pass it through untouched, until `enable()`."""
    self._enabled, self._folded = False, True
    self._refresh()

  # -- statistics ----------------------------------------------------------------------------------------------------------------

  @property
  def amax(self) -> Tensor | None:
    """Calibrated amax, float32, of the shape of `core.amax(x, spec)`; for dynamic NVFP4 the tensor amax. None before calibration."""
    return self._amax

  @amax.setter
  def amax(self, value: Any) -> None:
    if value is None:
      self.reset_amax()
      return
    if self.is_dynamic:
      raise ValueError(f"quantizer {self.name!r} ({self.config.describe()}) takes its scales from each input; it has no amax to set")
    self._amax = statistics.checked_amax(value, self._amax, self.spec, self.name)
    self._refresh()

  @property
  def tensor_amax(self) -> Tensor | None:
    """[] float32 amax behind the second-level scale of NVFP4; None for one-level formats and before calibration."""
    if not self.spec.two_level:
      return None
    if self.spec.dynamic:
      return self._amax
    if self._tensor_amax is None and self._amax is not None:
      return self._amax.max()
    return self._tensor_amax

  @tensor_amax.setter
  def tensor_amax(self, value: Any) -> None:
    if not self.spec.two_level:
      raise ValueError(f"quantizer {self.name!r} ({self.config.describe()}) has no second-level scale; set amax instead")
    if self.spec.dynamic:
      self.amax = value
      return
    self._tensor_amax = None if value is None else statistics.checked_amax(value, self._amax, self.spec, self.name).reshape(())
    self._refresh()

  def tensor_level_amax(self) -> Tensor | None:
    """[] amax of the scale that covers the whole tensor: the second level of NVFP4, the only one of per-tensor formats; else None."""
    if self.spec.two_level:
      return self.tensor_amax
    return self._amax if self._amax is not None and self._amax.ndim == 0 else None

  def set_tensor_level_amax(self, value: float) -> None:
    """Set what `tensor_level_amax` returns."""
    if self.spec.two_level:
      self.tensor_amax = value
    else:
      self.amax = value

  @property
  def pre_quant_scale(self) -> Tensor | None:
    """[K] or scalar float32 factor on the input before quantization (SmoothQuant, AWQ)."""
    return self._pre_quant_scale

  @pre_quant_scale.setter
  def pre_quant_scale(self, value: Any) -> None:
    if value is not None:
      value = torch.as_tensor(value, dtype=torch.float32).detach().clone()
      if not bool(torch.isfinite(value).all()):
        raise ValueError(f"pre_quant_scale of quantizer {self.name!r} holds NaN or infinity")
    self._pre_quant_scale = value
    self._refresh()

  def set_low_rank(self, a: Any, b: Any) -> None:
    """Give the layer of this weight quantizer a branch b (a x) beside the quantized weight (SVDQuant); None, None takes it away.

    Args:
      a: [r, K]; x is the input after its pre_quant_scale, not quantized.
      b: [N, r].

    Raises:
      ValueError: the two do not fit each other.
    """
    if a is None or b is None:
      self.low_rank_a = self.low_rank_b = None
      return
    a, b = (torch.as_tensor(np.array(value, np.float32)).to(self._device()) for value in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
      raise ValueError(f"low-rank factors of {self.name!r} have shapes {list(a.shape)} and {list(b.shape)}; need [r, K] and [N, r]")
    self.low_rank_a, self.low_rank_b = nn.Parameter(a), nn.Parameter(b)

  @property
  def has_low_rank(self) -> bool:
    return self.low_rank_a is not None

  def _device(self) -> torch.device:
    held = next((b for b in self._buffers.values() if b is not None), None)
    return torch.device("cpu") if held is None else held.device

  @property
  def bias_value(self) -> Tensor | None:
    """Calibrated bias of affine quantization, float32; None without one."""
    return self._bias_value

  @property
  def maxbound(self) -> float:
    """Level that amax maps to: 127 for INT8, 448 for E4M3."""
    return self.spec.element_bound

  @property
  def step_size(self) -> Tensor | None:
    """Float32 step of every group: a value is step * level. None where it depends on the input."""
    return None if self._scales is None else self._scales.step

  @property
  def scales(self) -> core.Scales | None:
    """Scales of the calibrated state, kept so that a call does not compute them again. None where they depend on the input."""
    return self._scales

  @property
  def is_dynamic(self) -> bool:
    """Whether every scale is taken from each input, so that no amax is ever kept (dynamic NVFP4 keeps its tensor amax)."""
    return self.spec.dynamic and not self.spec.two_level and self.config.constant_amax is None

  @property
  def has_statistics(self) -> bool:
    """Whether calibration has seen data."""
    return self._running.amax is not None

  def load_calib_amax(self) -> None:
    """Turn what was collected since `enable_calib` into amax.

    Raises:
      ValueError: nothing was collected.
    """
    amax = self._running.result(self.config, self.name)
    if amax is None:
      raise ValueError(f"quantizer {self.name!r} has seen no data since enable_calib(); run the model on calibration data first")
    if self._running.bias is not None and self.config.bias is not None and not self.config.bias.dynamic:
      self._bias_value = self._running.bias
    if not self.is_dynamic:
      self._amax = amax
    if self.spec.two_level and not self.spec.dynamic:
      self._tensor_amax = amax.max()
    self._running = statistics.Running()
    self._refresh()

  def reset_amax(self) -> None:
    """Forget the calibrated state, the bias included; a constant amax stays."""
    self._amax = self._tensor_amax = self._bias_value = self.own_tensor_amax = None
    self._configure(self.config)

  def drop_block_amax(self) -> None:
    """Forget amax of blocks and channels, and the scales kept with it: the stored codes of a compressed weight have their own."""
    if self._amax is not None and self._amax.numel() > 1:
      self._amax = None
    self._refresh()
    self._scales = None

  # -- upkeep --------------------------------------------------------------------------------------------------------------------

  def state_key(self) -> tuple[Any, ...]:
    """A value that changes whenever the result for one and the same input may change."""
    return self._epoch, self._versions(), self._quantizing

  def _versions(self) -> tuple[int, int]:
    return statistics.version(self._amax), statistics.version(self._tensor_amax)

  def _refresh(self) -> None:
    """Recompute what a call reads: the scales, and which steps it has."""
    self._epoch += 1
    self._rotation = self.config.rotate or RotateSpec()
    self._rotates = self.config.rotate is not None and not self._folded
    self._rotates_back = self._rotates and self._rotation.mode == "rotate_back"
    self._transforms = self._rotates or (self._pre_quant_scale is not None and not self._folded)
    self._passes = not self._enabled and not self._transforms
    self._scales_from = self._versions()
    self._scales = None
    depends_on_input = self.spec.is_mx or self.spec.four_over_six or (self.spec.two_level and self.spec.dynamic)
    if self._amax is not None and not self._amax.is_meta and not depends_on_input:
      with torch.no_grad():
        self._scales = core.scales(self._amax, self.spec, tensor_amax=self._tensor_amax)

  def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
    for key, buffer in self._buffers.items():
      if buffer is not None:
        moved = fn(buffer)
        self._buffers[key] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)  # statistics stay float32
    for parameter in self._parameters.values():
      if parameter is not None:
        parameter.data = fn(parameter.data)
    self._refresh()
    return self

  def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in self._buffers:
      value = state_dict.get(prefix + key)
      if value is not None and self._buffers[key] is None:
        self._buffers[key] = torch.empty_like(value, dtype=value.dtype if key == "_key" else torch.float32)
    for key in self._parameters:
      value = state_dict.get(prefix + key)
      if value is not None and self._parameters[key] is None:
        self._parameters[key] = nn.Parameter(torch.empty_like(value))
    super()._load_from_state_dict(state_dict, prefix, *args)
    self._refresh()

  def extra_repr(self) -> str:
    if not self._enabled:
      return "folded" if self._folded else "disabled"
    return f"{self.config.describe()}, {statistics.describe_amax(self._amax)}"


def config_of(config: Attributes) -> QuantizerConfig:
  """The validated configuration of attributes, whose "enable" is no part of it."""
  if isinstance(config, QuantizerConfig):
    return config
  if not isinstance(config, Mapping):
    raise TypeError(f"a quantizer's configuration is a dict of attributes or a QuantizerConfig, got {type(config).__name__}")
  return QuantizerConfig.from_attributes({k: v for k, v in config.items() if k != "enable"})
