"""Scores of one batch: what layers in other formats would do to the loss or to the output of a float model that runs unmodified.

The user's functions run as they are, outside of any compilation; what is compiled is each call of the model inside them. Gradients go
through both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from core.search import errors
from core.search.host import Choices, Scores
from jax_backend import candidates, discover, tree
from jax_backend.candidates import NONFINITE, SQUARES, TOTAL, Searched
from jax_backend.tree import Path

POSITIONS = 64  # of the vocabulary's distributions that are held in float32 beside the logits at a time


@dataclasses.dataclass(frozen=True)
class Step:
  """The user's functions.

  Attributes:
    forward: (model, batch) -> output.
    loss_func: (output, batch) -> scalar loss, or None.
    loss_step: (model, batch) -> scalar loss, instead of `loss_func`, or None.
  """

  forward: Callable[[Any, Any], Any]
  loss_func: Callable[[Any, Any], Any] | None = None
  loss_step: Callable[[Any, Any], Any] | None = None

  def loss(self, model: Any, batch: Any) -> Any:
    """The scalar loss of a batch.

    Raises:
      ValueError: it is nothing that JAX can differentiate.
    """
    if self.loss_step is not None:
      name, value = "forward_backward_step", self.loss_step(model, batch)
    elif self.loss_func is not None:
      name, value = "loss_func", self.loss_func(self.forward(model, batch), batch)
    else:
      raise ValueError("gradients need loss_func or forward_backward_step")
    if value is None or jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
      shown = type(value).__name__ if value is None else f"shape {jnp.shape(value)} and type {jnp.result_type(value)}"
      raise ValueError(f"{name} must return a scalar floating point loss of jax.numpy, which is then differentiated here; got {shown}")
    return value


class _Model:
  """What the user's functions call as their model: the module, with `prepare(variables)` as its variables, one jitted step per call."""

  def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
    self._module = module
    self._call = call

  def __call__(self, *args: Any, rngs: Any = None, method: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
    """The module's own result; arguments as for `module.apply`."""
    dynamic, rest = discover.split_arrays(args, kwargs)
    frozen = tuple(mutable) if isinstance(mutable, list | set) else mutable
    return self._call((self._module, rest, method, frozen), dynamic, rngs)

  def apply(self, _: Any, *args: Any, **kwargs: Any) -> Any:
    """As `__call__`, for functions that are written with `model.apply(variables, batch)`; the variables given are not used."""
    return self(*args, **kwargs)


def _run(call: Any, variables: Mapping[str, Any], dynamic: Any, rngs: Any) -> Any:
  module, rest, method, mutable = call
  args, kwargs = discover.join_arrays(dynamic, rest)
  mutable = list(mutable) if isinstance(mutable, tuple) else mutable
  return module.apply(variables, *args, rngs=rngs, method=method, mutable=mutable, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _searched(call: Any, variables: Any, searched: Any, slots: Any, choices: Any, dynamic: Any, rngs: Any) -> Any:
  """The model with candidates: float and tapped by `slots`, or as `choices` say."""
  mounted = {**variables, "params": candidates.mount(variables["params"], searched, slots, choices)}
  with nn.intercept_methods(candidates.searching):
    return _run(call, mounted, dynamic, rngs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_weights(call: Any, places: tuple[Path, ...], variables: Any, weights: Any, dynamic: Any, rngs: Any) -> Any:
  """The float model with these parameters at `places`."""
  params = variables["params"]
  for path, value in zip(places, weights, strict=True):
    params = tree.replaced(params, path, value)
  return _run(call, {**variables, "params": params}, dynamic, rngs)


def gradients(
  module: nn.Module, variables: Any, step: Step, number: int, batch: Any, choices: Choices, searched: Sequence[Searched], by_position: bool
) -> Scores:
  """`SearchHost.gradient_scores`: all layers and formats from one backward pass."""

  def loss_of(slots: Any) -> Any:
    return step.loss(_Model(module, lambda call, *rest: _searched(call, variables, searched, slots, None, *rest)), batch)

  value, found = jax.value_and_grad(loss_of)(candidates.empty_slots(searched))
  if not np.isfinite(float(value)):
    raise errors.loss_is_not_finite(number, float(value))
  # Stacked copies are one layer: their sums add up.
  sums = [np.asarray(one, np.float64).reshape(-1, one.shape[-1]).sum(axis=0) for one in found]
  for layer, one in reversed(list(zip(choices, sums, strict=True))):  # what is not finite behind a layer is so before it
    if one[NONFINITE]:
      raise errors.gradient_is_not_finite(number, layer, int(one[NONFINITE]), int(one[TOTAL]))
  if not any(one[SQUARES] for one in sums):
    raise errors.loss_is_independent(number)
  scores: Scores = {}
  for (layer, names), one in zip(choices.items(), sums, strict=True):
    scores[layer] = dict(zip(names, one[len(names) if by_position else 0 :].tolist(), strict=False))
    for name, score in scores[layer].items():
      if not np.isfinite(score):
        raise errors.quantized_output_is_not_finite(number, layer, name)
  return scores


def divergences(
  module: nn.Module,
  variables: Any,
  step: Step,
  number: int,
  batch: Any,
  choices: Choices,
  searched: Sequence[Searched],
  groups: Mapping[str, Sequence[str]],
) -> Scores:
  """`SearchHost.kl_scores`: one forward pass per group and format. All of them share one compilation."""

  def logits(chosen: Mapping[str, int], what: str) -> Any:
    picked = [jnp.full(one.sizes, chosen.get(layer, 0), jnp.int32) for layer, one in zip(choices, searched, strict=True)]
    model = _Model(module, lambda call, *rest: _searched(call, variables, searched, None, picked, *rest))
    found = _logits(step.forward(model, batch))
    if not bool(jnp.isfinite(found).all()):
      raise errors.output_is_not_finite(number, what)
    return found

  reference = logits({}, "the float model")
  scores: Scores = {}
  for group, members in groups.items():
    names = dict.fromkeys(name for layer in members for name in choices.get(layer, ()))
    scores[group] = {}
    for name in names:
      chosen = {layer: choices[layer].index(name) + 1 for layer in members if name in choices.get(layer, ())}
      output = logits(chosen, f"the model with {group!r} in format {name!r}")
      scores[group][name] = float(np.sum(np.asarray(_divergence(reference, output)), dtype=np.float64))
  return scores


def _logits(output: Any) -> Any:
  found: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
  if not (hasattr(found, "dtype") and jnp.ndim(found) and jnp.issubdtype(found.dtype, jnp.floating)):
    raise errors.no_logits(type(output).__name__)
  return found.reshape(-1, found.shape[-1])


@jax.jit
def _divergence(p: Any, q: Any) -> Any:
  """KL(p || q) of logits [T, V] in nats, [T] float32; every summand p (q/p - 1 - ln(q/p)) is non-negative, so none cancels another."""

  def one(rows: tuple[Any, Any]) -> Any:
    x, y = (row.astype(jnp.float32) for row in rows)
    norm = jax.nn.logsumexp(x)
    ratio = (y - x) - (jax.nn.logsumexp(y) - norm)  # logits that are close to each other are subtracted exactly
    # expm1(ratio) - ratio cancels where the ratio is small; its series does not.
    near = ratio * ratio * (0.5 + ratio * (1 / 6 + ratio * (1 / 24 + ratio / 120)))
    return jnp.sum(jnp.exp(x - norm) * jnp.where(jnp.abs(ratio) < 0.05, near, jnp.expm1(ratio) - ratio))

  return jax.lax.map(one, (p, q), batch_size=POSITIONS)


def traces(
  module: nn.Module,
  variables: Any,
  step: Step,
  number: int,
  batch: Any,
  layers: Sequence[str],
  places: tuple[Path, ...],
  probes: Iterable[Sequence[Any]],
) -> dict[str, float]:
  """`SearchHost.hessian_traces`: one derivative of the gradient along each probe, whose vectors come layer by layer as they are stored."""
  weights = [meta.unbox(tree.lookup(variables["params"], path)) for path in places]

  def loss_of(values: Any) -> Any:
    return step.loss(_Model(module, lambda call, *rest: _with_weights(call, places, variables, values, *rest)), batch)

  value_and_gradient = jax.value_and_grad(loss_of)
  found: dict[str, list[float]] = {layer: [] for layer in layers}
  for vectors in probes:
    (value, gradient), (_, products) = jax.jvp(value_and_gradient, (weights,), (list(vectors),))
    _check_gradient(number, layers, float(value), gradient)
    for layer, vector, product in zip(layers, vectors, products, strict=True):
      found[layer].append(float(np.sum(np.asarray(vector) * np.asarray(product), dtype=np.float64)))
  return {layer: float(np.mean(values)) for layer, values in found.items()}


def _check_gradient(number: int, layers: Sequence[str], value: float, gradient: Sequence[Any]) -> None:
  if not np.isfinite(value):
    raise errors.loss_is_not_finite(number, value)
  counts = [int(jnp.sum(~jnp.isfinite(g))) for g in gradient]
  for layer, g, count in reversed(list(zip(layers, gradient, counts, strict=True))):
    if count:
      raise errors.gradient_is_not_finite(number, layer, count, g.size)
  if not any(bool((g != 0).any()) for g in gradient):
    raise errors.loss_is_independent(number)
