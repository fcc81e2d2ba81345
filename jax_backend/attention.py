"""Quantizers inside attention: `<module>.q_bmm_quantizer`, `k_bmm_quantizer`, `v_bmm_quantizer` and `p_bmm_quantizer`.

An interceptor cannot see inside a function, so a module of your own calls `quantize_bmm` on its operands, or `dot_product_attention` in
the place of Flax's. `nn.MultiHeadDotProductAttention` and its subclasses need no change: their `attention_fn` is seen through.

A quantizer's axes are torch's, [B, heads, T, head_dim], for tensors that Flax keeps as [B, T, heads, head_dim]; nothing is transposed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from core.attention import check_operand
from jax_backend import passing, taps, tree
from jax_backend.layouts import HEADS, SAME, Layout
from jax_backend.tree import RIDER, Rider

LAYOUTS = {"bhtd": SAME, "bthd": HEADS}
Note = Callable[[nn.Module, str, Layout, Any], None]
_tracing = threading.local()


def quantize_bmm(module: nn.Module, role: str, x: Any, layout: str = "bthd") -> Any:
  """x through a quantizer of the attention module that calls this; x itself where no quantizers ride.

  >>> class Attention(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     ...
  ...     k = quantize_bmm(self, "k", rotary(k))

  Args:
    module: the caller, `self`.
    role: "q", "k", "v", or "p" for the probabilities [B, heads, T, S].
    x: queries, keys or values.
    layout: their axes: "bthd" ([B, T, heads, head_dim]) or "bhtd" ([B, heads, T, head_dim]).

  Raises:
    ValueError: another role or layout.
  """
  check_operand(role, layout, LAYOUTS)
  name = f"{role}_bmm_quantizer"
  note: Note | None = getattr(_tracing, "note", None)
  if note is not None:
    note(module, name, SAME if role == "p" else LAYOUTS[layout], x)
  if module.scope is None or not module.has_variable("params", RIDER):
    return x
  rider: Rider = module.get_variable("params", RIDER)
  if name not in rider.quantizers:
    return x
  quantizer = tree.board(rider.quantizers[name])
  x = jnp.asarray(x)
  taps.show(module, name, quantizer, x)
  return passing.through(module, name, quantizer, x) if quantizer.acts else x


def is_bmm(name: str) -> bool:
  """Whether a quantizer's name is that of an operand of attention."""
  return name.endswith("_bmm_quantizer")


@contextlib.contextmanager
def noting(note: Note) -> Iterator[None]:
  """While open, `note(module, quantizer name, layout, x)` is called for every operand that a module hands to `quantize_bmm`."""
  before = getattr(_tracing, "note", None)
  _tracing.note = note
  try:
    yield
  finally:
    _tracing.note = before


def dot_product_attention(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
  """`flax.linen.dot_product_attention` of a module with all four operands quantized.

  Args:
    module: the caller, `self`.
    query: [B, T, heads, D].
    key: [B, S, heads, D].
    value: [B, S, heads, D].
    *args: as in Flax.
    **kwargs: as in Flax.

  Returns:
    [B, T, heads, D].
  """
  return _attend(nn.dot_product_attention, module, query, key, value, *args, **kwargs)


def _attend(attention_fn: Callable[..., Any], module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
  query, key, value = (quantize_bmm(module, role, x) for role, x in (("q", query), ("k", key), ("v", value)))
  if attention_fn is nn.dot_product_attention:
    given = inspect.signature(attention_fn).bind_partial(query, key, value, *args, **kwargs).arguments
    return attention_fn(**_with_probabilities(module, given))
  return attention_fn(query, key, value, *args, **kwargs)


def _with_probabilities(module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
  """Arguments of `nn.dot_product_attention` whose second product takes quantized probabilities."""
  dot_general = given.get("einsum_dot_general") or jax.lax.dot_general
  plain = functools.partial(jnp.einsum, precision=given.get("precision"), _dot_general=dot_general)
  product = given.get("attn_weights_value_einsum") or plain

  def second(equation: str, weights: Any, value: Any) -> Any:
    return product(equation, quantize_bmm(module, "p", weights), value)

  first = given.get("qk_attn_weights_einsum") or plain
  changed = {"precision": None, "einsum_dot_general": None, "qk_attn_weights_einsum": first, "attn_weights_value_einsum": second}
  return {**given, **changed}


class _SeenThrough:
  """An `attention_fn` with the signature of the one that it stands for."""

  def __init__(self, attention_fn: Callable[..., Any], module: nn.Module) -> None:
    self.__signature__ = inspect.signature(attention_fn)
    self._call = functools.partial(_attend, attention_fn, module)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._call(*args, **kwargs)


def seen_through(next_fun: Callable[..., Any], module: nn.Module, method: str) -> Callable[..., Any]:
  """What an interceptor calls in the place of `next_fun`: the operands of an `nn.MultiHeadDotProductAttention` pass `quantize_bmm`."""
  if not isinstance(module, nn.MultiHeadDotProductAttention) or method != "__call__" or isinstance(module.attention_fn, _SeenThrough):
    return next_fun

  def call(*args: Any, **kwargs: Any) -> Any:
    original = module.attention_fn
    object.__setattr__(module, "attention_fn", _SeenThrough(original, module))
    try:
      return next_fun(*args, **kwargs)
    finally:
      object.__setattr__(module, "attention_fn", original)

  return call
