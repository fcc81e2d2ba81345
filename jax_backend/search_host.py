"""What a search sees of a JAX model (`core.search.host.SearchHost`): the float model, and every format's calibrated layers beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import meta

from core.config import ConfigWarning
from core.config.matching import canonical_name
from core.search.host import Choices, Scores, SearchLayer
from jax_backend import candidates, discover, layouts, search_scores, tree
from jax_backend.apply import QuantModule
from jax_backend.calibrate import Shapes
from jax_backend.candidates import Searched, Variant
from jax_backend.convert import quantize
from jax_backend.discover import Found
from jax_backend.search_scores import Step
from jax_backend.tree import Path

WEIGHT = "weight_quantizer"


@dataclasses.dataclass(frozen=True)
class _Layer:
  """Where a layer is: `SearchLayer` with what JAX needs of it."""

  seen: SearchLayer
  path: Path
  param: str
  layout: layouts.Layout
  stack: tuple[int, ...]
  sizes: tuple[int, ...]


class JaxSearchHost:
  """A linen module and its variables during a search; neither is changed.

  Args:
    module, variables: the float model.
    batches: of calibration, gone through anew each time; the first one finds the layers. None: there are no data, only weights.
    step: the user's functions.
    group_rules: of `quantize`.

  Raises:
    ValueError: there is no batch, or forward_step does not call the model.
  """

  backend = "jax"

  def __init__(
    self, module: nn.Module, variables: Mapping[str, Any], batches: Callable[[], Iterator[Any]] | None, step: Step, group_rules: Any = None
  ) -> None:
    self.module = module
    self.variables = {name: value for name, value in variables.items() if name != "quant"}
    self._batches = batches
    self._step = step
    self._group_rules = group_rules
    self._layers = self._find()
    self._variants: dict[str, dict[str, Variant]] = {name: {} for name in self._layers}
    self.result: tuple[QuantModule, dict[str, Any]] | None = None

  def _loop(self, model: Any) -> None:
    for batch in () if self._batches is None else self._batches():
      self._step.forward(model, batch)

  def _quantized(self, config: Mapping[str, Any], report: list[dict[str, Any]]) -> tuple[QuantModule, dict[str, Any]]:
    loop = None if self._batches is None else self._loop
    return quantize(self.module, self.variables, config, loop, group_rules=self._group_rules, report=report)

  def _find(self) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for one in self._traced():
      names = one.kind.weight_names()
      param = next((param for param in one.weights if names[param] == WEIGHT), None)
      if param is None:
        continue
      layer = self._layer(one, param, tuple(names[p] for p in one.weights))
      before = layers.setdefault(layer.seen.name, layer)
      if before is not layer:
        raise ValueError(
          f"modules {'/'.join(before.path)!r} and {'/'.join(layer.path)!r} are both called {layer.seen.name!r} in torch's spelling, so "
          "they cannot be given formats of their own; rename one of them"
        )
    return layers

  def _traced(self) -> list[Found]:
    """The modules, as one abstract call of the model finds them."""
    if self._batches is None:
      args = discover.guess_inputs(self.module, self.variables)
      return discover.trace(self.module, self.variables, args, {}, rngs=None, method=None, mutable=False)
    found: dict[Path, Found] = {}

    def note(modules: list[Found]) -> dict[str, Any]:
      for one in modules:
        found.setdefault(one.path, one)
      return {}

    runner = Shapes(QuantModule(self.module), self.variables, note, collect=False)
    for batch in self._batches():
      self._step.forward(runner, batch)
      if not runner.calls:
        raise ValueError("forward_step(model, batch) did not call the model that it was given; call model(...) in it")
      return list(found.values())
    raise ValueError("data_loader gave no batch, so the model's layers cannot be found; pass data, or use method 'sqnr' without a loader")

  def _layer(self, found: Found, param: str, weights: tuple[str, ...]) -> _Layer:
    parameter = meta.unbox(tree.lookup(self.variables["params"], (*found.path, param)))
    layout = found.weights[param]
    own = [n for i, n in enumerate(parameter.shape) if i not in found.stack]
    shape = tuple(math.prod(own[axis] for axis in axes) for axes in layout.of(len(own)))
    takes = found.input is not None and "nn.Embedding" not in found.parent_classes  # a table's input is indices
    inputs, outputs = ("input_quantizer",) * takes, ("output_quantizer",) * (found.output is not None)
    seen = SearchLayer(
      name=canonical_name("/".join(found.path)),
      shape=shape,
      quantizers=(*inputs, *weights, *outputs),
      classes=found.parent_classes,
      copies=math.prod(found.sizes),
    )
    return _Layer(seen, found.path, param, layout, found.stack, found.sizes)

  def layers(self) -> list[SearchLayer]:
    return [layer.seen for layer in self._layers.values()]

  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for path, value in sorted(tree.leaves(self.variables["params"])):
      array = np.asarray(value)
      digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

  def prepare(self, name: str, config: Mapping[str, Any], report: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConfigWarning)  # `finish` says them again
      _, held = self._quantized(config, report)
    quantizers: dict[Path, dict[str, Any]] = {}
    for path, role, quantizer in tree.items(held["quant"]):
      quantizers.setdefault(path, {})[role] = quantizer
    for layer, where in self._layers.items():
      own = {role: q for role, q in quantizers.get(where.path, {}).items() if q.acts or q.leaves[0].low_rank_a is not None}
      if own:
        before, after = (tree.lookup(v["params"], where.path) for v in (self.variables, held))
        self._variants[layer][name] = Variant.of(before, after, own)

  def _searched(self, choices: Choices) -> list[Searched]:
    """The layers that are scored, with the candidates in the order of their choices."""
    found = []
    for layer, names in choices.items():
      where = self._layers[layer]
      variants = tuple(self._variants[layer].get(name, Variant.none()) for name in names)
      found.append(Searched(where.path, where.stack, where.sizes, variants))
    return found

  def gradient_scores(self, number: int, batch: Any, choices: Choices, by_position: bool = False) -> Scores:
    searched = self._searched(choices)
    return search_scores.gradients(self.module, self.variables, self._step, number, batch, choices, searched, by_position)

  def kl_scores(self, number: int, batch: Any, choices: Choices, groups: Mapping[str, Sequence[str]]) -> Scores:
    return search_scores.divergences(self.module, self.variables, self._step, number, batch, choices, self._searched(choices), groups)

  def hessian_traces(self, number: int, batch: Any, layers: Sequence[str], probes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    wheres = [self._layers[name] for name in layers]
    places = tuple((*where.path, where.param) for where in wheres)
    stored = ([self._stored(where, probe[name]()) for name, where in zip(layers, wheres, strict=True)] for probe in probes)
    return search_scores.traces(self.module, self.variables, self._step, number, batch, layers, places, stored)

  def _stored(self, where: _Layer, vector: np.ndarray) -> Any:
    """A vector [copies, *shape] or [*shape] in torch's layout as the layer's parameter is stored."""
    held = meta.unbox(tree.lookup(self.variables["params"], (*where.path, where.param)))
    return candidates.stored(vector, where.layout, where.stack, where.sizes, held)

  def weight_errors(self, choices: Choices) -> dict[str, dict[str, tuple[float, float]]]:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for layer, names in choices.items():
      where = self._layers[layer]
      held = tree.lookup(self.variables["params"], where.path)
      weight = candidates.in_torch(held[where.param], where.layout, where.stack)
      found[layer] = {}
      for name in names:
        variant = self._variants[layer].get(name, Variant.none())
        acting = candidates.acting_weight(variant, held, where.param, where.layout, where.stack)
        found[layer][name] = float(np.sum(weight**2)), float(np.sum((acting - weight) ** 2))
    return found

  def finish(self, config: Mapping[str, Any], report: list[dict[str, Any]]) -> None:
    self.result = self._quantized(config, report)
