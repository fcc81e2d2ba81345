"""The whole model as something to tune: what the float model returned, and gradients of the distance to it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jax_backend import discover, layouts, tree, watch
from jax_backend.apply import QuantModule
from jax_backend.interceptors import quantizing
from jax_backend.quantizer import PASS

KEPT = jnp.float16  # logits of the float model: 10^4 tokens of a large vocabulary are gigabytes
NORM_WEIGHTS = ("scale", "weight")


@dataclasses.dataclass
class Teacher:
  """What the float model returned for every call of the forward loop; it is what the loop calls as its model.

  Attributes:
    calls: arguments of each call.
    outputs: logits, or last hidden states, of each.
    masks: attention mask [B, T] where padding is left out, or None.
  """

  qmodule: QuantModule
  variables: dict[str, Any]
  exclude_padding: bool
  calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = dataclasses.field(default_factory=list)
  outputs: list[Any] = dataclasses.field(default_factory=list)
  masks: list[Any] = dataclasses.field(default_factory=list)

  @classmethod
  def record(cls, qmodule: QuantModule, variables: Mapping[str, Any], loop: Callable[[Any], Any], exclude_padding: bool) -> Teacher:
    """Run the forward loop in float and keep calls and outputs."""
    found = cls(qmodule, {name: value for name, value in variables.items() if name != "quant"}, exclude_padding)
    loop(found)
    return found

  def __call__(self, *args: Any, rngs: Any = None, method: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
    dynamic, rest = discover.split_arrays(args, kwargs)
    y = _float(self.qmodule, rest, method, self.variables, dynamic, rngs)
    self.calls.append((args, kwargs))
    self.outputs.append(result_of(y).astype(KEPT))
    self.masks.append(watch.mask_of(self.qmodule.module, method, args, kwargs) if self.exclude_padding else None)
    return y

  def apply(self, _: Any, *args: Any, **kwargs: Any) -> Any:
    """As `__call__`, for loops that are written with `model.apply(variables, batch)`."""
    return self(*args, **kwargs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _float(qmodule: QuantModule, rest: Any, method: Any, variables: Any, dynamic: Any, rngs: Any) -> Any:
  args, kwargs = discover.join_arrays(dynamic, rest)
  return qmodule.module.apply(variables, *args, rngs=rngs, method=method, **kwargs)


def result_of(output: Any) -> Any:
  """Logits of a language model, last hidden state of an encoder, the first of a tuple, or the array itself.

  Raises:
    TypeError: none of these is there.
  """
  for name in ("logits", "last_hidden_state"):
    if hasattr(output, name):
      return getattr(output, name)
  first = output[0] if isinstance(output, tuple | list) and output else output
  if not hasattr(first, "dtype"):
    raise TypeError(f"the model returns {type(output).__name__}; tuning needs logits, a last_hidden_state, or an array")
  return first


class Distillation:
  """Gradients of the distance between a quantized model and its teacher (`core.calibrate.distill.Student`).

  Names are those of torch; `host` holds the variables and is changed by `set`.
  """

  def __init__(self, host: Any, teacher: Teacher) -> None:
    self._host = host
    self._teacher = teacher

  def batches(self) -> int:
    return len(self._teacher.calls)

  def norms(self) -> dict[str, np.ndarray]:
    return {_label(path): np.array(value, np.float32) for path, value in self._norms()}

  def _norms(self) -> list[tuple[tuple[str, ...], Any]]:
    layers = {place.path for place in self._host.places.values()}
    found = tree.leaves(self._host.variables["params"])
    return [(p, v) for p, v in found if p[-1] in NORM_WEIGHTS and jnp.ndim(v) == 1 and p[:-1] not in layers]

  def low_rank(self) -> dict[str, np.ndarray]:
    found = {}
    for name, place in self._host.places.items():
      first = self._host.quantizer(place.path).leaves[0]
      if first.low_rank_a is not None and not place.index:
        for part in ("a", "b"):
          found[f"{name}.weight_quantizer.low_rank_{part}"] = np.array(getattr(first, f"low_rank_{part}"), np.float32)
    return found

  def set(self, values: dict[str, np.ndarray]) -> None:
    norms = {_label(path): (path, value) for path, value in self._norms()}
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, value in values.items():
      layer, _, part = name.rpartition(".weight_quantizer.")
      if layer:
        factors.setdefault(layer, {})[part] = value
      else:
        path, held = norms[name]
        self._host.variables["params"] = tree.replaced(self._host.variables["params"], path, jnp.asarray(value, held.dtype))
    for layer, parts in factors.items():
      self._host.set_low_rank(layer, parts["low_rank_a"], parts["low_rank_b"])

  def gradient(self, batch: int, values: dict[str, np.ndarray], loss: str) -> tuple[float, dict[str, np.ndarray]]:
    args, kwargs = self._teacher.calls[batch]
    dynamic, rest = discover.split_arrays(args, kwargs)
    mask = None if self._teacher.masks[batch] is None else jnp.asarray(self._teacher.masks[batch], jnp.float32)
    norms = {_label(path): path for path, _ in self._norms()}
    places, given, own = [], [], set()
    for name, value in values.items():
      layer, _, part = name.rpartition(".weight_quantizer.")
      if layer:
        places.append((self._host.places[layer].path, part))
      elif name in norms:
        places.append((norms[name], ""))
      else:
        path = self._host.places[name.removesuffix(".weight")].path
        own.add(path)
        places.append(((*path, str(self._host.quantizer(path).param)), "weight"))
      given.append(jnp.asarray(value))
    variables = self._host.synced()
    quant = tree.build({(p, n): q.with_mode(PASS) if p in own and q.param is not None else q for p, n, q in tree.items(variables["quant"])})
    variables = {**variables, "quant": quant}
    target = self._teacher.outputs[batch]
    found, gradients = _gradient(self._host.qmodule, rest, tuple(places), loss, variables, dynamic, target, mask, given)
    return float(found), {name: np.asarray(g) for name, g in zip(values, gradients, strict=True)}


def _label(path: tuple[str, ...]) -> str:
  return tree.full_name(path[:-1], "weight")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradient(
  qmodule: QuantModule, rest: Any, places: Any, loss: str, variables: Any, dynamic: Any, target: Any, mask: Any, values: Any
) -> Any:
  args, kwargs = discover.join_arrays(dynamic, rest)
  plain = {name: value for name, value in variables.items() if name not in ("params", "quant")}

  def loss_of(values: Any) -> Any:
    params, quant = variables["params"], variables["quant"]
    for (path, part), value in zip(places, values, strict=True):
      params, quant = _placed(params, quant, path, part, value)
    with nn.intercept_methods(quantizing):
      y = qmodule.module.apply({**plain, "params": tree.mount(params, quant)}, *args, **kwargs)
    return _distance(result_of(y), target, mask, loss)

  return jax.value_and_grad(loss_of)(values)


def _placed(params: Any, quant: Any, path: Any, part: str, value: Any) -> tuple[Any, Any]:
  """The trees with a weight (in torch's layout), a norm's weight, or a low-rank factor in place."""
  if part.startswith("low_rank"):
    key = (*path, "weight_quantizer")
    quantizer = tree.lookup(quant, key)
    first = quantizer.leaves[0]
    return params, tree.replaced(quant, key, quantizer.map(lambda q: q.replace(**{part: value}) if q is first else q))
  held = meta.unbox(tree.lookup(params, path))
  if part == "weight":
    value = layouts.from_torch(value, tree.lookup(quant, (*path[:-1], "weight_quantizer")).layout, held.shape)
  return tree.replaced(params, path, value.astype(held.dtype)), quant


def _distance(y: Any, target: Any, mask: Any, loss: str) -> Any:
  """Mean over tokens of KL(teacher || output) or of the squared difference."""
  y, target = y.astype(jnp.float32), target.astype(jnp.float32)
  if loss == "mse":
    each = jnp.mean(jnp.square(y - target), axis=-1)
  else:
    p, q = jax.nn.log_softmax(target), jax.nn.log_softmax(y)
    each = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  weights = jnp.ones(each.shape, jnp.float32) if mask is None or mask.shape != each.shape else mask
  return jnp.sum(each * weights) / jnp.sum(weights)
