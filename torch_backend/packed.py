"""PackedWeight: the codes and scales of a compressed weight, in the place of the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

import core

TENSORS = ("codes", "scale", "tensor_scale", "zero_point", "offset")


class PackedWeight(nn.Module):
  """A weight held as packed codes and scales.

  `.half()`, `.bfloat16()` and `.to(dtype)` change the type that the weight is dequantized to; codes and scales stay what they are.

  Args:
    packed: codes and scales, of the weight in the layout [out, in, ...].
    offset: float32, added to what the codes stand for (affine quantization), or None.
    like: a tensor of the type and on the device that the weight is dequantized to.

  Attributes:
    spec: format of the codes.
    shape: of the weight, [out, in, ...].
    matmul: name of the arithmetic of the layer's product; None is that of the original forward.
    requires_grad_weight: whether the parameter it stands for was trained.
  """

  codes: Tensor
  scale: Tensor
  tensor_scale: Tensor | None
  zero_point: Tensor | None
  offset: Tensor | None

  def __init__(self, packed: core.PackedTensor, offset: Tensor | None, like: Tensor) -> None:
    super().__init__()
    self.spec, self.shape = packed.spec, packed.shape
    self.matmul: str | None = None
    self.requires_grad_weight = True
    for name, value in zip(TENSORS, (*packed[:4], offset), strict=True):
      self.register_buffer(name, value)
    self.register_buffer("_like", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)

  @classmethod
  def empty(cls, state_dict: Mapping[str, Tensor], prefix: str, spec: core.QuantSpec, shape: tuple[int, ...], like: Tensor) -> PackedWeight:
    """Room for the codes and scales of a state dict, which are not read yet.

    Raises:
      ValueError: they are not those of a weight of that format and shape.
    """
    expected = core.packed_shape(spec, shape)
    found = tuple(state_dict[f"{prefix}codes"].shape)
    if found != expected:
      raise ValueError(
        f"{prefix}codes has shape {list(found)}; a weight {list(shape)} as {spec.element.name} has {list(expected)}; "
        "quantize the model with the configuration that the state was made with"
      )
    parts = [None if (t := state_dict.get(prefix + name)) is None else torch.empty_like(t, device=like.device) for name in TENSORS]
    return cls(core.PackedTensor(*parts[:4], spec, shape), parts[4], like)  # type: ignore[arg-type]

  @property
  def dtype(self) -> torch.dtype:
    return self._like.dtype  # type: ignore[return-value]

  @property
  def like(self) -> Tensor:
    """An empty tensor of the type that the weight is dequantized to."""
    return self._like  # type: ignore[return-value]

  @property
  def nbytes(self) -> int:
    return sum(t.numel() * t.element_size() for name in TENSORS if (t := self._buffers[name]) is not None)

  @property
  def packed(self) -> core.PackedTensor:
    return core.PackedTensor(self.codes, self.scale, self.tensor_scale, self.zero_point, self.spec, self.shape)

  def buffers_by_name(self) -> dict[str, Tensor | None]:
    """Codes, scales and offset; None where there is none."""
    return {name: self._buffers[name] for name in TENSORS}

  def quantized(self) -> core.QuantizedTensor:
    """Codes and scales, not packed, as numpy arrays."""
    parts = [None if (t := self._buffers[name]) is None else np.array(t.detach().cpu().numpy()) for name in TENSORS[:4]]
    return core.unpack_tensor(core.PackedTensor(*parts, self.spec, self.shape))  # type: ignore[arg-type]

  def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
    for key, buffer in self._buffers.items():
      if buffer is not None:
        moved = fn(buffer)
        self._buffers[key] = moved if key == "_like" or moved.dtype == buffer.dtype else buffer.to(moved.device)
    return self

  def extra_repr(self) -> str:
    return f"{self.spec.element.name}, {list(self.shape)}, {self.nbytes} bytes, dequantized to {self.dtype}"
