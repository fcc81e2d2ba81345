"""Compressed weights on their way into files and out of them: codes in torch's layout there, in the order of the stored axes here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import core
from core import state as files
from jax_backend import layouts, tree
from jax_backend.packed import Packed, quantized
from jax_backend.quantizer import AnyQuantizer, Quantizer
from jax_backend.state_names import Slot
from jax_backend.tree import Path

Place = tuple[Path, str, tuple[int, ...]]
"""Module path, quantizer name, index of a stacked copy."""


def to_files(quantizer: Quantizer, index: tuple[int, ...], dtype: str) -> files.Packed:
  """One copy of a compressed weight, for the files.

  Args:
    quantizer: the (first) weight quantizer.
    index: which of the stacked copies.
    dtype: type that it is dequantized to, as the files call it.
  """
  held: Packed = quantizer.packed.at(index)
  seen, _ = quantizer.view(held.shape)
  offset = None if held.offset is None else _to_torch(np.asarray(held.offset, np.float32), seen)
  return files.Packed.of(core.pack_tensor(quantized(quantizer, index)), offset, dtype, held.matmul)


def from_files(quantizer: Quantizer, weight: files.Packed, shape: tuple[int, ...]) -> Packed:
  """The inverse of `to_files`.

  Args:
    quantizer: the (first) weight quantizer.
    weight: what was saved.
    shape: of the stored parameter, without stacked axes.
  """
  seen, spec = quantizer.view(shape)
  given, offset = weight.load()
  q = core.unpack_tensor(given)
  codes, scale, tensor_scale, zero_point = (None if part is None else _to_view(np.asarray(part), seen) for part in q[:4])
  assert codes is not None
  held = core.pack_tensor(core.QuantizedTensor(codes, scale, tensor_scale, zero_point, spec, codes.shape))
  moved = None if offset is None else _to_view(offset, seen)
  c, s, t, z, o = (None if part is None else jnp.asarray(part) for part in (*held[:4], moved))
  dtype = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}[weight.dtype]
  return Packed(c, s, t, z, o, spec, tuple(codes.shape), shape, dtype, weight.matmul)


def with_room(variables: Mapping[str, Any]) -> dict[str, Any]:
  """The variables with abstract float weights in the place of codes."""
  params = variables["params"]
  for path, _, quantizer in tree.items(variables.get("quant", {})):
    held: Packed | None = quantizer.leaves[0].packed
    if held is not None:
      shape = list(held.shape)
      for axis, size in zip(quantizer.stack, held.codes.shape, strict=False):
        shape.insert(axis, size)
      params = tree.inserted(params, (*path, str(quantizer.param)), jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(held.dtype)))
  return {**variables, "params": params}


def with_codes(variables: dict[str, Any], packed: Mapping[Place, tuple[Slot, files.Packed]], shapes: Mapping[Any, Any]) -> dict[str, Any]:
  """The variables with these codes in the place of float weights.

  Raises:
    ValueError: some layers of a stack are compressed and others are not.
  """
  params = variables["params"]
  quant = {(path, role): q for path, role, q in tree.items(variables["quant"])}
  grouped: dict[tuple[Path, str], list[tuple[tuple[int, ...], Slot, files.Packed]]] = {}
  for (path, role, index), (slot, weight) in packed.items():
    grouped.setdefault((path, role), []).append((index, slot, weight))
  for key, copies in grouped.items():
    quantizer = quant[key]
    slot = copies[0][1]
    stored = shapes["params", slot.path]
    sizes = tuple(stored[axis] for axis in slot.stack)
    if len(copies) != int(np.prod(sizes)):
      raise ValueError(
        f"{len(copies)} of the {int(np.prod(sizes))} stacked copies of {'/'.join(slot.path)!r} are compressed; all or none can be"
      )
    one = tuple(n for i, n in enumerate(stored) if i not in slot.stack)
    made = [from_files(quantizer.leaves[0], weight, one) for _, _, weight in sorted(copies, key=lambda copy: copy[0])]
    quant[key] = _holding(quantizer, _stacked(made, sizes))
    params = tree.removed(params, slot.path)
  return {**variables, "params": params, "quant": tree.build(quant)}


def _stacked(made: list[Packed], sizes: tuple[int, ...]) -> Packed:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*sizes, *leaves[0].shape), *made) if sizes else made[0]


def _holding(quantizer: AnyQuantizer, held: Packed) -> AnyQuantizer:
  first = quantizer.leaves[0]
  return quantizer.map(lambda q: q.replace(packed=held, scales=None) if q is first else q)


def _to_torch(part: np.ndarray, seen: layouts.View) -> np.ndarray:
  return np.array(part if seen.is_plain or part.ndim < len(seen.axes) else np.transpose(part, seen.axes), order="C")


def _to_view(part: np.ndarray, seen: layouts.View) -> np.ndarray:
  return np.array(part if seen.is_plain or part.ndim < len(seen.axes) else np.transpose(part, np.argsort(seen.axes)), order="C")
