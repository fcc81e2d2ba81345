"""What calibration sees of a JAX model: layers as numpy arrays, their inputs, and the chain of blocks (`core.calibrate.host.Host`)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from core.calibrate.host import PREPARED, TensorVisit, Visit
from core.calibrate.layer import Change, Layer
from core.calibrate.padding import tokens_first
from core.config.schema import QuantizerConfig
from core.spec import QuantSpec
from jax_backend import groups, layouts, tree, weights
from jax_backend.apply import QuantModule
from jax_backend.blocks import Chain, JaxBlock
from jax_backend.calibrate import collect_activations, missing_calibrated
from jax_backend.distill import Distillation, Teacher
from jax_backend.interceptors import INPUT
from jax_backend.layouts import SAME, Layout
from jax_backend.parameters import Parameters
from jax_backend.quantizer import AnyQuantizer, Quantizer
from jax_backend.stacks import Rows, merged, rows_of, sliced, stack_at
from jax_backend.tree import Path
from jax_backend.watch import Watch

WEIGHT = "weight_quantizer"


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a layer is.

  Attributes:
    path: module path.
    index: which of the stacked copies, or () without a stack.
  """

  path: Path
  index: tuple[int, ...] = ()


class JaxHost(Parameters):
  """A quantized JAX model during calibration; `variables` are replaced as it proceeds.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables with quantizers.
    forward_loop: runs the model on calibration data, or None.
    exclude_padding: leave out tokens that the call's `attention_mask` [B, T] marks as padding.
    teacher: what the float model returned, for algorithms that tune the whole model.
  """

  backend = "jax"

  def __init__(
    self,
    qmodule: QuantModule,
    qvariables: Mapping[str, Any],
    forward_loop: Callable[[Any], Any] | None,
    exclude_padding: bool = False,
    teacher: Teacher | None = None,
  ) -> None:
    self._teacher = teacher
    self.qmodule = qmodule
    self.variables = dict(qvariables)
    self._loop = forward_loop
    self._exclude_padding = exclude_padding
    self._quant: dict[tuple[Path, str], AnyQuantizer] = {(path, name): q for path, name, q in tree.items(qvariables["quant"])}
    self.places = self._find()
    self._changed_inputs: set[Path] = set()
    self._stale: set[tuple[Path, str]] = set()
    self._chain: Chain | None = None

  def _find(self) -> dict[str, Place]:
    found = {}
    for (path, name), quantizer in self._quant.items():
      if name != WEIGHT:
        continue
      label = tree.full_name(path, name).removesuffix(f".{WEIGHT}")
      sizes = self._parameter(path, str(quantizer.param)).shape
      stacked = [range(sizes[axis]) for axis in quantizer.stack]
      for index in itertools.product(*stacked):
        found[label + (f"[{','.join(map(str, index))}]" if index else "")] = Place(path, index)
    return found

  def _parameter(self, path: Path, name: str) -> Any:
    quantizer = self._quant.get((path, WEIGHT))
    if quantizer is not None and quantizer.param == name and quantizer.leaves[0].packed is not None:
      return weights.from_front(weights.unpacked(quantizer, False), quantizer.stack)
    return meta.unbox(tree.lookup(self.variables["params"], (*path, name)))

  def layers(self) -> list[str]:
    return [n for n, p in self.places.items() if any(self._is_on(p.path, role) for role in (WEIGHT, INPUT))]

  def _is_on(self, path: Path, role: str) -> bool:
    quantizer = self._quant.get((path, role))
    return quantizer is not None and quantizer.is_enabled

  def layer(self, name: str) -> Layer:
    place = self.places[name]
    quantizer = self._quant[place.path, WEIGHT]
    held = [q for q in quantizer.leaves if q.is_enabled]
    into = self._quant.get((place.path, INPUT))
    inputs = [q for q in into.leaves if q.is_enabled] if into is not None else []
    bias = tree.lookup(self.variables["params"], (*place.path, "bias"))
    first = held[0] if held else None
    given = first is not None and first.spec.two_level and not first.spec.dynamic
    return Layer(
      name=name,
      weight=np.asarray(layouts.to_torch(self._stored(place), quantizer.layout), np.float32),
      specs=tuple(q.spec for q in held),
      input_specs=tuple(q.spec for q in inputs),
      amax=stack_at(None if first is None else first.amax, place.index),
      tensor_amax=stack_at(first.tensor_amax, place.index) if given else None,  # type: ignore[union-attr]
      input_amax=stack_at(inputs[0].amax, place.index) if inputs else None,
      bias=None if bias is None else stack_at(weights.to_front(meta.unbox(bias), quantizer.stack), place.index),
      linear=self._is_linear(place.path) and all(q.config.rotate is None and q.config.bias is None for q in quantizer.leaves),
    )

  def _stored(self, place: Place) -> Any:
    quantizer = self._quant[place.path, WEIGHT]
    return weights.to_front(jnp.asarray(self._parameter(place.path, str(quantizer.param))), quantizer.stack)[place.index]

  def _is_linear(self, path: Path) -> bool:
    quantizer, into = self._quant[path, WEIGHT], self._quant.get((path, INPUT))
    rank = len(quantizer.layout.dims)
    named = "nn.Linear" in quantizer.leaves[0].parent_classes
    return named and rank == 2 and into is not None and (into.layout == SAME or into.layout == Layout("flatten", axes=(-1,)))

  def apply(self, name: str, change: Change) -> None:
    place = self.places[name]
    key = (place.path, WEIGHT)
    if change.pre_quant_scale is not None:
      self._scale_input(place, change.pre_quant_scale)
    if change.weight is not None:
      self._set_weight(place, change.weight)
    if change.low_rank is not None:
      self._quant[key] = self._with_low_rank(place, *change.low_rank)
    if change.weight is not None or change.amax is not None:
      self._quant[key] = self._calibrated(name, place, change)
    if change.bias is not None:
      self._set_bias(place, change.bias)
    if change.input_amax is not None and not (change.pre_quant_scale is not None and self._by_histogram(place)):
      self._set_activation_amax((place.path, INPUT), place.index, change.input_amax)

  def _by_histogram(self, place: Place) -> bool:
    """Whether amax of a scaled input is not the largest magnitude but what a histogram says: `settle` finds it."""
    return self._quant[place.path, INPUT].leaves[0].config.calibrator == "histogram"

  def _set_weight(self, place: Place, weight: np.ndarray) -> None:
    quantizer = self._quant[place.path, WEIGHT]
    held = self._stored(place)
    value = layouts.from_torch(jnp.asarray(np.asarray(weight, np.float32)), quantizer.layout, held.shape).astype(held.dtype)
    self._put(place, str(quantizer.param), value, quantizer.stack)

  def _set_bias(self, place: Place, bias: np.ndarray) -> None:
    held = tree.lookup(self.variables["params"], (*place.path, "bias"))
    if held is not None:
      self._put(place, "bias", jnp.asarray(bias, meta.unbox(held).dtype), self._quant[place.path, WEIGHT].stack)

  def _put(self, place: Place, parameter: str, value: Any, stack: tuple[int, ...]) -> None:
    if place.index:
      front = weights.to_front(jnp.asarray(self._parameter(place.path, parameter)), stack)
      value = weights.from_front(front.at[place.index].set(value), stack)
    self.variables["params"] = tree.replaced(self.variables["params"], (*place.path, parameter), value)

  def _calibrated(self, name: str, place: Place, change: Change) -> AnyQuantizer:
    """The weight quantizer with the amax of the change, or that of the weight; those behind the first always see what it returns."""
    quantizer = self._quant[place.path, WEIGHT]
    alone = quantizer.map(lambda q: sliced(q, place.index))
    first = alone.leaves[0]
    if change.amax is not None and not first.is_dynamic:
      given = change.tensor_amax if first.spec.two_level and not first.spec.dynamic else None
      first = first.with_amax(change.amax, given)
    stored = self._stored(place)
    done = weights.calibrate_from(alone, stored, f"{name}.{WEIGHT}", first if change.amax is not None else None)
    leaves = iter([merged(old, new, place.index) for old, new in zip(quantizer.leaves, done.leaves, strict=True)])
    return quantizer.map(lambda q: next(leaves))

  def _with_low_rank(self, place: Place, a: np.ndarray, b: np.ndarray) -> AnyQuantizer:
    def give(q: Quantizer) -> Quantizer:
      sizes = tuple(self._parameter(place.path, str(q.param)).shape[axis] for axis in q.stack)
      parts = {}
      for field, value in (("low_rank_a", a), ("low_rank_b", b)):
        held = getattr(q, field)
        value = jnp.asarray(np.asarray(value, np.float32))
        if place.index:
          held = jnp.zeros((*sizes, *value.shape), jnp.float32) if held is None else held
          value = held.at[place.index].set(value)
        parts[field] = value
      return q.replace(**parts)

    quantizer = self._quant[place.path, WEIGHT]
    first = quantizer.leaves[0]
    return quantizer.map(lambda q: give(q) if q is first else q)

  def _scale_input(self, place: Place, scale: np.ndarray) -> None:
    quantizer = self._quant[place.path, INPUT]
    first = quantizer.leaves[0]
    value = jnp.asarray(np.asarray(scale, np.float32))
    held = first.pre_quant_scale
    if place.index:
      param = str(self._quant[place.path, WEIGHT].param)
      sizes = tuple(self._parameter(place.path, param).shape[axis] for axis in self._quant[place.path, WEIGHT].stack)
      held = jnp.ones((*sizes, *value.shape), jnp.float32) if held is None else held
      value = held.at[place.index].set(held[place.index] * value)
    elif held is not None:
      value = held * value
    self._quant[place.path, INPUT] = quantizer.map(lambda q: q.replace(pre_quant_scale=value) if q is first else q)
    if any(q.is_enabled and q.config.needs_calibration for q in quantizer.leaves):
      self._changed_inputs.add(place.path)

  def set_amax(self, name: str, amax: np.ndarray | float) -> None:
    self._set_activation_amax(*self._activations()[name], amax)

  def _set_activation_amax(self, key: tuple[Path, str], index: tuple[int, ...], amax: Any) -> None:
    first = self._quant[key].leaves[0]
    new = merged(first, sliced(first, index).with_amax(np.asarray(amax, np.float32)), index)
    self._quant[key] = self._quant[key].map(lambda q: new if q is first else q)
    if key[1] == INPUT and not index:
      self._changed_inputs.discard(key[0])

  def _sync(self) -> dict[str, Any]:
    self.variables["quant"] = tree.build(self._quant)
    return self.variables

  def _take(self, quant: Mapping[str, Any]) -> None:
    self._quant = {(path, name): q for path, name, q in tree.items(quant)}
    self._sync()

  def settle(self) -> None:
    wanted = self._stale | {(path, INPUT) for path in self._changed_inputs}
    if wanted and self._loop is not None:
      self._take(collect_activations(self.qmodule, self._sync(), self._loop, lambda path, name, q: (path, name) in wanted))
    self._changed_inputs, self._stale = set(), set()
    self._take(groups.merge(self._sync()["quant"]))

  def calibrate_missing(self, inputs: bool = True) -> None:
    self._take(missing_calibrated(self.qmodule, self._sync(), self._loop if inputs else None))

  def activation_specs(self) -> dict[str, QuantSpec]:
    found = {}
    for key, quantizer in self._quant.items():
      first = quantizer.leaves[0]
      if quantizer.param is None and first.is_enabled and first.config.constant_amax is None:
        found[tree.full_name(*key)] = first.spec
    return found

  def activation_configs(self) -> dict[str, QuantizerConfig]:
    return {name: self._quant[key].leaves[0].config for name, (key, _) in self._activations().items()}

  def _activations(self) -> dict[str, tuple[tuple[Path, str], tuple[int, ...]]]:
    """Place and copy of the enabled activation quantizers. A stack that has no amax, hence saw no data, comes as one."""
    found = {}
    for (path, name), quantizer in self._quant.items():
      first = quantizer.leaves[0]
      if quantizer.param is None and first.is_enabled and first.config.constant_amax is None:
        sizes = () if first.amax is None else first.amax.shape[: len(first.stack)]
        module, _, role = tree.full_name(path, name).rpartition(".")
        for index in np.ndindex(sizes):
          label = module + (f"[{','.join(map(str, index))}]" if index else "")
          found[f"{label}.{role}" if label else role] = ((path, name), index)
    return found

  def activation_amax(self, name: str) -> np.ndarray | None:
    key, index = self._activations()[name]
    return stack_at(self._quant[key].leaves[0].amax, index)

  def observe(self, visit: Visit, names: Collection[str] | None = None, point: str = PREPARED) -> None:
    if self._loop is None:
      return
    wanted = self.places if names is None else {name: self.places[name] for name in names}
    keys = [(path, INPUT) for path in dict.fromkeys(place.path for place in wanted.values()) if self._is_linear(path)]
    self._loop(
      Watch(
        self.qmodule,
        self._sync(),
        keys,
        point,
        Rows({name: (place.path, place.index) for name, place in wanted.items()}, visit),
        self._exclude_padding,
      )
    )

  def observe_tensors(self, visit: TensorVisit, names: Collection[str]) -> None:
    if self._loop is None:
      return
    places: dict[tuple[Path, str], dict[tuple[int, ...], str]] = {}
    for name, (key, index) in self._activations().items():
      if name in names:
        places.setdefault(key, {})[index] = name

    def tell(members: Sequence[tuple[Path, str]], x: np.ndarray, mask: np.ndarray | None) -> None:
      for key in members:
        layout = self._quant[key].layout
        for index, name in places[key].items():
          shown = np.asarray(layouts.to_torch(x[index], layout), np.float32)
          shown = shown if mask is None else tokens_first(name, shown)
          visit(name, rows_of(shown, mask) if mask is not None and mask.shape == shown.shape[:-1] else shown)

    self._loop(Watch(self.qmodule, self._sync(), list(places), PREPARED, tell, self._exclude_padding))

  def blocks(self) -> Sequence[JaxBlock]:
    return self._found().blocks

  def block_inputs(self) -> list[Any]:
    return list(self._found().hidden)

  def _found(self) -> Chain:
    if self._chain is None:
      self._sync()
      self._chain = Chain.find(self, self._loop, self._exclude_padding)
    return self._chain

  def quant_below(self, path: Path) -> dict[str, Any]:
    """The quantizer tree of the modules below a path."""
    below = {(p[len(path) :], name): q for (p, name), q in self._quant.items() if p[: len(path)] == path}
    return tree.build(below)

  def student(self) -> Distillation:
    if self._teacher is None:
      raise ValueError("nothing of the float model was recorded; this algorithm needs a forward_loop")
    return Distillation(self, self._teacher)

  def float_weights(self) -> dict[str, np.ndarray]:
    if self._teacher is None:
      return {}
    found = {}
    for name, place in self.places.items():
      quantizer = self._quant[place.path, WEIGHT]
      held = jnp.asarray(meta.unbox(tree.lookup(self._teacher.variables["params"], (*place.path, str(quantizer.param)))))
      front = weights.to_front(held, quantizer.stack)[place.index]
      found[name] = np.asarray(layouts.to_torch(front, quantizer.layout), np.float32)
    return found

  def quantizer(self, path: Path) -> AnyQuantizer:
    """The weight quantizer of a layer."""
    return self._quant[path, WEIGHT]

  def set_low_rank(self, name: str, a: np.ndarray, b: np.ndarray) -> None:
    """Give a layer these low-rank factors."""
    place = self.places[name]
    self._quant[place.path, WEIGHT] = self._with_low_rank(place, a, b)

  def synced(self) -> dict[str, Any]:
    """The variables as they are now."""
    return self._sync()

  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for name, place in sorted(self.places.items(), key=lambda entry: entry[0]):
      quantizer = self._quant[place.path, WEIGHT]
      digest.update(name.encode())
      digest.update(repr([q.config for q in quantizer.leaves]).encode())
      layer = self.layer(name)
      for part in (layer.weight, layer.amax, layer.tensor_amax, layer.bias, self.pre_quant_scale(name)):
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
