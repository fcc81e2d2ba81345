"""What calibration keeps of a tensor: running amax and bias, in float32, and how they fit a later input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import core
from core import affine, blocks, model_table
from core.calibrate import calibrators
from core.calibrate.histogram import Histogram
from core.config.options import BiasSpec
from core.config.schema import QuantizerConfig
from core.spec import QuantSpec


class Running:
  """Running statistics of one quantizer. Tensors are replaced, never written into.

  Attributes:
    amax: largest amax so far, float32, or None.
    bias: running mean of the batches' means, or middle of the running range; None without an affine bias.
    histogram: of |x|, where the configuration's calibrator asks for one; else None.
  """

  def __init__(self) -> None:
    self.amax: Tensor | None = None
    self.bias: Tensor | None = None
    self.histogram: Histogram | None = None
    self._low: Tensor | None = None
    self._high: Tensor | None = None
    self._total: Tensor | None = None
    self._batches = 0

  def collect(self, x: Tensor, config: QuantizerConfig, share_leading: bool, name: str) -> None:
    """Take one tensor into account.

    Raises:
      ValueError: x holds NaN or infinity, or its groups do not line up with those of the tensors before it.
    """
    x = x.detach()
    check_finite(x, name)
    if config.bias is not None:
      x = x.to(torch.float32)
      x = x - self._next_bias(x, config.bias)
    try:
      amax = core.amax(x, config.spec)
    except ValueError as error:
      raise ValueError(f"quantizer {name!r}: {error}") from error
    if share_leading:
      amax = reduce_leading(amax, config.spec)
    if self.amax is not None and self.amax.shape != amax.shape:
      raise ValueError(
        f"quantizer {name!r} ({config.describe()}) has amax of shape {list(self.amax.shape)}; a tensor of shape {list(x.shape)} "
        f"gives {list(amax.shape)}; calibrate with tensors of one layout, or use a dynamic quantizer"
      )
    self.amax = amax if self.amax is None else merge(self.amax, amax, config.spec)
    if config.calibrator == "histogram":
      self.histogram = self.histogram or calibrators.histogram(config)
      self.histogram.add(x)

  def result(self, config: QuantizerConfig, name: str) -> Tensor | None:
    """The amax of what has come: the largest, or what the histogram says; None before any."""
    if self.amax is None or self.histogram is None:
      return self.amax
    return torch.full_like(self.amax, calibrators.amax(self.histogram, config, name))

  def _next_bias(self, x: Tensor, spec: BiasSpec) -> Tensor:
    if spec.dynamic:
      return bias_of(x, spec)
    if spec.method == "mean":
      mean = bias_of(x, spec)
      self._total = mean if self._total is None else self._total + mean
      self._batches += 1
      bias = affine.running_mean(self._total, torch.full_like(self._total, self._batches))
    else:
      low, high = x.amin(dim=spec.axes, keepdim=True), x.amax(dim=spec.axes, keepdim=True)
      self._low = low if self._low is None else torch.minimum(self._low, low)
      self._high = high if self._high is None else torch.maximum(self._high, high)
      bias = affine.middle(self._low, self._high)
    self.bias = bias
    return bias


def merge(a: Tensor, b: Tensor, spec: QuantSpec) -> Tensor:
  """The amax (or, with a zero point, the range) that covers both."""
  if spec.zero_point:
    return torch.stack([torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])])
  return torch.maximum(a, b.to(a.device))


def check_finite(x: Tensor, name: str) -> None:
  """Raises:
  ValueError: x holds NaN or infinity; the message names the quantizer and counts them.
  """
  finite = torch.isfinite(x)
  if not bool(finite.all()):
    nan = int(torch.isnan(x).sum())
    infinite = x.numel() - int(finite.sum()) - nan
    raise ValueError(
      f"calibration data of quantizer {name!r} holds {nan} NaN and {infinite} infinite of {x.numel()} values (shape {list(x.shape)}); "
      "look for an overflow before this layer, or calibrate in float32 or bfloat16"
    )


def bias_of(x: Tensor, spec: BiasSpec) -> Tensor:
  """Bias of one tensor over the axes that `spec` reduces, kept as length 1: its mean, or the middle of its range. float32."""
  return affine.bias(x.detach(), spec.axes, spec.method)


def _trailing(spec: QuantSpec) -> tuple[int, ...] | None:
  """The axes that `spec` names, if all count from the end; then statistics need not know how many axes stand before them."""
  axes = tuple(a for a, _ in spec.blocks) if spec.blocks is not None else spec.axis
  return axes if axes and all(a < 0 for a in axes) else None


def reduce_leading(amax: Tensor, spec: QuantSpec) -> Tensor:
  """amax over every axis that `spec` does not name, without the axes before the first named one: [..., K/B] becomes [K/B].

  So a static scale of an activation belongs to a channel, not to one position of one calibration batch.
  """
  axes = _trailing(spec)
  if axes is None or not amax.ndim:
    return amax
  if spec.zero_point:
    low, high = reduce_leading(-amax[0], spec.replace(zero_point=False)), reduce_leading(amax[1], spec.replace(zero_point=False))
    return torch.stack([-low, high])
  unnamed = tuple(i for i in range(-amax.ndim, 0) if i not in axes)
  if unnamed:
    amax = amax.amax(dim=unnamed, keepdim=True)
  return amax.reshape(amax.shape[min(axes) :])


def fit(x: Tensor, spec: QuantSpec, amax: Tensor, scales: core.Scales | None) -> tuple[Tensor, core.Scales | None]:
  """amax and scales of `reduce_leading` in the shape that `core` expects for x (views, no copies)."""
  if spec.blocks is None or _trailing(spec) is None:
    return amax, scales
  target = blocks.tiling(x.shape, spec).scales
  if spec.zero_point:
    amax = torch.stack([amax[0].expand(target), amax[1].expand(target)])
  else:
    amax = amax.expand(target)
  if scales is not None:
    scales = core.Scales(
      scales.step.expand(target),
      scales.inv_step.expand(target),
      scales.scale,
      scales.tensor_scale,
      None if scales.zero_point is None else scales.zero_point.expand(target),
    )
  return amax, scales


def inside(x: Tensor, spec: QuantSpec, amax: Tensor) -> Tensor:
  """Where x lies within its group's amax (its group's range, with a zero point). Bool, x's shape."""
  if spec.zero_point:
    return (x >= _spread(amax[0], x, spec)) & (x <= _spread(amax[1], x, spec))
  return x.abs() <= _spread(amax.abs(), x, spec)  # a signed amax is the sign of a scale


