"""Candidates: what a layer would return in other formats, beside what it returns in float, from within one pass of the unmodified model.

Every candidate of a layer (its quantizers and what calibration changed of its parameters) rides in the layer's part of `params`, so that
nn.scan, nn.vmap, nn.remat and nn.jit carry it, and gradients come back the same way: see `jax_backend.tree`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jax_backend import discover, interceptors, layouts, modules, tree, weights
from jax_backend.interceptors import INPUT, quantizing
from jax_backend.layouts import Layout
from jax_backend.lifted import is_lifted
from jax_backend.quantizer import AnyQuantizer
from jax_backend.tree import RIDER, ROOM, Path, Rider

SEARCH = "__candidates__"
WEIGHT = "weight_quantizer"
SQUARES, NONFINITE, TOTAL = -3, -2, -1  # what the last slots gather, behind two scores per format


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
  """A layer in one format.

  Attributes:
    params: those of the module's own parameters that calibration changed.
    quantizers: of the module, by name, stacked axes in front.
  """

  params: dict[str, Any]
  quantizers: dict[str, AnyQuantizer]

  @classmethod
  def of(cls, before: Mapping[str, Any], after: Mapping[str, Any], quantizers: Mapping[str, AnyQuantizer]) -> Variant:
    """What became of a module's parameters; those that calibration did not touch are the same arrays, and are not kept twice."""
    changed = {name: value for name, value in after.items() if value is not before.get(name)}
    # Without what only names a quantizer, so that equal layers share one trace.
    return cls(changed, {name: q.map(lambda one: one.replace(parent_classes=(), group=None)) for name, q in quantizers.items()})

  @classmethod
  def none(cls) -> Variant:
    """The float layer."""
    return cls({}, {})

  def riding(self) -> dict[str, Any]:
    """What replaces the module's part of `params`."""
    return {**self.params, RIDER: Rider({name: tree.to_ride(q) for name, q in self.quantizers.items()})}


jax.tree_util.register_dataclass(Variant, data_fields=["params", "quantizers"], meta_fields=[])


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
  """The candidates of one module on their way through `params`.

  Attributes:
    variants: per format, what replaces the module's part of `params`.
    slots: [2 F + 3] float32, zeros; their gradient is, per format, the sum over output elements of (g (Q(y) - y))^2, g the gradient of the
      output; per format the sum over positions of (sum over outputs of g (Q(y) - y))^2; and then, of g, the sum of squares, the number of
      values that are not finite, and the number of all. None where nothing is differentiated.
    choice: [] int32, the variant that the module computes with; 0 is float, i + 1 variant i. None: float.
  """

  variants: tuple[dict[str, Any], ...]
  slots: Any = None
  choice: Any = None


jax.tree_util.register_dataclass(Candidates, data_fields=["variants", "slots", "choice"], meta_fields=[])


@dataclasses.dataclass(frozen=True, eq=False)
class Searched:
  """A module whose formats are scored.

  Attributes:
    path: module path (static).
    stack: positions of the stacked axes among a stored parameter's axes (static).
    sizes: their lengths (static).
    variants: its candidates.
  """

  path: Path
  stack: tuple[int, ...]
  sizes: tuple[int, ...]
  variants: tuple[Variant, ...]

  def riding(self, x: Any) -> Any:
    """Something [*sizes, ...] of this module as it rides: stacked axes where the module's parameters have them."""
    front = tuple(range(len(self.stack)))
    if self.stack == front:
      return x
    return jnp.moveaxis(x.reshape((*self.sizes, *(1,) * ROOM, *x.shape[len(front) :])), front, self.stack)


jax.tree_util.register_dataclass(Searched, data_fields=["variants"], meta_fields=["path", "stack", "sizes"])


def empty_slots(searched: Sequence[Searched]) -> list[Any]:
  """The slots of every module, [*sizes, 2 F + 3] zeros."""
  return [jnp.zeros((*one.sizes, 2 * len(one.variants) + 3), jnp.float32) for one in searched]


def mount(params: Mapping[str, Any], searched: Sequence[Searched], slots: Sequence[Any] | None, choices: Sequence[Any] | None) -> Any:
  """`params` with the candidates riding in it.

  Args:
    params: parameters.
    searched: the modules.
    slots: per module, from `empty_slots`, or None.
    choices: per module [*sizes] int32, or None.
  """
  mounted = dict(params)
  for i, one in enumerate(searched):
    riding = tuple(variant.riding() for variant in one.variants)
    held = Candidates(riding, None if slots is None else one.riding(slots[i]), None if choices is None else one.riding(choices[i]))
    mounted = _placed(mounted, (*one.path, SEARCH), held)
  return mounted


