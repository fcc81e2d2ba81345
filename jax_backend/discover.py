"""Which quantizers a model has: an abstract trace of one call, before any arithmetic. Nothing is computed, nothing is allocated.

The trace sees what the real one will see, through nn.scan, nn.vmap, nn.remat and nn.jit, and reads off where a transform stacks
parameters: every quantized module leaves markers of known shape in `params`, which come back with the stacked axes in them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jax_backend import attention, modules, tree
from jax_backend.layouts import Layout
from jax_backend.lifted import is_lifted, with_params
from jax_backend.modules import ModuleKind
from jax_backend.tree import RIDER, Path, Rider

_MARKERS = ((7, 11, 13), (17, 19, 23))  # two shapes, so that no stacked length can be mistaken for part of both
_tokens = itertools.count()


@dataclasses.dataclass
class Found:
  """One module that gets quantizers.

  Attributes:
    path: module path.
    kind: rules of its class.
    parent_classes: names for `parent_class` entries.
    weights: parameter name -> layout.
    input, output: layouts of what the module takes and returns; None where there is no quantizer.
    input_aval, output_aval: their shapes and types inside the module (stacked axes gone); None where no such tensor was seen.
    operands: of attention: quantizer name -> (layout, shape and type inside the module).
    stack: positions of stacked axes among the axes of a stored parameter.
    sizes: their lengths.
  """

  path: Path
  kind: ModuleKind
  parent_classes: tuple[str, ...]
  weights: dict[str, Layout]
  input: Layout | None = None
  output: Layout | None = None
  input_aval: Any = None
  output_aval: Any = None
  operands: dict[str, tuple[Layout, Any]] = dataclasses.field(default_factory=dict)
  stack: tuple[int, ...] = ()
  sizes: tuple[int, ...] = ()


def split_arrays(args: Any, kwargs: Any) -> tuple[list[Any], tuple[Any, ...]]:
  """(arrays, everything else) of a call's arguments: flags, strings and Python numbers stay Python values under jit."""
  leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
  dynamic = [leaf if _is_array(leaf) else None for leaf in leaves]
  static = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
  return dynamic, (treedef, static, tuple(_is_array(leaf) for leaf in leaves))


def join_arrays(dynamic: list[Any], rest: tuple[Any, ...]) -> tuple[Any, Any]:
  """The inverse of `split_arrays`."""
  treedef, static, is_array = rest
  return jax.tree.unflatten(treedef, [d if a else s for d, s, a in zip(dynamic, static, is_array, strict=True)])


def _is_array(x: Any) -> bool:
  return hasattr(x, "shape") and hasattr(x, "dtype")


