"""Where quantizers are: `qvariables["quant"]` outside, inside `params` while a module runs.

`qvariables["quant"]` mirrors the module tree: {"layers_0": {"q_proj": {"input_quantizer": Quantizer, ...}}}. During `apply` the quantizers
of a module ride in its part of the `params` collection, as one node named RIDER: linen's transforms slice, stack, broadcast and
rematerialise whatever is in `params`, while a collection that the model's author did not list would silently be lost under nn.scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from core.config.matching import canonical_name
from jax_backend.quantizer import AnyQuantizer, is_quantizer

RIDER = "__quantizers__"
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Rider:
  """The quantizers of one module on their way through `params`.

  Attributes:
    quantizers: name -> quantizer.
    probe: static; where a trace must be of this module and this pass alone, what tells it from all others (nn.jit keeps traces, of equal
      layers as well): (token or tap, module path). None otherwise.
    taps: tensors that calibration asked to see, by quantizer name, on their way out.
    alias: path of the module that reads the same input and shows it (static), or None.
  """

  quantizers: dict[str, Any]
  probe: Any = None
  taps: dict[str, Any] = dataclasses.field(default_factory=dict)
  alias: Path | None = None


jax.tree_util.register_dataclass(Rider, data_fields=["quantizers", "taps"], meta_fields=["probe", "alias"])


def is_rider(node: Any) -> bool:
  return isinstance(node, Rider)


def items(quant: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, str, AnyQuantizer]]:
  """(module path, quantizer name, quantizer) of a quantizer tree."""
  for key, value in quant.items():
    if is_quantizer(value):
      yield path, key, value
    elif isinstance(value, Mapping):
      yield from items(value, (*path, key))


def build(entries: Mapping[tuple[Path, str], AnyQuantizer]) -> dict[str, Any]:
  """The quantizer tree of (module path, quantizer name) -> quantizer."""
  root: dict[str, Any] = {}
  for (path, name), quantizer in entries.items():
    node = root
    for part in path:
      node = node.setdefault(part, {})
    node[name] = quantizer
  return root


def full_name(path: Path, name: str) -> str:
  """Dotted name of a quantizer in torch's spelling."""
  return canonical_name("/".join((*path, name)))


def lookup(tree: Any, path: Path) -> Any:
  """The node at a path, or None."""
  for part in path:
    if not isinstance(tree, Mapping) or part not in tree:
      return None
    tree = tree[part]
  return tree


def leaves(node: Any, path: Path = ()) -> list[tuple[Path, Any]]:
  """(path, array) of a tree of parameters, out of their boxes."""
  if isinstance(node, Mapping):
    return [leaf for name, below in node.items() for leaf in leaves(below, (*path, name))]
  return [(path, meta.unbox(node))]


def replaced(node: Any, path: Path, value: Any) -> Any:
  """The tree with another value at a path; a boxed parameter keeps its box."""
  if not path:
    return node.replace_boxed(value) if isinstance(node, meta.AxisMetadata) else value
  return {**node, path[0]: replaced(node[path[0]], path[1:], value)}


def removed(node: Any, path: Path) -> Any:
  """The tree without the value at a path."""
  if len(path) == 1:
    return {key: value for key, value in node.items() if key != path[0]}
  return {**node, path[0]: removed(node[path[0]], path[1:])}


def inserted(node: Any, path: Path, value: Any) -> Any:
  """The tree with a value at a path that may be new."""
  if not path:
    return value
  held = node if isinstance(node, Mapping) else {}
  return {**held, path[0]: inserted(held.get(path[0]), path[1:], value)}


def compressed_layers(quant: Mapping[str, Any]) -> list[str]:
  """Names of the weight quantizers that hold their weight as codes."""
  return [full_name(path, name) for path, name, q in items(quant) if q.leaves[0].packed is not None]


def mount(params: Any, quant: Mapping[str, Any], mark: Any = None, path: Path = ()) -> dict[str, Any]:
  """`params` with the quantizers of every module riding in it. The arguments stay as they are.

  Args:
    params: parameters.
    quant: quantizers.
    mark: hashable; with it every rider has the probe (mark, module path).
    path: of `params`.
  """
  merged = dict(params) if params is not None else {}
  own = {name: to_ride(node) for name, node in quant.items() if is_quantizer(node)}
  if own:
    merged[RIDER] = Rider(own, None if mark is None else (mark, path))
  for name, node in quant.items():
    if not is_quantizer(node):
      below = merged.get(name)
      merged[name] = mount(below if isinstance(below, Mapping) else {}, node, mark, (*path, name))
  return merged


def unmount(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The inverse of `mount`: (params, quant). Modules without parameters leave no trace in params."""
  plain: dict[str, Any] = {}
  quant: dict[str, Any] = {}
  for name, node in params.items():
    if is_rider(node):
      quant |= {key: _from_ride(q) for key, q in node.quantizers.items()}
    elif isinstance(node, Mapping):
      below, found = unmount(node)
      if below or not found:
        plain[name] = below
      if found:
        quant[name] = found
    else:
      plain[name] = node
  return plain, quant


# Axes that a transform stacks are put where the module's own parameters have them. Leaves carry stacked axes in front; where a transform
# stacks in another place (variable_axes={"params": 1}), three axes of length 1 make room for it.
ROOM = 3


def _unusual(quantizer: AnyQuantizer) -> bool:
  return quantizer.stack != tuple(range(len(quantizer.stack)))


def to_ride(quantizer: AnyQuantizer) -> AnyQuantizer:
  """A quantizer as it rides: stacked axes where the module's parameters have them. `board` and `_from_ride` undo it."""
  if not _unusual(quantizer):
    return quantizer
  stack = quantizer.stack
  front = tuple(range(len(stack)))

  def ride(leaf: Any) -> Any:
    roomy = leaf.reshape((*leaf.shape[: len(stack)], *(1,) * ROOM, *leaf.shape[len(stack) :]))
    return jnp.moveaxis(roomy, front, stack)

  return jax.tree.map(ride, quantizer)


def _from_ride(quantizer: AnyQuantizer) -> AnyQuantizer:
  if not _unusual(quantizer):
    return quantizer
  stack = quantizer.stack
  front = tuple(range(len(stack)))

  def land(leaf: Any) -> Any:
    leaf = jnp.moveaxis(leaf, stack, front)
    return leaf.reshape((*leaf.shape[: len(stack)], *leaf.shape[len(stack) + ROOM :]))

  return jax.tree.map(land, quantizer)


def board(quantizer: AnyQuantizer) -> AnyQuantizer:
  """A quantizer as a module's own call sees it, stacked axes gone, the room for them removed."""
  if _unusual(quantizer):
    quantizer = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[ROOM:]), quantizer)
  return quantizer


def disembark(quantizer: AnyQuantizer) -> AnyQuantizer:
  """The inverse of `board`."""
  if _unusual(quantizer):
    quantizer = jax.tree.map(lambda leaf: leaf.reshape((*(1,) * ROOM, *leaf.shape)), quantizer)
  return quantizer
