"""Showing the inputs of layers to calibration, layers that read one tensor together, padding left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from core.calibrate.host import QUANTIZED, Visit
from core.calibrate.padding import mask_argument
from torch_backend.modules import QuantWeight
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers

Padding = Callable[[], Tensor | None]


class InputWatch:
  """While open, `visit(names, x)` is called for every tensor that layers of a running model read.

  Args:
    modules: layers by name.
    visit: gets the names of all layers that read the tensor one after the other, and the tensor as [T, K] float32 (float64 in a float64
      model).
    point: as in `core.calibrate.host`.
    padding: gives the attention mask [B, T] of the running call, or None.
  """

  def __init__(self, modules: Mapping[str, QuantWeight], visit: Visit, point: str, padding: Padding | None = None) -> None:
    self._modules = modules
    self._visit = visit
    self._point = point
    self._padding = padding
    self._tensor: Tensor | None = None
    self._names: list[str] = []
    self._handles: list[Any] = []

  def __enter__(self) -> Self:
    for name, module in self._modules.items():
      if module.stored_weight.ndim == 2:
        self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    for handle in self._handles:
      handle.remove()
    if kind is None:
      self._flush()

  def _hook(self, name: str) -> Callable[..., None]:
    def hook(module: QuantWeight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
      x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
      if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
        return
      if x is not self._tensor or not _same_view(self._modules[self._names[0]], module):
        self._flush()
        self._tensor = x
      self._names.append(name)

    return hook

  def _flush(self) -> None:
    x, names = self._tensor, tuple(dict.fromkeys(self._names))
    self._tensor, self._names = None, []
    if x is None:
      return
    with torch.no_grad():
      rows = self._rows(self._shown(self._modules[names[0]], x))
    self._visit(names, rows.to("cpu", torch.float64 if rows.dtype == torch.float64 else torch.float32).numpy())

  def _shown(self, module: QuantWeight, x: Tensor) -> Tensor:
    held = tensor_quantizers(module.input_quantizer)
    switched = [q for q in held if not q.is_quantizing] if self._point == QUANTIZED else []
    for quantizer in switched:
      quantizer.enable_quant()
    try:
      return module.input_quantizer(x.detach())
    finally:
      for quantizer in switched:
        quantizer.disable_quant()

  def _rows(self, shown: Tensor) -> Tensor:
    shown = without_padding(shown, None if self._padding is None else self._padding())
    return shown.reshape(-1, shown.shape[-1])


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
  """x [B, T, K] as [tokens, K] without those that the mask [B, T] leaves out; as it is where the mask does not fit."""
  return x if mask is None or mask.shape != x.shape[:-1] else x[mask.to(x.device, torch.bool)]


def _same_view(a: QuantWeight, b: QuantWeight) -> bool:
  """Whether two layers that read one tensor also see the same after their input quantizers."""
  pairs = list(zip(tensor_quantizers(a.input_quantizer), tensor_quantizers(b.input_quantizer), strict=False))
  return len(tensor_quantizers(a.input_quantizer)) == len(tensor_quantizers(b.input_quantizer)) and all(_alike(p, q) for p, q in pairs)


def _alike(a: TensorQuantizer, b: TensorQuantizer) -> bool:
  if a is b:
    return True
  if a.is_enabled != b.is_enabled or a.config != b.config:
    return False
  return _equal(a.pre_quant_scale, b.pre_quant_scale) and _equal(a.amax, b.amax)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
  return a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b)


class PaddingMask:
  """While open, calling it gives the attention mask [B, T] that the model was last called with, or None.

  Args:
    model: the whole model; the mask is its argument `attention_mask`.
    active: False never gives a mask.
  """

  def __init__(self, model: nn.Module, active: bool = True) -> None:
    self._model = model
    self._active = active
    self._last: Tensor | None = None

  def __enter__(self) -> Self:
    self._handle = self._model.register_forward_pre_hook(self._remember, with_kwargs=True)
    return self

  def __exit__(self, *_: Any) -> None:
    self._handle.remove()

  def __call__(self) -> Tensor | None:
    return self._last

  def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    self._last = mask_argument(type(module).forward, (module, *args), kwargs) if self._active else None