def trace(
  module: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, rngs: Any, method: Any, mutable: Any
) -> list[Found]:
  """The modules that one call of the model would quantize, in the order in which they run."""
  token = next(_tokens)
  found: dict[Path, Found] = {}
  dynamic, rest = split_arrays(args, dict(kwargs))

  def spy(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    inner = context.module
    kind = None if inner.scope is None or is_lifted(context) else modules.kind_of(type(inner))
    if inner.scope is not None and not is_lifted(context):
      next_fun = attention.seen_through(next_fun, inner, context.method_name)
    y = next_fun(*args, **kwargs)
    if kind is not None and context.method_name in (*kind.methods, *kind.weight_methods) and _is_ours(inner, token):
      _note(found, inner, kind, context.method_name, args, kwargs, y)
      _mark(inner, token)
    return y

  def note(inner: nn.Module, name: str, layout: Layout, x: Any) -> None:
    if inner.scope is None or not _is_ours(inner, token):
      return
    path, kind = tuple(inner.path), modules.kind_of(type(inner)) or ModuleKind()
    entry = found.setdefault(path, Found(path, kind, modules.parent_classes(kind, inner), {}))
    entry.operands[name] = (layout, jax.ShapeDtypeStruct(x.shape, x.dtype))
    _mark(inner, token)

  def call(variables: Any, dynamic: Any, rngs: Any) -> Any:
    args, kwargs = join_arrays(dynamic, rest)
    probed = {**variables, "params": _probe(variables.get("params", {}), token)}
    with nn.intercept_methods(spy), attention.noting(note):
      _, updates = module.apply(probed, *args, rngs=rngs, method=method, mutable=with_params(mutable), **kwargs)
    return _markers(updates["params"])

  markers = jax.eval_shape(call, dict(variables), dynamic, rngs)
  for path, shapes in markers.items():
    if path in found:
      found[path].stack, found[path].sizes = _stacked(tuple(s.shape for s in shapes))
  return list(found.values())


def _mark(module: nn.Module, token: int) -> None:
  module.put_variable("params", RIDER, Rider({"stack": [jnp.zeros(s) for s in _MARKERS]}, (token, tuple(module.path))))


def _is_ours(module: nn.Module, token: int) -> bool:
  """Whether the module belongs to the traced model, not to another one that runs inside it."""
  rider = module.get_variable("params", RIDER)
  if rider is not None:
    return rider.probe is not None and rider.probe[0] == token
  return module.is_mutable_collection("params")  # a module without parameters carries no probe


def _probe(params: Any, token: int, path: Path = ()) -> dict[str, Any]:
  probed = {name: _probe(node, token, (*path, name)) if isinstance(node, Mapping) else node for name, node in params.items()}
  return {**probed, RIDER: Rider({}, (token, path))}


def _markers(params: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
  marked = {}
  for name, node in params.items():
    if tree.is_rider(node):
      if node.quantizers:
        marked[path] = node.quantizers["stack"]
    elif isinstance(node, Mapping):
      marked |= _markers(node, (*path, name))
  return marked


def _stacked(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Positions and lengths of the axes that were put into the markers."""
  rank = len(shapes[0])
  for positions in itertools.combinations(range(rank), rank - len(_MARKERS[0])):
    rests = (tuple(n for i, n in enumerate(shape) if i not in positions) for shape in shapes)
    if all(rest == marker for rest, marker in zip(rests, _MARKERS, strict=True)):
      return positions, tuple(shapes[0][i] for i in positions)
  raise ValueError(f"a transform changed markers of shapes {_MARKERS} in `params` to {shapes}; it cannot be quantized through")


def _note(found: dict[Path, Found], module: nn.Module, kind: ModuleKind, method: str, args: Any, kwargs: Any, y: Any) -> None:
  path = tuple(module.path)
  entry = found.get(path)
  if entry is None:
    entry = found[path] = Found(path, kind, modules.parent_classes(kind, module), {})
  for param, rule in kind.weights:
    if module.has_variable("params", param):
      entry.weights[param] = rule(module, args, kwargs)
  if method not in kind.methods:
    return
  x = modules.first_argument(args, kwargs)
  if kind.input is not None and _is_array(x):
    entry.input, entry.input_aval = kind.input(module, args, kwargs), jax.ShapeDtypeStruct(x.shape, x.dtype)
  if kind.output is not None and _is_array(y):
    entry.output, entry.output_aval = kind.output(module, args, kwargs), jax.ShapeDtypeStruct(y.shape, y.dtype)


def guess_inputs(module: nn.Module, variables: Mapping[str, Any]) -> tuple[Any, ...]:
  """Abstract arguments with which the module can be traced, for weights that are quantized without any data.

  Token indices are tried where there is an embedding table, feature vectors and images whose last axis is that of a kernel otherwise. What
  is found in the trace does not depend on the other lengths.

  Raises:
    ValueError: none of them fits.
  """
  kernels = _input_lengths(variables.get("params", {}))
  guesses = [jax.ShapeDtypeStruct((1, 8), jnp.int32)] if any(rank == 0 for rank, _ in kernels) else []
  for rank, length in kernels:
    leads = {2: ((1,), (1, 8)), 3: ((1, 32),), 4: ((1, 32, 32), (1, 28, 28), (1, 8, 8)), 5: ((1, 16, 16, 16),)}.get(rank, ())
    guesses += [jax.ShapeDtypeStruct((*lead, length), jnp.float32) for lead in leads]
  for guess in guesses[:12]:
    try:
      trace(module, variables, (guess,), {}, rngs=None, method=None, mutable=False)
    except Exception:  # whatever a user's module raises on a shape that it does not take
      continue
    return (guess,)
  raise ValueError(
    "the module cannot be traced from its parameters alone; pass example_inputs= (arrays or jax.ShapeDtypeStruct, as the module is called "
    "with: a tuple of positional or a dict of keyword arguments) or a forward_loop"
  )


def _input_lengths(params: Mapping[str, Any]) -> list[tuple[int, int]]:
  """(rank, input length) of the kernels, in the order of the tree and without repeats; rank 0 stands for an embedding table."""
  lengths: dict[tuple[int, int], None] = {}
  for name, node in params.items():
    if isinstance(node, Mapping):
      lengths |= dict.fromkeys(_input_lengths(node))
      continue
    shape = jnp.shape(meta.unbox(node))
    if name == "embedding":
      lengths[0, 0] = None
    elif name == "kernel" and len(shape) >= 2:
      lengths[len(shape), shape[-2]] = None
  return list(lengths)
