"""Weights outside a forward pass: reading them, calibrating their quantizers, and what they become when they are quantized."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

import core
from core.config.schema import QuantizerConfig
from jax_backend import affine, histograms, layouts, packed, sharding, statistics, tree
from jax_backend.quantizer import QUANTIZE, AnyQuantizer, Quantizer, SequentialQuantizer
from jax_backend.tree import Path


def each(qvariables: Mapping[str, Any]) -> Iterator[tuple[Path, str, AnyQuantizer, Any]]:
  """(module path, quantizer name, quantizer, stored weight with stacked axes in front) of every weight quantizer.

  In the place of a compressed weight comes what its codes stand for.
  """
  for path, name, quantizer in tree.items(qvariables.get("quant", {})):
    if quantizer.param is None:
      continue
    if quantizer.leaves[0].packed is not None:
      yield path, name, quantizer, unpacked(quantizer, False)
      continue
    node = tree.lookup(qvariables.get("params", {}), (*path, quantizer.param))
    if node is None:
      raise ValueError(f"quantizer {tree.full_name(path, name)!r} has no parameter {'/'.join((*path, quantizer.param))!r} in params")
    yield path, name, quantizer, to_front(jnp.asarray(meta.unbox(node)), quantizer.stack)


def to_front(weight: Any, stack: tuple[int, ...]) -> Any:
  """The stacked axes of a stored weight in front."""
  return weight if stack == tuple(range(len(stack))) else jnp.moveaxis(weight, stack, range(len(stack)))


def from_front(weight: Any, stack: tuple[int, ...]) -> Any:
  """The inverse of `to_front`."""
  return weight if stack == tuple(range(len(stack))) else jnp.moveaxis(weight, range(len(stack)), stack)


def calibrate(quantizer: AnyQuantizer, weight: Any, name: str) -> AnyQuantizer:
  """The quantizer with the amax of its weight; of a sequence, each with that of what the one before it returns.

  Args:
    quantizer: a weight quantizer; returned as it is where it takes its scales from the weight at hand.
    weight: stored weight, stacked axes in front.
    name: for messages.

  Raises:
    ValueError: the weight holds NaN or infinity.
  """
  if isinstance(quantizer, SequentialQuantizer):
    children = []
    for i, child in enumerate(quantizer.children):
      children.append(calibrate(child, weight, f"{name}.{i}"))
      if i + 1 < len(quantizer.children):
        weight = quantized(children[-1], weight)
    return SequentialQuantizer(tuple(children))
  if not quantizer.needs_calibration or not jnp.issubdtype(weight.dtype, jnp.floating):
    return quantizer
  try:
    amax, bias, nonfinite = _statistics(bare(quantizer), weight)
  except ValueError as error:
    raise ValueError(f"quantizer {name!r}: {error}") from error
  statistics.check_finite(int(nonfinite), name)
  if quantizer.config.calibrator == "histogram":
    amax = histograms.of_weight(quantizer, weight, name)
  return quantizer.replace(bias=bias).with_amax(sharding.like_weight(amax, weight, quantizer.layout, len(quantizer.stack)))


def calibrate_from(quantizer: AnyQuantizer, weight: Any, name: str, first: Quantizer | None) -> AnyQuantizer:
  """As `calibrate`, where the first quantizer is given: those behind it are calibrated on what it returns. None calibrates it as well."""
  if first is None:
    return calibrate(quantizer, weight, name)
  if not isinstance(quantizer, SequentialQuantizer):
    return first
  rest = calibrate(SequentialQuantizer(quantizer.children[1:]), quantized(first, weight), name)
  return SequentialQuantizer((first, *rest.leaves))


def quantized(quantizer: AnyQuantizer, weight: Any) -> Any:
  """The weight as the model computes with it.

  Args:
    quantizer: a weight quantizer.
    weight: stored weight, stacked axes in front.
  """
  return _quantized(bare(quantizer), weight)


@functools.partial(jax.jit, static_argnums=1)
def _unpacked(quantizer: AnyQuantizer, rest: bool) -> Any:
  return layouts.over_stack(functools.partial(packed.values, rest=rest), len(quantizer.stack))(quantizer)


def unpacked(quantizer: AnyQuantizer, rest: bool = True) -> Any:
  """A compressed weight as the model computes with it, stacked axes in front.

  Args:
    quantizer: a weight quantizer whose first one is packed.
    rest: also apply the quantizers behind the first, of a sequence.
  """
  return _unpacked(bare(quantizer), rest)


def bare(quantizer: AnyQuantizer) -> AnyQuantizer:
  """The quantizer without what only names it, so that layers of one shape share one compilation."""
  return quantizer.map(lambda q: q.replace(parent_classes=(), group=None))


@jax.jit
def _statistics(quantizer: Quantizer, weight: Any) -> tuple[Any, Any, Any]:
  """(amax, static bias or None, number of values that are not finite)."""

  def one(q: Quantizer, w: Any) -> Any:
    w, spec = q.prepare(w), q.config.bias
    if spec is None:
      return q.amax_of(w), None
    seen, seen_spec = q.view(w.shape)
    shown = layouts.enter(w, seen).astype(jnp.float32)
    bias = affine.bias_of(shown, spec, affine.reduced_axes(spec, seen))
    amax = layouts.amax_to_torch(core.amax(shown - bias, seen_spec), seen)
    return amax, None if spec.dynamic else layouts.amax_to_torch(bias, seen)

  nonfinite = jnp.sum(~jnp.isfinite(weight), dtype=jnp.int32)
  return *layouts.over_stack(one, len(quantizer.stack))(quantizer, weight), nonfinite


@jax.jit
def _quantized(quantizer: AnyQuantizer, weight: Any) -> Any:
  return layouts.over_stack(lambda q, w: q(w), len(quantizer.stack))(quantizer.with_mode(QUANTIZE), weight)


WeightState = tuple[Any, QuantizerConfig | tuple[QuantizerConfig, ...], Any]


def weight_quantization(qmodule: Any, qvariables: Mapping[str, Any]) -> dict[str, WeightState]:
  """Every enabled weight quantizer's tensor as torch would hold it, for comparison code by code.

  `core.quantize(weight, config.spec, amax)` gives the codes and scales that the model computes with; a static two-level weight also needs
  `tensor_amax=quantizers(qvariables)[name].tensor_amax`, which siblings may share.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables.

  Returns:
    quantizer name -> (weight in torch's layout, [out, in] or OIHW, before quantization; its QuantizerConfig; amax, float32 in torch's axes,
    or None where it is taken from the weight). Stacked layers and experts keep their axes in front; for a sequential quantizer config
    and amax are tuples.
  """
  result = {}
  for path, name, quantizer, weight in each(qvariables):
    if quantizer.is_enabled:
      show = functools.partial(layouts.to_torch, layout=quantizer.layout)
      shown = layouts.over_stack(show, len(quantizer.stack))(weight)
      amax = tuple(child.amax for child in quantizer.leaves) if isinstance(quantizer, SequentialQuantizer) else quantizer.amax
      result[tree.full_name(path, name)] = (shown, quantizer.config, amax)
  return result
