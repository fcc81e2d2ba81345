"""The attention mask of a call, however it was given, and max calibration without the tokens that it marks as padding."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import core
from core.calibrate.host import Host
from core.config import ConfigWarning
from core.config.schema import QuantizerConfig

NAME = "attention_mask"


def mask_argument(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
  """The argument `attention_mask` [B, T] of a call, by keyword or by position; None where there is none of that name and rank.

  Args:
    function: what is called.
    args: of the call; `self` is the first where the function is an unbound method.
    kwargs: of the call.
  """
  mask = kwargs.get(NAME)
  if NAME not in kwargs:
    try:
      mask = inspect.signature(function).bind_partial(*args).arguments.get(NAME)
    except (TypeError, ValueError):  # no signature, or arguments that do not fit: the call itself will say so
      return None
  return mask if getattr(mask, "ndim", 0) == 2 else None


def tokens_first(name: str, x: Any) -> Any:
  """A tensor [B, heads, T, D] at a quantizer of an attention's queries, keys or values as [B, T, heads D], the form that a mask [B, T]
  fits; any other as it is.

  Args:
    name: of the quantizer.
    x: numpy array or tensor.
  """
  if name.rpartition(".")[2] not in ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer") or x.ndim != 4:
    return x
  batch, heads, tokens, size = x.shape
  return x.swapaxes(1, 2).reshape(batch, tokens, heads * size)


def max_without_padding(host: Host) -> None:
  """Max calibration of the activations once more, over the tokens that are no padding; weights and what siblings share stay in step.

  It serves quantizers with one amax for the whole tensor (dynamic two-level formats too, by their tensor amax). The others keep their
  amax, padding included, and a warning names them.

  Args:
    host: made with exclude_padding, after max calibration.
  """
  configs = {name: config for name, config in host.activation_configs().items() if config.needs_calibration}
  served = {name: config for name, config in configs.items() if _whole_tensor(config)}
  found: dict[str, np.ndarray] = {}

  def visit(name: str, x: np.ndarray) -> None:
    if x.size:
      amax = np.asarray(core.amax(x, served[name].spec), np.float32)
      found[name] = np.maximum(found[name], amax) if name in found else amax

  if served:
    host.observe_tensors(visit, list(served))
  for name, amax in found.items():
    host.set_amax(name, amax.reshape(()))
  host.settle()
  left = [name for name in configs if name not in served]
  if left:
    shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
    warnings.warn(
      f"exclude_padding serves quantizers with one amax per tensor; {len(left)} others keep an amax that counts padding: {shown}",
      ConfigWarning,
      stacklevel=2,
    )


def _whole_tensor(config: QuantizerConfig) -> bool:
  spec = config.spec
  plain = spec.blocks is None and not spec.axis and not spec.zero_point
  return (plain or (spec.two_level and spec.dynamic)) and config.bias is None and config.calibrator == "max"
