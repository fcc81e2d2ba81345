"""Showing tensors of a running model to calibration: they ride out of jit, scan and remat in the modules' riders."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import core
from core.calibrate.host import QUANTIZED
from jax_backend.quantizer import QUANTIZE, AnyQuantizer
from jax_backend.tree import RIDER, Path, Rider, is_rider

UNROUNDED = "unrounded"  # as PREPARED, before it is cast to the type of the input: what statistics are taken of
INPUT = "input_quantizer"  # what modules that read one tensor share
_watching = threading.local()


@dataclasses.dataclass(frozen=True)
class Tap:
  """What to show (static, so that it is part of a compilation's key).

  Attributes:
    places: (module path, quantizer name, view) of every tensor; modules with one view see the same thing of the same input.
    point: PREPARED or QUANTIZED, as in `core.calibrate.host`, or UNROUNDED.
  """

  places: tuple[tuple[Path, str, int], ...]
  point: str


@contextlib.contextmanager
def tapping(tap: Tap | None) -> Iterator[dict[Path, int]]:
  """While open, modules put the tensors that `tap` names into their riders. Yields their places in the order in which they run."""
  before = getattr(_watching, "state", None)
  order: dict[Path, int] = {}
  _watching.state = None if tap is None else ({(path, name): view for path, name, view in tap.places}, tap.point, {}, order)
  try:
    yield order
  finally:
    _watching.state = before


def show(module: nn.Module, name: str, quantizer: AnyQuantizer, x: Any) -> None:
  """Put x, as its quantizer sees or returns it, into the module's rider, or the path of the module that has shown the same."""
  state = getattr(_watching, "state", None)
  if state is None:
    return
  places, point, shown, order = state
  path = tuple(module.path)
  view = places.get((path, name))
  if view is None or not jnp.issubdtype(x.dtype, jnp.floating):
    return
  order.setdefault(path, len(order))
  rider: Rider = module.get_variable("params", RIDER)
  key = (id(x), view, name)
  if name == INPUT and key in shown and shown[key][0] is x:
    module.put_variable("params", RIDER, dataclasses.replace(rider, alias=shown[key][1]))
    return
  shown[key] = (x, path)
  x = jnp.asarray(x)
  if point == QUANTIZED and quantizer.is_enabled:
    seen = quantizer.map(lambda q: q.replace(mode=QUANTIZE) if q.is_enabled else q)(x)
  else:
    seen = quantizer.leaves[0].prepare(x)
    seen = seen if point == UNROUNDED else core.cast_saturating(seen, x)
  module.put_variable("params", RIDER, dataclasses.replace(rider, taps={**rider.taps, name: seen}))


def shown(params: Mapping[str, Any], order: Mapping[Path, int]) -> tuple[dict[tuple[Path, str], Any], dict[Path, Path]]:
  """What modules have put into their riders.

  Args:
    params: a collection with riders.
    order: of the modules, as `tapping` gives it.

  Returns:
    ({(module path, quantizer name): tensor, stacked axes in front}, {module path: path of the module that shows its input}), in order.
  """
  tensors, aliases = _found(params, ())
  last = len(order)
  return (
    dict(sorted(tensors.items(), key=lambda item: order.get(item[0][0], last))),
    dict(sorted(aliases.items(), key=lambda item: order.get(item[0], last))),
  )


def _found(params: Mapping[str, Any], path: Path) -> tuple[dict[tuple[Path, str], Any], dict[Path, Path]]:
  tensors: dict[tuple[Path, str], Any] = {}
  aliases: dict[Path, Path] = {}
  for name, node in params.items():
    if is_rider(node):
      tensors |= {(path, key): _stack_in_front(x, node.quantizers[key].stack) for key, x in node.taps.items()}
      if node.alias is not None:
        aliases[path] = node.alias
    elif isinstance(node, Mapping):
      below = _found(node, (*path, name))
      tensors |= below[0]
      aliases |= below[1]
  return tensors, aliases


def _stack_in_front(x: Any, stack: tuple[int, ...]) -> Any:
  """A tensor whose stacked axes a transform has put where it puts those of parameters (nn.scan with variable_axes={"params": 1})."""
  front = tuple(range(len(stack)))
  return x if stack == front else jnp.moveaxis(x, stack, front)


def unkeyed(tensors: Mapping[tuple[Path, str], Any]) -> dict[str, Any]:
  """The tensors by one string each, as a pytree wants it; sorted, as a pytree leaves them, they keep their order."""
  return {"\x1f".join((f"{i:09d}", *path, name)): x for i, ((path, name), x) in enumerate(tensors.items())}


def keyed(tensors: Mapping[str, Any]) -> Iterator[tuple[tuple[Path, str], Any]]:
  """The inverse of `unkeyed`."""
  for key, x in tensors.items():
    _, *path, name = key.split("\x1f")
    yield (tuple(path), name), x
