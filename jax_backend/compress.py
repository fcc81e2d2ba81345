"""compress: hold weights as packed codes and scales, in the place of floats."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from core import compression
from core import matmul as codes
from core.compression import CompressionReport, WeightSize
from jax_backend import layouts, packed, tree, weights
from jax_backend import matmul as products
from jax_backend.apply import QuantModule
from jax_backend.edit import is_quantized
from jax_backend.interceptors import INPUT
from jax_backend.packed import Packed
from jax_backend.quantizer import CALIBRATE, FOLDED, QUANTIZE, AnyQuantizer, Quantizer, SequentialQuantizer
from jax_backend.tree import Path

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def compress(
  qmodule: QuantModule, qvariables: Mapping[str, Any], include: str | Iterable[str] | None = None, matmul: str | None = None
) -> dict[str, Any]:
  """Replace weights by their codes and scales, packed. Outputs stay what simulation gave, bit for bit.

  The weight leaves `params`; its codes ride in its quantizer, in `quant`, and every call dequantizes them anew. Each layer is checked
  before its float weight goes. Of a sequence of quantizers (W4A8) the codes of the first are held, and the others are applied to what they
  stand for. The weights cannot be trained or calibrated any more; `decompress` brings floats back.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables; they are not changed, and their float weights are freed when nobody refers to them any more.
    include: a pattern, or several, of the layers to compress, for example "*.mlp.*"; None takes every layer with an enabled weight
      quantizer.
    matmul: None dequantizes and leaves the product to the module. "int8" and "float8" multiply codes: another arithmetic than the
      simulation's, whose outputs are near its own and not equal (`core.matmul`).

  Returns:
    New variables.

  Raises:
    ValueError: the variables have no quantizers, matmul is unknown, a pattern matches no
      layer, or nothing could be compressed; names layers and reasons.

  Warns:
    ConfigWarning: layers that cannot be compressed, with the reason.
  """
  codes.check_name(matmul)
  done = _quantizers(qvariables)
  chosen = set(compression.selected(include, [_label(*key) for key, q in done.items() if q.param is not None]))
  params = qvariables.get("params", {})
  refused: dict[str, str] = {}
  count = 0
  for path, name, quantizer, weight in weights.each(qvariables):
    label = _label(path, name)
    if label not in chosen or not quantizer.is_enabled or quantizer.leaves[0].packed is not None:
      count += label in chosen and quantizer.leaves[0].packed is not None
      continue
    reason = _refusal(quantizer, weight)
    if reason is None and matmul is not None:
      reason = products.refusal(quantizer, done.get((path, INPUT)), matmul)
    held = _packed(quantizer, weight, matmul) if reason is None else None
    if held is None:
      refused[label] = reason or compression.NOT_EQUAL
      continue
    done[path, name] = _holding(quantizer, held)
    params = tree.removed(params, (*path, str(quantizer.param)))
    count += 1
  compression.report_refusals(refused, count)
  return {**qvariables, "params": params, "quant": tree.build(done)}


def decompress(qmodule: QuantModule, qvariables: Mapping[str, Any], include: str | Iterable[str] | None = None) -> dict[str, Any]:
  """Put float weights in the place of codes: the values that the codes stand for, with quantizers folded. Outputs stay.

  Nothing of the calibration of these weights is left; `quantize` again to quantize them anew.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables; they are not changed.
    include: a pattern, or several, of layers; None takes every compressed layer.

  Returns:
    New variables.

  Raises:
    ValueError: the variables have no quantizers, or a pattern matches no layer.
  """
  done = _quantizers(qvariables)
  chosen = set(compression.selected(include, [_label(*key) for key, q in done.items() if q.param is not None]))
  params = qvariables.get("params", {})
  for (path, name), quantizer in list(done.items()):
    if quantizer.leaves[0].packed is not None and _label(path, name) in chosen:
      value = weights.from_front(weights.unpacked(quantizer), quantizer.stack)
      params = tree.inserted(params, (*path, str(quantizer.param)), value)
      done[path, name] = quantizer.map(lambda q: q.replace(mode=FOLDED, packed=None))
  return {**qvariables, "params": params, "quant": tree.build(done)}


def is_compressed(qvariables: Mapping[str, Any]) -> bool:
  """Whether any weight is held as codes."""
  return bool(tree.compressed_layers(qvariables.get("quant", {})))


def compression_report(qvariables: Mapping[str, Any]) -> CompressionReport:
  """What a model takes in memory, weight by weight. `.print()` shows it as a table. A stack of layers is one weight."""
  rows = []
  for (path, name), quantizer in _quantizers(qvariables).items():
    if quantizer.param is not None:
      rows.append(_size(_label(path, name), quantizer, tree.lookup(qvariables.get("params", {}), (*path, quantizer.param))))
  total = sum(int(leaf.nbytes) for leaf in jax.tree.leaves(dict(qvariables)))
  return CompressionReport(tuple(rows), total - sum(row.nbytes for row in rows))


def print_compression_report(qvariables: Mapping[str, Any]) -> CompressionReport:
  """Print bytes and bits per weight of every layer, and the totals."""
  report = compression_report(qvariables)
  report.print()
  return report


def _quantizers(qvariables: Mapping[str, Any]) -> dict[tuple[Path, str], AnyQuantizer]:
  if not is_quantized(qvariables):
    raise ValueError("these variables have no quantizers; call quantize(module, variables, config, forward_loop) first")
  return {(path, name): q for path, name, q in tree.items(qvariables["quant"])}


def _label(path: Path, name: str) -> str:
  """The layer's name: "model.layers.0.mlp.up_proj"; a second weight of one layer keeps its quantizer's name behind it."""
  return tree.full_name(path, name).removesuffix(".weight_quantizer")


def _size(label: str, quantizer: AnyQuantizer, node: Any) -> WeightSize:
  held: Packed | None = quantizer.leaves[0].packed
  if held is None:
    weight = weights.to_front(jnp.asarray(weights.meta.unbox(node)), quantizer.stack)
    shape = (*weight.shape[: len(quantizer.stack)], *_torch_shape(weight.shape[len(quantizer.stack) :], quantizer))
    return WeightSize(label, "", shape, int(weight.nbytes), int(weight.nbytes), False)
  shape = (*held.codes.shape[: len(quantizer.stack)], *_torch_shape(held.shape, quantizer))
  described = " then ".join(q.config.describe() for q in quantizer.leaves)
  return WeightSize(label, described, shape, held.nbytes, math.prod(shape) * jnp.dtype(held.dtype).itemsize, True)


def _torch_shape(stored: tuple[int, ...], quantizer: AnyQuantizer) -> tuple[int, ...]:
  return tuple(math.prod(stored[axis] for axis in axes) for axes in quantizer.layout.of(len(stored)))


def _refusal(quantizer: AnyQuantizer, weight: Any) -> str | None:
  if not all(q.mode == QUANTIZE for q in quantizer.leaves):
    state = "calibration is on" if any(q.mode == CALIBRATE for q in quantizer.leaves) else "one is off"
    return f"not all quantizers of its weight are quantizing ({state})"
  if not jnp.issubdtype(weight.dtype, jnp.floating):
    return f"its weight is of type {weight.dtype}"
  if not weight.size:
    return "its weight has no values"
  return compression.refusal([q.spec for q in quantizer.leaves])


def _packed(quantizer: AnyQuantizer, weight: Any, matmul: str | None) -> Packed | None:
  """The codes of a weight; None where they do not stand for what the simulation computes."""
  held = _pack(weights.bare(quantizer.leaves[0]), weight, matmul)
  same = _same(weights.quantized(quantizer, weight), weights.unpacked(_holding(quantizer, held)))
  return held if bool(same) else None


@functools.partial(jax.jit, static_argnums=2)
def _pack(quantizer: Quantizer, weight: Any, matmul: str | None) -> Packed:
  return layouts.over_stack(functools.partial(packed.pack, matmul=matmul), len(quantizer.stack))(quantizer, weight)


@jax.jit
def _same(a: Any, b: Any) -> Any:
  bits = _BITS[a.dtype.itemsize]
  return jnp.array_equal(jax.lax.bitcast_convert_type(a, bits), jax.lax.bitcast_convert_type(b, bits))


def _holding(quantizer: AnyQuantizer, held: Packed) -> AnyQuantizer:
  """The quantizer with codes; amax of blocks and channels, and the scales kept with it, go: the codes have their own."""
  first = quantizer.leaves[0]
  spread = first.amax is not None and first.amax.ndim > len(first.stack)
  holder = first.replace(packed=held, amax=None if spread else first.amax, scales=None)
  return SequentialQuantizer((holder, *quantizer.leaves[1:])) if isinstance(quantizer, SequentialQuantizer) else holder
