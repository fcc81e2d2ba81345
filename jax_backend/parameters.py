"""The JAX model as `core.calibrate.relations` looks at it: any parameter by torch's name, what norms do, and the scales of layers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from core.calibrate.layer import Change
from core.config.matching import canonical_name
from core.quantize import QuantizedTensor
from jax_backend import layouts, packed, tree, weights
from jax_backend.apply import QuantModule
from jax_backend.interceptors import INPUT
from jax_backend.layouts import SAME, Layout
from jax_backend.quantizer import AnyQuantizer
from jax_backend.tree import Path

WEIGHT = "weight_quantizer"
TORCH_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


class Where(NamedTuple):
  """Where a parameter is: path in `params`, positions of the stacked axes, which of the stacked copies, and torch's layout."""

  path: Path
  stack: tuple[int, ...]
  index: tuple[int, ...]
  layout: Layout


class Parameters:
  """The part of `JaxHost` that deals with parameters of any module."""

  qmodule: QuantModule
  variables: dict[str, Any]
  places: dict[str, Any]
  _quant: dict[tuple[Path, str], AnyQuantizer]
  _stale: set[tuple[Path, str]]
  _parameter: Callable[..., Any]
  _calibrated: Callable[..., AnyQuantizer]
  _with_low_rank: Callable[..., AnyQuantizer]

  def weighted(self) -> list[str]:
    return list(self.places)

  def _wheres(self) -> dict[str, Where]:
    """Every parameter by its name in torch's spelling; stacked copies have their index behind the module: "layers.norm[3].weight"."""
    found = {}
    for path, value in tree.leaves(self.variables["params"]):
      quantizer = self._quant.get((path[:-1], WEIGHT))
      is_weight = quantizer is not None and quantizer.param == path[-1]
      layout = quantizer.layout if quantizer is not None and is_weight else SAME
      stack = quantizer.stack if quantizer is not None else self._stack_around(path[:-1])
      name = canonical_name("/".join(path[:-1]))
      for index in itertools.product(*(range(value.shape[axis]) for axis in stack)):
        label = name + (f"[{','.join(map(str, index))}]" if index else "")
        found[f"{label}.{TORCH_NAMES.get(path[-1], path[-1])}" if label else path[-1]] = Where(path, stack, index, layout)
    return found

  def _stack_around(self, path: Path) -> tuple[int, ...]:
    """Stacked axes of a module without a quantized weight: those of the layers in the nearest module around it, where they all agree."""
    for depth in range(len(path) - 1, -1, -1):
      near = {q.stack for (p, name), q in self._quant.items() if name == WEIGHT and p[:depth] == path[:depth]}
      if near:
        return near.pop() if len(near) == 1 else ()
    return ()

  def _held(self, where: Where) -> Any:
    """A parameter as it is stored, one copy of a stack."""
    return weights.to_front(jnp.asarray(self._parameter(where.path[:-1], where.path[-1])), where.stack)[where.index]

  def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, where in self._wheres().items():
      shape = [n for i, n in enumerate(self._parameter(where.path[:-1], where.path[-1]).shape) if i not in where.stack]
      found[name] = tuple(math.prod(shape[axis] for axis in axes) for axes in where.layout.of(len(shape)))
    return found

  def parameter(self, name: str) -> np.ndarray | None:
    where = self._wheres().get(name)
    if where is None:
      return None
    value = np.asarray(layouts.to_torch(self._held(where), where.layout))
    return np.array(value, np.float64 if value.dtype == np.float64 else np.float32, order="C")

  def set_parameter(self, name: str, value: np.ndarray) -> None:
    wheres = self._wheres()
    if name not in wheres:
      raise ValueError(f"the model has no parameter {name!r}; it has {', '.join(list(wheres)[:8])}, ...")
    where = wheres[name]
    held = self._held(where)
    new = layouts.from_torch(jnp.asarray(np.array(value, order="C")), where.layout, held.shape).astype(held.dtype)
    if where.index:
      front = weights.to_front(jnp.asarray(self._parameter(where.path[:-1], where.path[-1])), where.stack)
      new = weights.from_front(front.at[where.index].set(new), where.stack)
    self.variables["params"] = tree.replaced(self.variables["params"], where.path, new)
    module = name.rpartition(".")[0]
    if module in self.places and where.layout != SAME:
      key = (where.path[:-1], WEIGHT)
      self._quant[key] = self._calibrated(module, self.places[module], Change())

  def norm(self, name: str) -> str:
    """By the class where it is one of Flax's own; any other module with a scale counts as RMSNorm without a bias, as LayerNorm with one."""
    where = self._wheres().get(f"{name}.weight")
    if where is None or self._held(where).ndim != 1:
      return "other"
    known = self._quant.get((where.path[:-1], INPUT))
    if known is not None:
      classes = known.leaves[0].parent_classes
      return "layer" if "nn.LayerNorm" in classes else "rms" if "nn.RMSNorm" in classes else "other"
    around: Any = tree.lookup(self.variables["params"], where.path[:-1])
    return "layer" if "bias" in around else "rms"

  def is_table(self, name: str) -> bool:
    return "nn.Embedding" in self._quant[self.places[name].path, WEIGHT].leaves[0].parent_classes

  def head_dim(self) -> int | None:
    config = getattr(self.qmodule.module, "config", None)
    read: Callable[[str], Any] = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    given, hidden, heads = (read(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    return given or (hidden // heads if hidden and heads else None)

  def pre_quant_scale(self, name: str) -> np.ndarray | None:
    place = self.places[name]
    quantizer = self._quant.get((place.path, INPUT))
    held = None if quantizer is None else quantizer.leaves[0].pre_quant_scale
    scale = None if held is None else np.asarray(held, np.float32)[place.index]
    return None if scale is None or (place.index and (scale == 1).all()) else scale

  def clear_pre_quant_scale(self, name: str) -> None:
    place = self.places[name]
    quantizer = self._quant[place.path, INPUT]
    first = quantizer.leaves[0]
    left = None
    if place.index:
      stacked = jnp.asarray(first.pre_quant_scale).at[place.index].set(1.0)
      left = stacked if bool((stacked != 1).any()) else None
    self._quant[place.path, INPUT] = quantizer.map(lambda q: q.replace(pre_quant_scale=left) if q is first else q)

  def low_rank(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    place = self.places[name]
    first = self._quant[place.path, WEIGHT].leaves[0]
    if first.low_rank_a is None or first.low_rank_b is None:
      return None
    a, b = (np.asarray(part, np.float32)[place.index] for part in (first.low_rank_a, first.low_rank_b))
    return (a, b) if b.any() else None

  def stored(self, name: str) -> QuantizedTensor | None:
    place = self.places[name]
    first = self._quant[place.path, WEIGHT].leaves[0]
    return None if first.packed is None else packed.quantized(first, place.index)

  def recalibrate(self, names: Iterable[str]) -> None:
    wanted = {re.sub(r"\[[\d,]+\]", "", name) for name in names}  # stacked copies are one quantizer
    for key, quantizer in self._quant.items():
      if tree.full_name(*key) in wanted and any(q.is_enabled and q.config.needs_calibration for q in quantizer.leaves):
        self._stale.add(key)
