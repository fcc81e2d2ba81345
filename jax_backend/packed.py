"""Packed: the codes and scales of a compressed weight, riding in its quantizer in the place of the parameter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import core
from jax_backend import affine, layouts
from jax_backend.quantizer import AnyQuantizer, Quantizer

_LEAVES = ("codes", "scale", "tensor_scale", "zero_point", "offset")


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
  """A weight held as packed codes and scales, in the order of its stored axes (`layouts.View`), so that nothing is transposed on use.

  Attributes:
    codes, scale, tensor_scale, zero_point: the leaves of `core.PackedTensor`, with stacked axes in front.
    offset: float32, added to what the codes stand for (affine quantization), or None.
    spec: format of the codes, in the view's axes (static).
    shown: shape of the view (static).
    shape: of the parameter, without stacked axes (static).
    dtype: type that the weight is dequantized to (static).
    matmul: name of the arithmetic of the layer's product; None is that of the original module (static).
  """

  codes: Any
  scale: Any
  tensor_scale: Any
  zero_point: Any
  offset: Any
  spec: core.QuantSpec
  shown: tuple[int, ...]
  shape: tuple[int, ...]
  dtype: str
  matmul: str | None = None

  @property
  def tensor(self) -> core.PackedTensor:
    return core.PackedTensor(self.codes, self.scale, self.tensor_scale, self.zero_point, self.spec, self.shown)

  @property
  def nbytes(self) -> int:
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self))

  def at(self, index: tuple[int, ...]) -> Packed:
    """One of the stacked copies."""
    return jax.tree.map(lambda leaf: leaf[index], self) if index else self


jax.tree_util.register_dataclass(
  Packed,
  data_fields=list(_LEAVES),
  meta_fields=[f.name for f in dataclasses.fields(Packed) if f.name not in _LEAVES],
)


def codes(quantizer: Quantizer, x: Any) -> tuple[core.QuantizedTensor, Any]:
  """What a call's result is made of, in the axes of the quantizer's view.

  Args:
    quantizer: without a stack.
    x: [...] in the stored layout.

  Returns:
    (codes and scales; float32 offset that is added to what they stand for, or None).
  """
  y = quantizer.prepare(x)
  seen, spec = quantizer.view(x.shape)
  shown = layouts.enter(y, seen)
  offset = quantizer._bias(shown, seen)
  if offset is not None:
    shown = shown.astype(jnp.float32) - offset
  amax = quantizer._fitted(quantizer.amax, shown.shape, seen, spec)
  tensor_amax = None if spec.dynamic else quantizer.tensor_amax
  return core.quantize(shown, spec, amax, tensor_amax=tensor_amax), offset


def pack(quantizer: Quantizer, weight: Any, matmul: str | None = None) -> Packed:
  """Codes and scales of what a call makes of a weight.

  Args:
    quantizer: the (first) weight quantizer, without a stack.
    weight: stored weight.
    matmul: name of the arithmetic of the layer's product.
  """
  q, offset = codes(quantizer, weight)
  held = core.pack_tensor(q)
  return Packed(*held[:4], offset, q.spec, tuple(q.shape), tuple(weight.shape), str(weight.dtype), matmul)


def values(quantizer: AnyQuantizer, rest: bool = True) -> Any:
  """The stored weight that a compressed quantizer stands for: what calling it on the weight returned.

  Args:
    quantizer: a weight quantizer whose first one is packed, without a stack.
    rest: also apply the quantizers behind the first, of a sequence.
  """
  first = quantizer.leaves[0]
  held: Packed = first.packed
  y = core.dequantize_packed(held.tensor)
  if held.offset is not None:
    y = affine.unfused(y) + held.offset
  seen, _ = first.view(held.shape)
  y = first._turned(layouts.leave(y, seen, held.shape), affine.rotate_back)
  y = core.cast_saturating(y, jax.ShapeDtypeStruct((), jnp.dtype(held.dtype)))
  for child in quantizer.leaves[1:] if rest else ():
    y = child(y)
  return y


def quantized(quantizer: Quantizer, index: tuple[int, ...] = ()) -> core.QuantizedTensor:
  """Codes and scales of a compressed weight, not packed, as numpy arrays in torch's layout.

  Args:
    quantizer: the (first) weight quantizer.
    index: which of the stacked copies.
  """
  held: Packed = jax.tree.map(np.asarray, quantizer.packed.at(index))
  q = core.unpack_tensor(held.tensor)
  seen, _ = quantizer.view(held.shape)
  codes, scale = _to_torch(q.codes, seen), _to_torch(q.scale, seen)
  tensor_scale, zero_point = (None if part is None else _to_torch(part, seen) for part in (q.tensor_scale, q.zero_point))
  return core.QuantizedTensor(codes, scale, tensor_scale, zero_point, quantizer.spec, codes.shape)


def _to_torch(part: np.ndarray, seen: layouts.View) -> np.ndarray:
  return np.array(part if seen.is_plain or part.ndim < len(seen.axes) else np.transpose(part, seen.axes), order="C")
