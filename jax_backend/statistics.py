"""Calibration statistics of one quantizer: gathered on the device inside the forward pass, turned into amax on the host at the end.

Only maxima are taken on the device (and, for an affine bias, means); they do not depend on the order of the batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import core
from core import QuantSpec
from jax_backend import affine, layouts, tree
from jax_backend.quantizer import CALIBRATE, AnyQuantizer, Quantizer, SequentialQuantizer

if TYPE_CHECKING:
  from jax_backend.discover import Found


def collect(quantizer: AnyQuantizer, x: Any) -> AnyQuantizer:
  """The quantizer with one more tensor in its statistics. Children of a sequential one each see what the one before returns."""
  if isinstance(quantizer, Quantizer):
    return _collect(quantizer, x)
  children = []
  for child in quantizer.children:
    children.append(_collect(child, x))
    if child.mode == CALIBRATE:
      x = child.replace(mode="quantize", bias=None).with_amax(child.config.constant_amax)(x)
  return SequentialQuantizer(tuple(children))


def _collect(quantizer: Quantizer, x: Any) -> Quantizer:
  if quantizer.mode != CALIBRATE or not jnp.issubdtype(x.dtype, jnp.floating) or x.size == 0:
    return quantizer
  if not quantizer.config.needs_calibration and quantizer.config.bias is None:
    return quantizer
  return quantizer.replace(statistics=_next(quantizer, jax.lax.stop_gradient(quantizer.prepare(x))))


def _next(quantizer: Quantizer, x: Any) -> dict[str, Any]:
  before = quantizer.statistics or {}
  seen, spec = quantizer.view(x.shape)
  shown = layouts.enter(x, seen).astype(jnp.float32)
  after: dict[str, Any] = {"nonfinite": before.get("nonfinite", 0) + jnp.sum(~jnp.isfinite(shown), dtype=jnp.int32)}
  bias = quantizer.config.bias
  if bias is not None:
    axes = affine.reduced_axes(bias, seen)
    if bias.dynamic:
      shown = shown - affine.bias_of(shown, bias, axes)
    else:
      parts = {key: _maybe_view(value, seen) for key, value in before.items() if key not in ("amax", "nonfinite")}
      parts = affine.next_bias(shown, bias, axes, parts)
      shown = shown - parts["bias"]
      after |= {key: layouts.amax_to_torch(value, seen) for key, value in parts.items()}
  amax = reduce_leading(layouts.amax_to_torch(core.amax(shown, spec), seen), quantizer.config.spec)
  if "amax" in before:
    if before["amax"].shape != amax.shape:
      raise ValueError(
        f"a static quantizer ({quantizer.config.describe()}) has amax of shape {list(before['amax'].shape)} and now sees a tensor of shape "
        f"{list(x.shape)}, which gives {list(amax.shape)}; calibrate with tensors of one layout, or use a dynamic quantizer"
      )
    amax = merge(before["amax"], amax, spec)
  return after | {"amax": amax}


def _maybe_view(value: Any, seen: layouts.View) -> Any:
  return layouts.amax_to_view(value, seen)


def merge(a: Any, b: Any, spec: QuantSpec, axis: int = 0) -> Any:
  """The amax (or, with a zero point, the range on `axis`) that covers both."""
  if not spec.zero_point:
    return jnp.maximum(a, b)
  low, high = (jnp.take(v, 0, axis=axis) for v in (a, b)), (jnp.take(v, 1, axis=axis) for v in (a, b))
  return jnp.stack([jnp.minimum(*low), jnp.maximum(*high)], axis=axis)


def named_from_the_end(spec: QuantSpec) -> tuple[int, ...] | None:
  """The axes that the specification names, if all count from the end: then the axes in front do not matter."""
  axes = tuple(a for a, _ in spec.blocks) if spec.blocks is not None else spec.axis
  return axes if axes and all(a < 0 for a in axes) else None


def reduce_leading(amax: Any, spec: QuantSpec) -> Any:
  """amax over every axis that the specification does not name, without the axes in front of the first named one: [..., K/B] -> [K/B].

  So the static scale of an activation belongs to a channel, not to one position of one calibration batch.
  """
  axes = named_from_the_end(spec)
  rank = amax.ndim - int(spec.zero_point)
  if axes is None or not rank:
    return amax
  if spec.zero_point:
    low, high = (reduce_leading(a, spec.replace(zero_point=False)) for a in (-amax[0], amax[1]))
    return jnp.stack([-low, high])
  unnamed = tuple(i for i in range(-rank, 0) if i not in axes)
  if unnamed:
    amax = jnp.max(amax, axis=unnamed, keepdims=True)
  return amax.reshape(amax.shape[min(axes) :])


def seed_all(quant: Mapping[str, Any], found: Iterable[Found]) -> dict[str, Any]:
  """The tree with neutral statistics in every calibrating quantizer whose tensor a trace has seen, so that one compilation serves all
  batches. (A maximum starts at 0.) Quantizers with an affine bias start empty."""
  seen = {}
  for module in found:
    seen[module.path, "input_quantizer"] = (module.input_aval, module.sizes)
    seen[module.path, "output_quantizer"] = (module.output_aval, module.sizes)
    seen |= {(module.path, name): (aval, module.sizes) for name, (_, aval) in module.operands.items()}
  return tree.build({(path, name): _seed(q, *seen.get((path, name), (None, ()))) for path, name, q in tree.items(quant)})


def _seed(quantizer: AnyQuantizer, aval: Any, sizes: tuple[int, ...]) -> AnyQuantizer:
  def one(q: Quantizer) -> Quantizer:
    if aval is None or q.mode != CALIBRATE or q.statistics is not None or q.config.bias is not None or q.param is not None:
      return q
    scale = None if q.pre_quant_scale is None else q.pre_quant_scale[(0,) * len(sizes)]  # of one stacked copy, as the module sees it
    shapes = _shapes(q.replace(parent_classes=(), group=None, amax=None, tensor_amax=None, scales=None, pre_quant_scale=scale), aval)
    if shapes is None:
      return q
    return q.replace(statistics={key: jnp.zeros((*sizes, *s.shape), s.dtype) for key, s in shapes.items()})

  return quantizer.map(one)


def _shapes(quantizer: Quantizer, aval: Any) -> dict[str, Any] | None:
  return jax.eval_shape(lambda x: _collect(quantizer, x).statistics, aval)


def finish(quantizer: AnyQuantizer, name: str) -> AnyQuantizer:
  """The quantizer in "quantize" mode with the amax that its statistics give; one that saw no data keeps what it had.

  Args:
    quantizer: after the calibration data has passed.
    name: for messages.

  Raises:
    ValueError: the data held NaN or infinity.
  """
  if isinstance(quantizer, Quantizer):
    return _finish(quantizer, name)
  return SequentialQuantizer(tuple(_finish(child, f"{name}.{i}") for i, child in enumerate(quantizer.children)))


def _finish(quantizer: Quantizer, name: str) -> Quantizer:
  done = quantizer.replace(statistics=None).with_mode("quantize")
  found = quantizer.statistics
  if quantizer.mode != CALIBRATE or found is None:
    return done
  check_finite(int(np.sum(np.asarray(found["nonfinite"]))), name)
  if "bias" in found:
    done = done.replace(bias=found["bias"])
  return done.with_amax(found["amax"]) if quantizer.config.needs_calibration else done


def check_finite(nonfinite: int, name: str) -> None:
  """Raises:
  ValueError: there are NaN or infinite values; the message names the quantizer.
  """
  if nonfinite:
    raise ValueError(
      f"calibration data of quantizer {name!r} holds {nonfinite} NaN or infinite values; "
      "look for an overflow before this layer, or calibrate in float32 or bfloat16"
    )
