"""A Flax model's parameters and quantizers under the names that torch gives them, stacked copies one by one.

`model/layers/mlp/up_proj/kernel` of a scanned stack of 30 layers is "model.layers.0.mlp.up_proj.weight" to
"model.layers.29.mlp.up_proj.weight": the number stands behind the outermost module under which everything is stacked, as the same layers
are numbered in torch and in an unrolled Flax model.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from core.config.matching import canonical_name
from jax_backend import layouts, tree, weights
from jax_backend.layouts import SAME, Layout
from jax_backend.parameters import TORCH_NAMES
from jax_backend.quantizer import AnyQuantizer, is_quantizer
from jax_backend.tree import Path

# Flax's names of what torch calls otherwise.
_STATISTICS = {"mean": "running_mean", "var": "running_var"}
# Collections that belong to a call, not to the model.
PASSING = ("quant", "intermediates", "cache", "perturbations")


class Slot(NamedTuple):
  """Where a tensor of the files is among a model's variables.

  Attributes:
    collection: such as "params".
    path: of the parameter in it.
    stack: positions of its stacked axes.
    index: which of the stacked copies.
    layout: torch's axes among those of one copy.
    shape: of one copy in torch's layout.
  """

  collection: str
  path: Path
  stack: tuple[int, ...]
  index: tuple[int, ...]
  layout: Layout
  shape: tuple[int, ...]

  def to_torch(self, stored: Any) -> Any:
    """This copy of a stored parameter in torch's layout."""
    return layouts.to_torch(weights.to_front(stored, self.stack)[self.index], self.layout).reshape(self.shape)


