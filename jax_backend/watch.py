"""Watch: what a forward loop calls as its model while calibration looks at tensors; nothing is quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from core.calibrate.padding import mask_argument
from jax_backend import discover, taps, tree
from jax_backend.apply import QuantModule
from jax_backend.interceptors import quantizing
from jax_backend.lifted import with_params
from jax_backend.quantizer import PASS, AnyQuantizer
from jax_backend.taps import Tap
from jax_backend.tree import Path

Key = tuple[Path, str]
Seen = Callable[[Sequence[Key], np.ndarray, Any], None]


class Watch:
  """Runs the model in float, one jitted step per batch, and hands out the tensors at the given quantizers.

  Args:
    qmodule, qvariables: the model.
    keys: (module path, quantizer name) of the quantizers.
    point: PREPARED or QUANTIZED, as in `core.calibrate.host`, or `taps.UNROUNDED`.
    seen: called with the keys that saw one tensor, the tensor, and the call's attention mask (None unless asked for).
    masked: give `seen` the attention mask of the call.
  """

  def __init__(
    self, qmodule: QuantModule, qvariables: Mapping[str, Any], keys: Sequence[Key], point: str, seen: Seen, masked: bool
  ) -> None:
    self._qmodule = qmodule
    self._tap = tap_of(qvariables["quant"], keys, point)
    self._variables = {**qvariables, "quant": with_modes(qvariables["quant"], PASS)}
    self._seen = seen
    self._masked = masked

  def __call__(self, *args: Any, rngs: Any = None, method: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
    """The module's own result; arguments as for `module.apply`."""
    dynamic, rest = discover.split_arrays(args, kwargs)
    frozen = tuple(mutable) if isinstance(mutable, list | set) else mutable
    y, tensors, aliases = _step(self._qmodule, rest, method, frozen, self._tap, self._variables, dynamic, rngs)
    hand_out(tensors, aliases.value, self._seen, mask_of(self._qmodule.module, method, args, kwargs) if self._masked else None)
    return y

  def apply(self, _: Any, *args: Any, **kwargs: Any) -> Any:
    """As `__call__`, for loops that are written with `model.apply(variables, batch)`."""
    return self(*args, **kwargs)


def mask_of(module: nn.Module, method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> np.ndarray | None:
  """The attention mask [B, T] among the arguments of `module.apply(..., method=method)`, or None."""
  function = method if callable(method) else getattr(type(module), method or "__call__")
  mask = mask_argument(function, (module, *args), kwargs)
  return None if mask is None else np.asarray(mask)


def hand_out(tensors: Mapping[str, Any], aliases: Mapping[Path, Path], seen: Seen, mask: np.ndarray | None) -> None:
  """Call `seen` for every tensor, with all modules that read it."""
  followers: dict[Path, list[Path]] = {}
  for path, owner in aliases.items():
    followers.setdefault(owner, []).append(path)
  for (path, name), x in taps.keyed(tensors):
    others = followers.get(path, ()) if name == taps.INPUT else ()
    seen([(path, name), *((other, name) for other in others)], np.asarray(x), mask)


def with_modes(quant: Mapping[str, Any], mode: str) -> dict[str, Any]:
  """The tree with all enabled quantizers in that mode."""
  return tree.build({(path, name): q.with_mode(mode) for path, name, q in tree.items(quant)})


def tap_of(quant: Mapping[str, Any], keys: Sequence[Key], point: str) -> Tap:
  """The tap for these quantizers; those of one scale, format and amax are told to share what they see."""
  held = {(path, name): q for path, name, q in tree.items(quant)}
  views: dict[Any, int] = {}
  return Tap(tuple((path, name, views.setdefault(_view(held[path, name]), len(views))) for path, name in keys), point)


def _view(quantizer: AnyQuantizer) -> Any:
  return tuple((q.config, q.is_enabled, _bytes(q.pre_quant_scale), _bytes(q.amax)) for q in quantizer.leaves)


def _bytes(value: Any) -> bytes | None:
  return None if value is None else np.asarray(value).tobytes()


class Static:
  """A value that leaves a jitted function as part of its result's structure."""

  def __init__(self, value: Any) -> None:
    self.value = value


jax.tree_util.register_pytree_node(Static, lambda s: ((), _Hashed(s.value)), lambda aux, _: Static(aux.value))


class _Hashed:
  def __init__(self, value: Mapping[Path, Path]) -> None:
    self.value = value

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Hashed) and self.value == other.value

  def __hash__(self) -> int:
    return hash(tuple(sorted(self.value.items())))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _step(qmodule: QuantModule, rest: Any, method: Any, mutable: Any, tap: Tap, variables: Any, dynamic: Any, rngs: Any) -> Any:
  args, kwargs = discover.join_arrays(dynamic, rest)
  plain = {name: value for name, value in variables.items() if name not in ("params", "quant")}
  mounted = tree.mount(variables["params"], variables["quant"], tap)
  asked = list(mutable) if isinstance(mutable, tuple) else mutable
  with nn.intercept_methods(quantizing), taps.tapping(tap) as order:
    y, updates = qmodule.module.apply({**plain, "params": mounted}, *args, rngs=rngs, method=method, mutable=with_params(asked), **kwargs)
  tensors, aliases = taps.shown(updates["params"], order)
  if asked is not False and asked is not None:
    y = (y, {name: value for name, value in updates.items() if name != "params"})
  return y, taps.unkeyed(tensors), Static(aliases)