def _placed(node: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
  if len(path) == 1:
    return {**node, path[0]: value}
  return {**node, path[0]: _placed(node.get(path[0], {}), path[1:], value)}


def searching(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
  """The interceptor: float outputs whose gradients also fill the slots, or the chosen candidate's outputs."""
  module = context.module
  if module.scope is None or is_lifted(context) or not module.has_variable("params", SEARCH):
    return next_fun(*args, **kwargs)
  kind = modules.kind_of(type(module))
  if kind is None or context.method_name not in (*kind.methods, *kind.weight_methods):
    return next_fun(*args, **kwargs)
  with interceptors.entered(module, context.method_name) as outermost:
    if not outermost:
      return next_fun(*args, **kwargs)
    held: Candidates = module.get_variable("params", SEARCH)
    alone = _Alone.of(module, context.method_name, args, kwargs)
    if held.choice is not None:
      return alone.chosen(held)
    y = next_fun(*args, **kwargs)
    return alone.tapped(y, held) if held.slots is not None and isinstance(y, jax.Array) else y


@dataclasses.dataclass(frozen=True)
class _Alone:
  """One call of a module as a pure function of its candidates.

  Attributes:
    module: a clone without a parent.
    method: name of the method.
    rest: what is static of its arguments.
    dynamic: the arrays among its arguments.
    variables: its own variables, without what rides in them.
  """

  module: nn.Module
  method: str
  rest: Any
  dynamic: list[Any]
  variables: dict[str, Any]

  @classmethod
  def of(cls, module: nn.Module, method: str, args: Any, kwargs: Any) -> _Alone:
    dynamic, rest = discover.split_arrays(args, kwargs)
    variables = {name: _plain(held) for name, held in module.variables.items()}
    return cls(module.clone(parent=None, name=None), method, rest, dynamic, variables)

  def run(self, variant: Mapping[str, Any], dynamic: list[Any], variables: Mapping[str, Any]) -> Any:
    """What the module returns with a variant's parameters and quantizers."""
    args, kwargs = discover.join_arrays(dynamic, self.rest)
    with nn.intercept_methods(quantizing):
      return self.module.apply({**variables, "params": {**variables["params"], **variant}}, *args, method=self.method, **kwargs)

  def chosen(self, held: Candidates) -> Any:
    """The output of the candidate that `choice` names. One compilation serves all of them."""
    branches = [functools.partial(self.run, variant) for variant in ({}, *held.variants)]
    return jax.lax.switch(held.choice.reshape(()), branches, self.dynamic, self.variables)

  def tapped(self, y: Any, held: Candidates) -> Any:
    """y itself, whose gradient also gives that of the slots."""

    @jax.custom_vjp
    def tap(y: Any, dynamic: Any, variables: Any, variants: Any, slots: Any) -> Any:
      return y

    def forward(y: Any, dynamic: Any, variables: Any, variants: Any, slots: Any) -> Any:
      return y, (y, dynamic, variables, variants, slots)

    def backward(kept: Any, g: Any) -> Any:
      y, dynamic, variables, variants, slots = kept
      gradient = g.astype(jnp.float32)
      changes = [gradient * _difference(self.run(variant, dynamic, variables), y) for variant in variants]
      found = [*map(_squares, changes), *(_squares(jnp.sum(change, axis=-1)) for change in changes)]
      found += [_squares(gradient), jnp.sum(~jnp.isfinite(gradient), dtype=jnp.float32), jnp.float32(gradient.size)]
      return g, None, None, None, jnp.stack(found).reshape(slots.shape)

    tap.defvjp(forward, backward)
    return tap(y, self.dynamic, self.variables, held.variants, held.slots)


def _difference(a: Any, b: Any) -> Any:
  return a.astype(jnp.float32) - b.astype(jnp.float32)


def _squares(x: Any) -> Any:
  return jnp.sum(jnp.square(x))


def _plain(held: Mapping[str, Any]) -> dict[str, Any]:
  """Variables without anything that rides in them."""
  kept = {name: value for name, value in held.items() if name not in (SEARCH, RIDER)}
  return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def in_torch(parameter: Any, layout: Layout, stack: tuple[int, ...]) -> np.ndarray:
  """A stored weight as float64 in torch's layout, stacked axes in front."""
  front = weights.to_front(jnp.asarray(meta.unbox(parameter)), stack)
  show = functools.partial(layouts.to_torch, layout=layout)
  return np.asarray(layouts.over_stack(show, len(stack))(front)).astype(np.float64)


def stored(vector: Any, layout: Layout, stack: tuple[int, ...], sizes: tuple[int, ...], like: Any) -> Any:
  """A vector in torch's layout, [*shape] or [copies, *shape], in the layout and type of the stored parameter `like`."""
  front = jax.eval_shape(lambda w: weights.to_front(w, stack), like).shape
  vector = jnp.asarray(np.asarray(vector, np.float32))
  vector = vector.reshape((*sizes, *vector.shape[1:])) if sizes else vector
  place = functools.partial(layouts.from_torch, layout=layout, shape=front[len(stack) :])
  return weights.from_front(layouts.over_stack(place, len(stack))(vector), stack).astype(like.dtype)


def acting_weight(variant: Variant, params: Mapping[str, Any], param: str, layout: Layout, stack: tuple[int, ...]) -> np.ndarray:
  """The weight that a candidate acts with on the float model's input, float64 in torch's layout, stacked axes in front.

  That is its quantized weight times its pre_quant_scale per input channel, plus its low-rank product.
  """
  front = weights.to_front(jnp.asarray(meta.unbox(variant.params.get(param, params[param]))), stack)
  quantizer, into = variant.quantizers.get(WEIGHT), variant.quantizers.get(INPUT)
  if quantizer is not None and quantizer.is_enabled:
    front = weights.quantized(quantizer, front)
  weight = in_torch(weights.from_front(front, stack), layout, stack)
  scale = None if into is None else into.leaves[0].pre_quant_scale
  factor = np.ones((1,) * weight.ndim) if scale is None else _per_input(np.asarray(scale, np.float64), weight.ndim, len(stack))
  first = None if quantizer is None else quantizer.leaves[0]
  if first is not None and first.low_rank_a is not None:
    weight = weight + np.asarray(first.low_rank_b, np.float64) @ np.asarray(first.low_rank_a, np.float64)
  return weight * factor


def _per_input(scale: np.ndarray, rank: int, stack: int) -> np.ndarray:
  """A factor [*sizes, K] or [*sizes] as it multiplies weights [*sizes, N, K, ...]."""
  lead, own = scale.shape[:stack], scale.shape[stack:]
  return scale.reshape((*lead, 1, *own, *(1,) * (rank - stack - 1 - len(own))))