class Stacks:
  """Which modules of a model are stacked, and where the number of a copy stands in its name.

  Args:
    quant: the quantizer tree.
    params: the parameters.
  """

  def __init__(self, quant: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    self._stack: dict[Path, tuple[int, ...]] = {}
    sizes: dict[Path, tuple[int, ...]] = {}
    for path, _, quantizer in tree.items(quant):
      self._stack[path] = quantizer.stack
      shape = _shape_of(quantizer, params, path)
      if quantizer.stack and shape:
        sizes[path] = shape
    self._depths: dict[Path, tuple[int, ...]] = {path: self._numbered(path, len(stack)) for path, stack in self._stack.items()}
    self._sizes = {path: sizes.get(path) or self._sizes_near(path, sizes) for path in self._stack}
    self._around: dict[Path, set[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]] = collections.defaultdict(set)
    for path, stack in self._stack.items():
      if stack:
        for depth in range(self._depths[path][0], len(path) + 1):
          self._around[path[:depth]].add((stack, self._sizes[path], self._depths[path]))

  def _numbered(self, path: Path, levels: int) -> tuple[int, ...]:
    """For each level of stacking the length of the prefix behind which the number stands."""
    depths = []
    for level in range(levels):
      start = max(depths[-1] if depths else 0, min(1, len(path)))
      depths.append(next(d for d in range(start, len(path) + 1) if self._all_stacked(path[:d], level)))
    return tuple(depths)

  def _sizes_near(self, path: Path, sizes: Mapping[Path, tuple[int, ...]]) -> tuple[int, ...]:
    """Lengths of the stacked axes of a module that has no array of its own to tell: those of the nearest one that is stacked alike."""
    if not self._stack[path]:
      return ()
    for depth in range(len(path) - 1, -1, -1):
      near = {n for p, n in sizes.items() if p[:depth] == path[:depth] and self._stack[p] == self._stack[path]}
      if len(near) == 1:
        return near.pop()
    raise ValueError(f"nothing tells how many copies of {'/'.join(path)!r} are stacked; register a module with weights inside the stack")

  def _all_stacked(self, prefix: Path, level: int) -> bool:
    return all(len(stack) > level for path, stack in self._stack.items() if path[: len(prefix)] == prefix)

  def of(self, path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(positions of the stacked axes, their lengths, where the numbers stand) of a parameter of a module.

    A module without quantizers (a norm of the model's own) is stacked as the quantized modules around it are, where its shape allows it.
    """
    if path in self._stack:
      return self._stack[path], self._sizes[path], self._depths[path]
    for depth in range(len(path), 0, -1):
      for stack, sizes, depths in sorted(self._around.get(path[:depth], ())):
        if max(depths) <= len(path) and max(stack) < len(shape) and tuple(shape[axis] for axis in stack) == sizes:
          return stack, sizes, depths
    return (), (), ()

  def copies(self, path: Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index, dotted name of the module) of every copy of a quantized module."""
    for index in itertools.product(*map(range, self._sizes[path])):
      yield index, name_of(path, index, self._depths[path])

  def numbered(self, group: str, path: Path, index: tuple[int, ...]) -> str:
    """The key of a group of siblings, with the number of the copy."""
    return self._regrouped(group, path, (), index)

  def unnumbered(self, group: str, path: Path, index: tuple[int, ...]) -> str:
    """The inverse of `numbered`."""
    return self._regrouped(group, path, index, ())

  def _regrouped(self, group: str, path: Path, old: tuple[int, ...], new: tuple[int, ...]) -> str:
    depths = self._depths[path]
    if not depths:
      return group
    before, after = (name_of(path[: max(depths)], i, depths) for i in (old, new))
    return after + group[len(before) :] if group.startswith(before) else group


def _shape_of(quantizer: AnyQuantizer, params: Mapping[str, Any], path: Path) -> tuple[int, ...]:
  """Lengths of the stacked axes of a quantizer's module; () where nothing tells."""
  if (packed := quantizer.leaves[0].packed) is not None:
    return tuple(packed.codes.shape[: len(quantizer.stack)])
  if quantizer.param is not None:
    held = dict(tree.leaves(tree.lookup(params, (*path, quantizer.param))))
    return tuple(held[()].shape[axis] for axis in quantizer.stack)
  for q in quantizer.leaves:
    for leaf in (q.amax, q.tensor_amax, q.pre_quant_scale, q.bias):
      if leaf is not None:
        return tuple(leaf.shape[: len(quantizer.stack)])
  return ()


def name_of(path: Path, index: tuple[int, ...], depths: tuple[int, ...]) -> str:
  """Dotted name of a module in torch's spelling, with the numbers of a stacked copy."""
  parts: list[str] = list(path)
  for depth, number in sorted(zip(depths, index, strict=False), reverse=True):
    parts.insert(depth, str(number))
  return canonical_name("/".join(parts))


def weight_name(owner: str, param: str) -> str:
  """Name of a layer's weight."""
  return ".".join(part for part in (owner, TORCH_NAMES.get(param, param)) if part)


def slots(variables: Mapping[str, Any], stacks: Stacks) -> dict[str, Slot]:
  """Everything that is saved of a model's variables, by name."""
  found: dict[str, Slot] = {}
  for collection, held in variables.items():
    if collection in PASSING or not isinstance(held, Mapping):
      continue
    leaves = tree.leaves(held)
    modules: dict[Path, list[str]] = collections.defaultdict(list)
    for path, _ in leaves:
      modules[path[:-1]].append(path[-1])
    for path, value in leaves:
      for name, slot in _slots_of(collection, path, tuple(value.shape), variables, stacks, modules[path[:-1]]):
        if name in found:
          raise ValueError(f"{'/'.join(found[name].path)!r} and {'/'.join(path)!r} are both called {name!r} in torch; rename one of them")
        found[name] = slot
  return found


def _slots_of(
  collection: str, path: Path, shape: tuple[int, ...], variables: Mapping[str, Any], stacks: Stacks, siblings: list[str]
) -> Iterator[tuple[str, Slot]]:
  module, leaf = path[:-1], path[-1]
  stack, sizes, depths = stacks.of(module, shape)
  layout = _layout(collection, path, variables)
  one = tuple(n for i, n in enumerate(shape) if i not in stack)
  seen = tuple(math.prod(one[axis] for axis in axes) for axes in layout.of(len(one)))
  if collection == "params" and leaf == "bias" and _weight_layouts(module, variables):
    seen = (math.prod(one),)  # DenseGeneral keeps [heads, head_dim]; torch has one axis of outputs
  for index in itertools.product(*map(range, sizes)):
    name = _leaf_name(collection, leaf, siblings)
    owner = name_of(module, index, depths)
    full = f"{owner}.{name}" if owner else name
    yield full if collection in ("params", "batch_stats") else f"{collection}:{full}", Slot(collection, path, stack, index, layout, seen)


def _leaf_name(collection: str, leaf: str, siblings: list[str]) -> str:
  names = {"params": TORCH_NAMES, "batch_stats": _STATISTICS}.get(collection, {})
  name = names.get(leaf, leaf)
  return leaf if [names.get(other, other) for other in siblings].count(name) > 1 else name


def _weight_layouts(module: Path, variables: Mapping[str, Any]) -> dict[str, Layout]:
  """Parameter -> layout, of the quantized weights of a module."""
  node = tree.lookup(variables["quant"], module) or {}
  return {q.param: q.layout for q in node.values() if is_quantizer(q) and q.param is not None}


def _layout(collection: str, path: Path, variables: Mapping[str, Any]) -> Layout:
  return _weight_layouts(path[:-1], variables).get(path[-1], SAME) if collection == "params" else SAME
