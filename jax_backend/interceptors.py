"""Quantization of unmodified linen modules while they run, through `flax.linen.intercept_methods`.

Nothing is patched globally. An interceptor acts only on modules in whose parameters quantizers ride (`tree.Rider`), so two models in one
process never disturb each other. Weights are quantized where the module asks for them: `Module.param` of that one instance is shadowed for
the duration of the call (and of `setup`), so that sown collections, rngs, paths and lifted transforms work as before.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jax_backend import attention, low_rank, matmul, modules, packed, passing, taps, tree
from jax_backend.lifted import is_lifted
from jax_backend.quantizer import QUANTIZE, AnyQuantizer
from jax_backend.tree import RIDER, Rider

INPUT, OUTPUT = "input_quantizer", "output_quantizer"
_calls = threading.local()


@contextlib.contextmanager
def entered(module: nn.Module, method: str) -> Iterator[bool]:
  """Whether this is the outermost call of that method on that instance: `super().__call__` fires an interceptor again."""
  active = _calls.__dict__.setdefault("active", set())
  key = (id(module), method)
  if key in active:
    yield False
    return
  active.add(key)
  try:
    yield True
  finally:
    active.discard(key)


@contextlib.contextmanager
def shadow_param(
  module: nn.Module, change: Mapping[str, Callable[[Any], Any]], made: Mapping[str, Callable[[], Any]] | None = None
) -> Iterator[None]:
  """`module.param(name, ...)` returns `change[name]` of the parameter, for this instance, while the context is open.

  Args:
    module: the instance.
    change: parameter name -> function of its value.
    made: parameter name -> function that makes the value, of parameters that are not there (compressed weights).
  """
  made = made or {}
  if not (change or made) or "param" in vars(module):
    yield
    return
  original = module.param

  def param(name: str, *args: Any, **kwargs: Any) -> Any:
    if name in made:
      return made[name]()
    value = original(name, *args, **kwargs)
    if name not in change:
      return value
    if isinstance(value, meta.AxisMetadata):
      return value.replace_boxed(change[name](value.unbox()))
    return change[name](value)

  object.__setattr__(module, "param", param)
  try:
    yield
  finally:
    object.__delattr__(module, "param")


def quantizing(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
  """The interceptor of `QuantModule.apply`."""
  module = context.module
  if module.scope is None or is_lifted(context) or not module.has_variable("params", RIDER):
    return next_fun(*args, **kwargs)
  rider: Rider = module.get_variable("params", RIDER)
  kind = modules.kind_of(type(module))
  next_fun = attention.seen_through(next_fun, module, context.method_name)
  if kind is None and all(attention.is_bmm(name) for name in rider.quantizers):
    return next_fun(*args, **kwargs)
  if kind is None:
    raise ValueError(
      f"module {'/'.join(module.path)!r} has quantizers, but its class {type(module).__name__} is not registered; register it with "
      "jax_backend.register before calling the model, or quantize again"
    )
  with entered(module, context.method_name) as outermost:
    if not outermost:
      return next_fun(*args, **kwargs)
    own = {name: tree.board(q) for name, q in rider.quantizers.items()}
    held = {q.param: q for q in own.values() if q.param is not None}
    weights = {param: passing.with_key(module, q) for param, q in held.items() if q.leaves[0].packed is None and q.acts}
    made = {param: functools.partial(packed.values, q) for param, q in held.items() if q.leaves[0].packed is not None}
    with shadow_param(module, weights, made):
      if context.method_name not in kind.methods:
        return next_fun(*args, **kwargs)
      return _call(next_fun, args, kwargs, module, own)


def _call(next_fun: Callable[..., Any], args: Any, kwargs: Any, module: nn.Module, own: dict[str, AnyQuantizer]) -> Any:
  into, out = own.get(INPUT), own.get(OUTPUT)
  beside, product = None, None
  if into is not None and (args or kwargs):
    x = modules.first_argument(args, kwargs)
    if hasattr(x, "dtype"):
      taps.show(module, INPUT, into, x)
      beside = low_rank.branch(own, into, x)
      weights = [q for q in own.values() if q.param is not None]
      if matmul.asks(weights) and into.mode == QUANTIZE:
        product = functools.partial(matmul.dense, module, weights[0].leaves[0], into.leaves[0], jnp.asarray(x))
      elif into.acts:
        args, kwargs = modules.replace_first(args, kwargs, passing.through(module, INPUT, into, jnp.asarray(x)))
  y = next_fun(*args, **kwargs) if product is None else product()
  if beside is not None:
    y = y + beside
  if out is not None and isinstance(y, jax.Array):
    taps.show(module, OUTPUT, out, y)
    if out.acts:
      y = passing.through(module, OUTPUT, out, y)
  return y
