"""The chain of equal blocks of a Flax model, such as its decoder layers, and running one of them alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from core.calibrate.host import PREPARED, Visit
from jax_backend import discover, layouts, taps, tree, watch
from jax_backend.interceptors import INPUT, quantizing
from jax_backend.lifted import with_params
from jax_backend.quantizer import PASS, AnyQuantizer
from jax_backend.stacks import rows_of
from jax_backend.taps import Tap
from jax_backend.tree import RIDER, Path, Rider

_tokens = itertools.count()
_NUMBERED = re.compile(r"^(.*?)_?(\d+)$")


@dataclasses.dataclass
class Chain:
  """Blocks of which each reads what the one before returns.

  Attributes:
    blocks: in order; empty where the model has no such chain.
    hidden: what enters the first one, per batch.
  """

  blocks: list[JaxBlock]
  hidden: list[Any]

  @classmethod
  def find(cls, host: Any, loop: Callable[[Any], Any] | None, exclude_padding: bool) -> Chain:
    """Find the chain and record what its blocks are called with, for every batch of the forward loop.

    The first batch runs through the blocks and shows whether they are a chain; for the others the blocks are passed over, so that only
    what stands around them is computed. Without data, numbered siblings are taken for a chain.
    """
    paths = _candidate([place.path for place in host.places.values() if not place.index])
    if len(paths) < 2:
      return cls([], [])
    recorder = _Recorder(host, paths, exclude_padding)
    if loop is not None:
      loop(recorder)
    if not recorder.is_chain:
      return cls([], [])
    blocks = [JaxBlock(host, path, recorder.modules.get(path), recorder.calls[path]) for path in paths]
    return cls(blocks, recorder.hidden)


def _candidate(layers: list[Path]) -> list[Path]:
  """Paths of the numbered siblings ("layers_0", "layers_1", ...) that hold most of the layers."""
  families: dict[tuple[Path, str], dict[int, Path]] = {}
  counts: dict[tuple[Path, str], int] = {}
  for path in layers:
    for depth, part in enumerate(path[:-1]):
      numbered = _NUMBERED.match(part)
      if numbered:
        key = (path[:depth], numbered[1])
        families.setdefault(key, {})[int(numbered[2])] = path[: depth + 1]
        counts[key] = counts.get(key, 0) + 1
  if not families:
    return []
  best = max(families, key=lambda key: (counts[key] if len(families[key]) > 1 else 0, -len(key[0])))
  return [families[best][i] for i in sorted(families[best])]


@dataclasses.dataclass
class Call:
  """Arguments of one block in one batch (the hidden states among them are replaced), and the padding mask of that batch."""

  args: tuple[Any, ...]
  kwargs: dict[str, Any]
  mask: np.ndarray | None


class _Recorder:
  """Runs the model and records what its blocks are called with; from the second batch on, the blocks return their input.

  Arguments ride out of the blocks in riders, as calibration's tensors do, since under nn.remat a block's inside sees tracers alone.
  """

  def __init__(self, host: Any, paths: list[Path], exclude_padding: bool) -> None:
    self._host = host
    self._order = {path: i for i, path in enumerate(paths)}
    self._exclude_padding = exclude_padding
    self._rest: dict[Path, Any] = {}
    self._met: dict[Path, tuple[Any, ...]] = {}  # blocks of this batch: what is static of their arguments, and the shapes of the others
    self._open: set[Path] = set()
    self.is_chain = True
    self.modules: dict[Path, nn.Module] = {}
    self.calls: dict[Path, list[Call]] = {path: [] for path in paths}
    self.hidden: list[Any] = []

  def __call__(self, *args: Any, rngs: Any = None, method: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
    module = self._host.qmodule.module
    plain = {name: value for name, value in self._host.variables.items() if name != "quant"}
    self._met = {}
    params, token = plain["params"], f"call {next(_tokens)}"
    for path in self._order:  # so that nn.jit takes no trace of another block or batch for it
      params = tree.replaced(params, path, {**tree.lookup(params, path), RIDER: Rider({}, (token, path))})
    plain["params"] = params
    with nn.intercept_methods(self._intercept):
      y, updates = module.apply(plain, *args, rngs=rngs, method=method, mutable=with_params(mutable), **kwargs)
    if self.is_chain:
      self._keep(updates.get("params", {}), watch.mask_of(module, method, args, kwargs) if self._exclude_padding else None)
    return y if mutable is False or mutable is None else (y, {name: value for name, value in updates.items() if name != "params"})

  def apply(self, _: Any, *args: Any, **kwargs: Any) -> Any:
    """As `__call__`, for loops that are written with `model.apply(variables, batch)`."""
    return self(*args, **kwargs)

  def _intercept(self, next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    path = tuple(context.module.path) if context.module.scope is not None else ()
    if path not in self._order or context.method_name != "__call__" or path in self._open or not self.is_chain:
      return next_fun(*args, **kwargs)
    if path in self._met or not args or not hasattr(args[0], "dtype"):
      self.is_chain = False
      return next_fun(*args, **kwargs)
    dynamic, rest = discover.split_arrays(args, kwargs)
    self._met[path] = (rest, [None if a is None else jnp.shape(a) for a in dynamic])
    shown = {str(i): a for i, a in enumerate(dynamic) if a is not None}
    if path in self._rest:
      y = args[0] if self._rest[path] is None else (args[0], *self._rest[path])
    else:
      y = self._first(next_fun, path, args, kwargs, context.module)
      shown["out"] = y[0] if isinstance(y, tuple) else y
    context.module.put_variable("params", RIDER, Rider({}, taps=shown))
    return y

  def _first(self, next_fun: Any, path: Path, args: Any, kwargs: Any, module: nn.Module) -> Any:
    """The block itself, in the first batch."""
    self.modules[path] = module.clone(parent=None, name=None)
    self._open.add(path)
    y = next_fun(*args, **kwargs)
    self._open.discard(path)
    out, *rest = y if isinstance(y, tuple) else (y,)
    self._rest[path] = tuple(rest) if isinstance(y, tuple) else None
    if getattr(out, "shape", None) != args[0].shape or any(value is not None for value in rest):
      self.is_chain = False
    return y

  def _keep(self, params: Any, mask: np.ndarray | None) -> None:
    """What one batch has shown; it is a chain where each block was handed what the one before returned."""
    before, first = None, not self.hidden
    for path in self._order:
      rider = tree.lookup(params, (*path, RIDER))
      if path not in self._met or rider is None:
        self.is_chain = False
        return
      rest, shapes = self._met[path]
      dynamic = [None if shape is None else rider.taps[str(i)] for i, shape in enumerate(shapes)]
      args, kwargs = discover.join_arrays(dynamic, rest)
      stacked = any(a is not None and jnp.shape(a) != shape for a, shape in zip(dynamic, shapes, strict=True))  # by nn.vmap or nn.scan
      if stacked or (before is not None and not np.array_equal(args[0], before, equal_nan=True)):
        self.is_chain = False
        return
      before = rider.taps["out"] if first else None
      if self._order[path] == 0:
        self.hidden.append(args[0])
      self.calls[path].append(Call(args[1:], kwargs, mask))


class JaxBlock:
  """One block (`core.calibrate.host.Block`)."""

  def __init__(self, host: Any, path: Path, module: nn.Module | None, calls: list[Call]) -> None:
    self._host = host
    self._path = path
    self._module = module
    self._calls = calls
    self.name = tree.full_name(path, "x").removesuffix(".x")
    self._places = {name: place.path[len(path) :] for name, place in host.places.items() if place.path[: len(path)] == path}
    self._names = {relative: name for name, relative in self._places.items()}
    self.layers = tuple(self._places)

  def run(self, batch: int, hidden: Any, quantized: Collection[str] = (), visit: Visit | None = None, point: str = PREPARED) -> Any:
    call = self._calls[batch]
    quant = self._quant(quantized, quantized)
    tap = None
    if visit is not None:
      keys = [(path, INPUT) for path in self._places.values() if self._host._is_linear((*self._path, *path))]
      tap = watch.tap_of(quant, keys, point)
    dynamic, rest = discover.split_arrays((hidden, *call.args), call.kwargs)
    y, tensors, aliases = _run(self._module, rest, tap, self._variables(), quant, dynamic)
    if visit is not None:
      watch.hand_out(tensors, aliases.value, functools.partial(self._visit, visit), call.mask)
    return y

  def _visit(self, visit: Visit, members: Any, x: np.ndarray, mask: Any) -> None:
    visit(tuple(self._names[path] for path, _ in members), rows_of(x, mask))

  def gradient(
    self, batch: int, hidden: Any, target: Any, values: dict[str, np.ndarray], quantized: Collection[str] = ()
  ) -> tuple[float, dict[str, np.ndarray]]:
    call = self._calls[batch]
    dynamic, rest = discover.split_arrays((hidden, *call.args), call.kwargs)
    names = tuple(self._relative(name) for name in values)
    mask = None if call.mask is None else jnp.asarray(call.mask, jnp.float32)
    quant = self._quant((), quantized)
    given = {relative: jnp.asarray(value) for relative, value in zip(names, values.values(), strict=True)}
    loss, found = _gradient(self._module, rest, self._variables(), quant, dynamic, target, mask, given)
    return float(loss), {name: np.asarray(found[relative]) for name, relative in zip(values, names, strict=True)}

  def parameters(self) -> dict[str, np.ndarray]:
    return {".".join(path): np.array(value, np.float32) for path, value in self._free()}

  def set_parameters(self, values: dict[str, np.ndarray]) -> None:
    held = dict(self._free())
    for name, value in values.items():
      path = next(p for p in held if ".".join(p) == name)
      new = jnp.asarray(value, held[path].dtype)
      self._host.variables["params"] = tree.replaced(self._host.variables["params"], (*self._path, *path), new)

  def _free(self) -> list[tuple[Path, Any]]:
    weights = {(*path, str(self._host._quant[(*self._path, *path), "weight_quantizer"].param)) for path in self._places.values()}
    own = tree.lookup(self._host.variables["params"], self._path)
    return [(path, value) for path, value in tree.leaves(own) if path not in weights]

  def _relative(self, name: str) -> str:
    """Name of a value below the block: of a layer's weight by its Flax path, so that blocks share a compilation."""
    layer = name.removesuffix(".weight")
    if name.endswith(".weight") and layer in self._places:
      path = self._places[layer]
      return ".".join((*path, str(self._host._quant[(*self._path, *path), "weight_quantizer"].param)))
    return name

  def _variables(self) -> dict[str, Any]:
    below = {name: tree.lookup(value, self._path) for name, value in self._host.variables.items() if name != "quant"}
    return {name: value for name, value in below.items() if value is not None}

  def _quant(self, weights: Collection[str], inputs: Collection[str]) -> dict[str, Any]:
    """Quantizers below the block, those of other layers letting their input pass, without what names the block."""
    made = {}
    for path, name, quantizer in tree.items(self._host.quant_below(self._path)):
      layer = self._names.get(path, "")
      on = layer in (weights if quantizer.param is not None else inputs)
      made[path, name] = _bare(quantizer if on else quantizer.with_mode(PASS))
    return tree.build(made)


