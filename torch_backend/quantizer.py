"""TensorQuantizer: one tensor's format, granularity and calibrated state, as a module that fake quantizes what passes through it."""

from __future__ import annotations

import torch
from torch import Tensor

import core
from core import hadamard
from torch_backend import statistics
from torch_backend.quantizer_state import QuantizerState
from torch_backend.ste import straight_through


class TensorQuantizer(QuantizerState):
  """Fake quantizes a tensor: x -> dequantize(quantize(x)), with a straight-through gradient.

  The order of a call: multiply by `pre_quant_scale`, rotate, subtract the bias, quantize and dequantize, add the bias, rotate back. The
  first two also happen while the quantizer is disabled, since the layer behind expects them.

  Statistics are float32 buffers and stay float32 under `.half()`, `.bfloat16()` and `.to(dtype)`. A static quantizer without amax takes
  it from each input, as a dynamic one does.

  Args:
    config: attributes as in a quantization config, for example {"num_bits": (4, 3), "axis": None}, or a QuantizerConfig. None is INT8
      with one scale.
    enable: whether it starts enabled.
    share_leading: static scales do not depend on the axes that `block_sizes` leaves unnamed (an activation's batch and positions).

  Attributes:
    config: the validated configuration.
    name: dotted path in the model, for messages.
    group: key that sibling quantizers share (see `torch_backend.groups`), or None.
  """

  def forward(self, x: Tensor) -> Tensor:
    if self._passes:
      return x
    if not x.is_floating_point():
      raise TypeError(f"quantizer {self.name!r} got a tensor of dtype {x.dtype}; float32, bfloat16, float16 and float64 can be quantized")
    if x.numel() == 0:
      return x
    given = x
    if self._transforms:
      x = self._transform(x)
    if self._enabled:
      if self._calibrating:
        self._running.collect(x, self.config, self._share_leading, self.name)
      if self._quantizing:
        x = self._quantize(x)
    if self._rotates_back:
      x = hadamard.unrotate(x, self._rotation.block_size, self._rotation.seed)
    return core.cast_saturating(x, given)

  def scaled(self, x: Tensor) -> Tensor:
    """x times pre_quant_scale and rotated, in the type of x: what a call rounds."""
    return core.cast_saturating(self._transform(x), x) if self._transforms else x

  def _transform(self, x: Tensor) -> Tensor:
    """x scaled and rotated, in float32: the result of a call is cast once, at its end."""
    if self._pre_quant_scale is not None:
      x = x.to(torch.float32) * self._pre_quant_scale
    if self._rotates:
      x = hadamard.rotate(x, self._rotation.block_size, self._rotation.seed)
    return x

  def _quantize(self, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and self._scales_from != self._versions():
      self._refresh()  # somebody wrote into the amax buffer
    if self.config.bias is None:
      return self._fake_quantize(x)
    bias = self._bias_value
    if bias is None:
      bias = statistics.bias_of(x, self.config.bias)
    return core.cast_saturating(self._fake_quantize(x.to(torch.float32) - bias) + bias, x)

  def _fake_quantize(self, x: Tensor) -> Tensor:
    amax, scales, tensor_amax = self._amax, self._scales, self._tensor_amax
    if self._share_leading and amax is not None and amax.ndim:
      amax, scales = statistics.fit(x, self.spec, amax, scales)
    y = core.fake_quantize(x.detach(), self.spec, amax, tensor_amax=tensor_amax, scales=scales, key=self._next_key())
    if self.config.pass_through_bwd or amax is None or not x.requires_grad:
      return straight_through(x, y)
    return straight_through(x, y, statistics.inside(x.detach(), self.spec, amax))

  def codes(self, x: Tensor) -> tuple[core.QuantizedTensor, Tensor | None]:
    """What a call's result is made of: (codes and scales; float32 offset that is added to what they stand for, or None)."""
    x = self._transform(x) if self._transforms else x
    bias = None
    if self.config.bias is not None:
      bias = statistics.bias_of(x, self.config.bias) if self._bias_value is None else self._bias_value
      x = x.to(torch.float32) - bias
    return core.quantize(x, self.spec, self._amax, tensor_amax=self._tensor_amax), bias

  def from_codes(self, packed: core.PackedTensor, offset: Tensor | None, like: Tensor) -> Tensor:
    """What a call would have returned, from the `codes` of its argument; in the type of `like`."""
    y = core.dequantize_packed(packed)
    if offset is not None:
      y = y + offset
    if self._rotates_back:
      y = hadamard.unrotate(y, self._rotation.block_size, self._rotation.seed)
    return core.cast_saturating(y, like)

  def preview(self, x: Tensor) -> Tensor:
    """x quantized with its own amax (or the constant one): what the next quantizer of a sequence calibrates on, in whatever order batches
    come."""
    other = TensorQuantizer(self.config, enable=self._enabled).to(x.device)
    other.pre_quant_scale = self._pre_quant_scale
    return other(x.detach())

  def _next_key(self) -> tuple[Tensor, Tensor] | None:
    if self._key is None:
      return None
    key = self._key.clone()
    self._key.add_(torch.tensor([0, 1], dtype=torch.int32, device=key.device))
    return key[0], key[1]

  def sibling(self) -> TensorQuantizer:
    """Another quantizer of the same role, mode and device, without statistics."""
    other = TensorQuantizer(self.config, enable=self._enabled, share_leading=self._share_leading)
    other.group = self.group
    return other.train(self.training)
