"""One copy of what nn.scan and nn.vmap stack: rows of its inputs, its statistics, its quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from core.calibrate.host import Visit
from jax_backend.quantizer import Quantizer
from jax_backend.tree import Path


class Rows:
  """Turns the tensors that modules show into rows for `visit`, stacked copies one by one, padding left out.

  Args:
    wanted: layer name -> (module path, index of the copy).
    visit: gets the names of the layers that read a tensor, and the tensor.
  """

  def __init__(self, wanted: Mapping[str, tuple[Path, tuple[int, ...]]], visit: Visit) -> None:
    self._names: dict[Path, dict[tuple[int, ...], str]] = {}
    for name, (path, index) in wanted.items():
      self._names.setdefault(path, {})[index] = name
    self._visit = visit

  def __call__(self, members: Sequence[tuple[Path, str]], x: np.ndarray, mask: np.ndarray | None) -> None:
    for index in self._names[members[0][0]]:
      names = tuple(self._names[path][index] for path, _ in members if index in self._names.get(path, {}))
      self._visit(names, rows_of(x[index], mask))


def rows_of(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
  """[T, K] of an activation [..., K], float32 or float64, without the tokens that the mask leaves out."""
  if mask is not None and mask.shape == x.shape[:-1]:
    x = x[mask.astype(bool)]
  return np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float64 if x.dtype == np.float64 else np.float32)


def stack_at(value: Any, index: tuple[int, ...]) -> np.ndarray | None:
  """A statistic [*stack, ...] of one copy, float32; None stays None."""
  return None if value is None else np.asarray(value, np.float32)[index]


def sliced(quantizer: Quantizer, index: tuple[int, ...]) -> Quantizer:
  """One copy of a stacked quantizer, as a quantizer without a stack."""
  if not index:
    return quantizer
  plain = {field: None if (held := getattr(quantizer, field)) is None else held[index] for field in ("amax", "tensor_amax", "bias")}
  return quantizer.replace(stack=(), pre_quant_scale=None, scales=None, low_rank_a=None, low_rank_b=None, **plain)


def merged(whole: Quantizer, one: Quantizer, index: tuple[int, ...]) -> Quantizer:
  """The stacked quantizer with one copy replaced."""
  if not index:
    return one
  if one.amax is None or whole.amax is None:
    return whole
  amax = jnp.asarray(whole.amax).at[index].set(one.amax)
  tensor = None if whole.tensor_amax is None else jnp.asarray(whole.tensor_amax).at[index].set(one.tensor_amax)
  return whole.with_amax(amax, tensor)