def _bare(quantizer: AnyQuantizer) -> AnyQuantizer:
  return quantizer.map(lambda q: q.replace(parent_classes=(), group=None))


def _apply(module: nn.Module, rest: Any, variables: Any, quant: Any, dynamic: Any, tap: Tap | None = None) -> tuple[Any, Any]:
  args, kwargs = discover.join_arrays(dynamic, rest)
  mounted = {**variables, "params": tree.mount(variables.get("params", {}), quant, tap)}
  with nn.intercept_methods(quantizing):
    y, updates = module.apply(mounted, *args, mutable=with_params(False), **kwargs)
  return (y[0] if isinstance(y, tuple) else y), updates["params"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(module: nn.Module, rest: Any, tap: Tap | None, variables: Any, quant: Any, dynamic: Any) -> Any:
  with taps.tapping(tap) as order:
    y, params = _apply(module, rest, variables, quant, dynamic, tap)
  tensors, aliases = taps.shown(params, order)
  return y, taps.unkeyed(tensors), watch.Static(aliases)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(module: nn.Module, rest: Any, variables: Any, quant: Any, dynamic: Any, target: Any, mask: Any, values: Any) -> Any:
  def loss_of(values: Any) -> Any:
    params, quantizers = variables["params"], quant
    for name, value in values.items():
      params, quantizers = _with_value(params, quantizers, tuple(name.split(".")), value)
    y, _ = _apply(module, rest, {**variables, "params": params}, quantizers, dynamic)
    squares = jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32))
    if mask is None or mask.shape != squares.shape[:-1]:
      return jnp.mean(squares)
    return jnp.sum(squares * mask[..., None]) / (jnp.sum(mask) * squares.shape[-1])

  return jax.value_and_grad(loss_of)(values)


def _with_value(params: Any, quant: Any, path: Path, value: Any) -> tuple[Any, Any]:
  """The trees with one value in place: a weight (given in torch's layout), another parameter, or a low-rank factor of a quantizer."""
  quantizer = tree.lookup(quant, path[:-1])
  if path[-1] in ("low_rank_a", "low_rank_b") and quantizer is not None:
    first = quantizer.leaves[0]
    changed = quantizer.map(lambda q: q.replace(**{path[-1]: value}) if q is first else q)
    return params, tree.replaced(quant, path[:-1], changed)
  held = meta.unbox(tree.lookup(params, path))
  owner = tree.lookup(quant, (*path[:-1], "weight_quantizer"))
  if owner is not None and owner.param == path[-1]:
    value = layouts.from_torch(value, owner.layout, held.shape)
  return tree.replaced(params, path, value.astype(held.dtype)), quant
