"""Straight-through estimators: the forward value is `core`'s, the gradient is the identity, or the identity inside the range.

References: Bengio et al., 2013, arXiv:1308.3432; the clipped form: Choi et al., 2018, arXiv:1805.06085 (PACT).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
  """Value of `y`, gradient to `x` unchanged."""

  generate_vmap_rule = True

  @staticmethod
  def forward(x: Tensor, y: Tensor) -> Tensor:
    return y.view_as(y)

  @staticmethod
  def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    pass

  @staticmethod
  def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
    return grad, None


class ClippedStraightThrough(torch.autograd.Function):
  """Value of `y`, gradient to `x` where `inside`, zero elsewhere."""

  generate_vmap_rule = True

  @staticmethod
  def forward(x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    return y.view_as(y)

  @staticmethod
  def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])

  @staticmethod
  def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
    (inside,) = ctx.saved_tensors
    return torch.where(inside, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)), None, None


def straight_through(x: Tensor, y: Tensor, inside: Tensor | None = None) -> Tensor:
  """The value y with a gradient to x.

  Args:
    x: the tensor before quantization.
    y: the tensor after it, no gradient attached.
    inside: None passes every gradient; otherwise a bool mask of x's shape, the gradient is zero where it is False.

  Returns:
    y, as a function of x where gradients are recorded.
  """
  if not (torch.is_grad_enabled() and x.requires_grad):
    return y
  if inside is None:
    return StraightThrough.apply(x, y)
  return ClippedStraightThrough.apply(x, y, inside)