def _spread(amax: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
  """Group values in a shape that broadcasts against x."""
  if spec.blocks is None or not amax.ndim:
    return amax
  for axis, size in spec.blocks:
    if size is not None:
      amax = amax.repeat_interleave(size, dim=axis).narrow(axis, 0, x.shape[axis])
  return amax


def checked_amax(value: Any, current: Tensor | None, spec: QuantSpec, name: str) -> Tensor:
  """An amax handed over by a user, as float32 on the quantizer's device.

  Raises:
    ValueError: NaN or infinite entries; negative ones where the specification has no signed scales.
  """
  device = current.device if current is not None else None
  tensor = torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone()
  if tensor.is_meta:
    return tensor
  signed = spec.zero_point or spec.allows_signed_scale
  if not bool(torch.isfinite(tensor).all()) or (not signed and bool((tensor < 0).any())):
    raise ValueError(
      f"amax of quantizer {name!r} must be finite{'' if signed else ' and not negative'}; "
      f"got values from {float(tensor.min())} to {float(tensor.max())}"
    )
  return tensor


def version(tensor: Tensor | None) -> int:
  """A number that changes when the tensor is written into; 0 where torch does not count (inference tensors)."""
  return 0 if tensor is None or tensor.is_inference() else tensor._version


def checksum(weight: Tensor) -> tuple[Any, ...]:
  """A cheap digest of a CPU tensor that notices in-place writes which torch does not count (`p.data.mul_(2)`); empty on other devices.

  The sum of the bits as integers notices any changed value, a sample of values notices a permutation. It reads the tensor once: about
  0.1 ms per million float32 values on one core, a twentieth of the matmul with 256 rows.
  """
  if weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
    return ()
  flat = weight.detach().reshape(-1)
  step = 1 + flat.numel() // 61
  integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[flat.element_size()]
  wide = torch.int64 if (flat.numel() * flat.element_size()) % 8 == 0 and flat.data_ptr() % 8 == 0 else integers
  return int(flat.view(wide).sum()), *flat.view(integers)[::step].tolist()


def describe_amax(amax: Tensor | None) -> str:
  """Short text: "amax=3.1", "amax=[0.02, 0.4] (384, 1)" or "amax from each input"."""
  if amax is None:
    return "amax from each input"
  if amax.is_meta:
    return f"amax on meta {tuple(amax.shape)}"
  return f"amax={model_table.describe_range(float(amax.min()), float(amax.max()), tuple(amax.shape))}"
