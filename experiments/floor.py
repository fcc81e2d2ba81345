"""The floor: how far a model is from itself when only the order of summation in its matmuls changes.

Every matmul multiplies after quantization, with the contracted axis of both factors permuted alike: mathematically the same sum, in another
order. Two backends agree when they differ no more than one of them does from itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PermutedSums(TorchFunctionMode):
  """While active, every matmul sums in a random order, always the same one for a length and seed.

  Reordered are the input channels of `F.linear`, the head's channels in `F.scaled_dot_product_attention`, and the contracted axes of
  `torch.matmul` and of `torch.einsum` with two operands. Attention must be among them: products of FP4 codes and their sums are exact in
  float32, so that for MXFP4 another order in the linear layers alone changes nothing.
  """

  def __init__(self, seed: int) -> None:
    super().__init__()
    self.seed = seed
    self._orders: dict[int, torch.Tensor] = {}
    self._reordered = {
      F.linear: lambda x, weight, *rest: (self._on(x, -1), self._on(weight, -1), *rest),
      F.scaled_dot_product_attention: lambda query, key, *rest: (self._on(query, -1), self._on(key, -1), *rest),
      torch.matmul: self._matmul,
      torch.Tensor.matmul: self._matmul,
      torch.Tensor.__matmul__: self._matmul,
      torch.einsum: self._einsum,
    }

  def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    reorder = self._reordered.get(func)
    return func(*(args if reorder is None else reorder(*args)), **(kwargs or {}))

  def _on(self, x: torch.Tensor, axis: int) -> torch.Tensor:
    length = x.shape[axis]
    if length not in self._orders:
      self._orders[length] = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed + length))
    return x.index_select(axis, self._orders[length].to(x.device))

  def _matmul(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return self._on(a, -1), self._on(b, -2 if b.ndim > 1 else -1)

  def _einsum(self, equation: str, *operands: Any) -> tuple[Any, ...]:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or len(operands) != 2 or len(letters) != 2 or "." in equation:
      return equation, *operands
    one, other = operands
    for letter in set(letters[0]) & set(letters[1]) - set(output):
      one, other = self._on(one, letters[0].index(letter)), self._on(other, letters[1].index(letter))
    return equation, one, other


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
