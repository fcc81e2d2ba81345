"""The floor: how far a model is from itself when only the order of summation in its matmuls changes.

Every linear layer multiplies after quantization, with the input channels of both factors permuted alike: mathematically the same sum, in
another order. Two backends agree when they differ no more than one of them does from itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PermutedSums(TorchFunctionMode):
  """While active, `F.linear(x, w)` sums over its input channels in a random order, always the same one for a width and seed."""

  def __init__(self, seed: int) -> None:
    super().__init__()
    self.seed = seed
    self._orders: dict[int, torch.Tensor] = {}

  def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    if func is not F.linear:
      return func(*args, **(kwargs or {}))
    x, weight, *bias = args
    width = x.shape[-1]
    order = self._orders.get(width)
    if order is None:
      order = self._orders[width] = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed + width))
    return func(x[..., order], weight[:, order], *bias, **(kwargs or {}))


class Permuted:
  """A torch model (`on_torch.Quantized` or `on_torch.Model`) that sums in another order."""

  def __init__(self, model: Any, seed: int) -> None:
    self._model, self._seed = model, seed

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    with PermutedSums(self._seed):
      return self._model(ids)

  def run(self, ids: np.ndarray, on_quantizer: Any, on_layer: Any) -> np.ndarray:
    with PermutedSums(self._seed):
      return self._model.run(ids, on_quantizer, on_layer)
