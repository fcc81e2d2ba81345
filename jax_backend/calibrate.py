"""Calibration: statistics of weights and activations become amax. `max` is the largest magnitude seen."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from core import compression
from core.calibrate import algorithms, driver
from core.config import ConfigWarning
from core.config.algorithms import AlgorithmConfig, read_algorithm, register_algorithm_name
from core.config.frozen import thaw
from jax_backend import discover, groups, histograms, statistics, tree, weights
from jax_backend.apply import QuantModule
from jax_backend.discover import Found
from jax_backend.edit import is_quantized
from jax_backend.interceptors import INPUT, OUTPUT
from jax_backend.quantizer import CALIBRATE, PASS, QUANTIZE, AnyQuantizer
from jax_backend.tree import Path

ForwardLoop = Callable[[Any], Any]
Algorithm = Callable[..., dict[str, Any]]
Creator = Callable[[list[Found]], dict[str, Any]]

_ALGORITHMS: dict[str, Algorithm] = {}
_SHARED = ("broadcasted variable has a data dependency", "got axis spec None but output was batched")


class Runner:
  """What a forward loop calls as its model: one jitted step that runs the module and threads the quantizers' state.

  Attributes:
    quant: the quantizer tree as of the last call.
  """

  def __init__(self, qmodule: QuantModule, qvariables: Mapping[str, Any], create: Creator | None = None, collect: bool = True) -> None:
    self._qmodule = qmodule
    self._variables = {name: value for name, value in qvariables.items() if name != "quant"}
    self._create = create
    self._mode = CALIBRATE if collect else QUANTIZE
    self._seen: set[Any] = set()
    self._places: dict[tuple[Path, str], int] = {}
    self.calls = 0
    self.quant: dict[str, Any] = dict(qvariables.get("quant", {}))

  def __call__(self, *args: Any, rngs: Any = None, method: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
    """The module's own result; arguments as for `module.apply`. Arrays are traced, all other arguments are static."""
    dynamic, rest = discover.split_arrays(args, kwargs)
    shapes = tuple(None if a is None else (tuple(a.shape), str(a.dtype)) for a in dynamic)
    signature = (rest, shapes, method, _frozen(mutable))
    if signature not in self._seen:
      self._prepare(args, kwargs, rngs, method, mutable)
      self._seen.add(signature)
    self.calls += 1
    try:
      y, self.quant = _step(self._qmodule, rest, method, _frozen(mutable), self._variables, self.quant, dynamic, rngs)
    except ValueError as error:
      if self._mode == CALIBRATE and any(sign in str(error) for sign in _SHARED):
        raise ValueError(
          "a module that needs calibration data shares its parameters over a mapped axis (nn.RNN, or nn.scan or nn.vmap without a params "
          "axis), and linen lets no state out of such a body; use dynamic input quantizers for it ('type': 'dynamic'), give it a "
          "'constant_amax', or switch its input quantizers off"
        ) from error
      raise
    return y

  def apply(self, _: Any, *args: Any, **kwargs: Any) -> Any:
    """As `__call__`, for loops that are written with `model.apply(variables, batch)`; the variables given are not used."""
    return self(*args, **kwargs)

  def _prepare(self, args: Any, kwargs: Any, rngs: Any, method: Any, mutable: Any) -> None:
    found = discover.trace(self._qmodule.module, self._variables, args, kwargs, rngs=rngs, method=method, mutable=mutable)
    if self._create is not None:
      created = self._create(found)
      known = {(path, name): q for path, name, q in tree.items(self.quant)}
      fresh = {key: q.with_mode(self._mode) for key, q in _entries(created).items() if key not in known}
      self.quant = tree.build({**known, **fresh})
    for module in found:
      for name in (INPUT, *module.operands, OUTPUT):
        self._places.setdefault((module.path, name), len(self._places))
    if self._mode == CALIBRATE:
      self.quant = statistics.seed_all(self.quant, found)

  def finished(self) -> dict[str, Any]:
    """The quantizers with the amax of their statistics.

    Raises:
      ValueError: the model was never called, or the data held NaN or infinity; names the quantizer that met it first.
    """
    if not self.calls and not self.quant:
      raise ValueError("the forward loop never called the model, so nothing is known about its modules; call model(batch) in it")
    ordered = sorted(_entries(self.quant).items(), key=lambda item: self._places.get(item[0], len(self._places)))
    return tree.build({(path, name): statistics.finish(q, tree.full_name(path, name)) for (path, name), q in ordered})


def _entries(quant: Mapping[str, Any]) -> dict[tuple[tuple[str, ...], str], AnyQuantizer]:
  return {(path, name): q for path, name, q in tree.items(quant)}


def _frozen(mutable: Any) -> Any:
  return tuple(mutable) if isinstance(mutable, list | set) else mutable


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(qmodule: QuantModule, rest: Any, method: Any, mutable: Any, variables: Any, quant: Any, dynamic: Any, rngs: Any) -> Any:
  args, kwargs = discover.join_arrays(dynamic, rest)
  mutable = list(mutable) if isinstance(mutable, tuple) else mutable
  return qmodule.run({**variables, "quant": quant}, args, kwargs, rngs=rngs, method=method, mutable=mutable)


def register_algorithm(name: str, options: Iterable[str] | None = None) -> Callable[[Algorithm], Algorithm]:
  """Decorator that makes `algorithm: name` run a function of your own.

  Args:
    name: the method's name in a configuration.
    options: names of the options it takes; None for any.

  Returns:
    A decorator for `fn(qmodule, qvariables, forward_loop, create=None, **options) -> qvariables`. `create` (None when the quantizers are
    known) must be handed to the `Runner` of its forward loop: it makes the quantizers at the first call.
  """

  def register(fn: Algorithm) -> Algorithm:
    register_algorithm_name(name, options)
    _ALGORITHMS[name] = fn
    return fn

  return register


def calibrate(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  algorithm: Any = "max",
  forward_loop: ForwardLoop | None = None,
  report: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
  """Calibrate a quantized model again.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables; they are not changed.
    algorithm: name, {"method": name, ...}, a list of these, or None (nothing happens).
    forward_loop: called with a runner; runs it on calibration data, as `model(batch)`.
    report: a list that gets one dict per layer and algorithm: what was chosen, error before and after (`print_calibration_report`).

  Returns:
    New variables.

  Raises:
    ValueError: the variables have no quantizers, an unknown algorithm, or non-finite calibration data.
    TypeError: forward_loop is no function.
  """
  if not is_quantized(qvariables):
    raise ValueError("these variables have no quantizers; call quantize(module, variables, config, forward_loop) first")
  return run(qmodule, qvariables, read_algorithm(algorithm), forward_loop, report)


def run(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  algorithm: tuple[AlgorithmConfig, ...],
  forward_loop: ForwardLoop | None,
  report: list[dict[str, Any]] | None = None,
  create: Creator | None = None,
) -> dict[str, Any]:
  """Run calibration steps in order; `create` makes missing quantizers."""
  if forward_loop is not None and not callable(forward_loop):
    raise TypeError(f"forward_loop must be a function of the model, got {type(forward_loop).__name__}")
  compression.refuse_compressed(tree.compressed_layers(qvariables.get("quant", {})), "calibration")
  result = dict(qvariables)
  if create is not None and forward_loop is not None and not (algorithm and algorithm[0].method in _ALGORITHMS):
    result = {**result, "quant": _discovered(qmodule, result, forward_loop, create)}
    create = None
  teacher = _teacher(qmodule, result, algorithm, forward_loop)
  for step in algorithm:
    options = thaw(step.options)
    if step.method in _ALGORITHMS:
      result = _ALGORITHMS[step.method](qmodule, result, forward_loop, create=create, **options)
    else:
      from jax_backend.host import JaxHost  # it calls back into this file

      host = JaxHost(qmodule, result, forward_loop, bool(options.get("exclude_padding", False)), teacher)
      driver.run(host, algorithms.find(str(step.method), "jax_backend"), options, report)
      result = host.variables
    create = None
  _warn_uncalibrated(result, forward_loop)
  return result


def _teacher(qmodule: QuantModule, qvariables: Mapping[str, Any], algorithm: Any, forward_loop: ForwardLoop | None) -> Any:
  """What the float model returns, where one of the algorithms tunes the whole model towards it; else None."""
  wants = [step for step in algorithm if step.method not in _ALGORITHMS and algorithms.find(str(step.method), "jax_backend").teacher]
  if not wants or forward_loop is None:
    return None
  from jax_backend.distill import Teacher

  return Teacher.record(qmodule, qvariables, forward_loop, bool(wants[0].options.get("exclude_padding", False)))


class Shapes(Runner):
  """A runner that finds the modules and computes nothing: it returns zeros of the right shapes."""

  def __call__(self, *args: Any, rngs: Any = None, method: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
    self._prepare(args, kwargs, rngs, method, mutable)
    self.calls += 1
    dynamic, rest = discover.split_arrays(args, kwargs)

    def call(variables: Any, dynamic: Any, rngs: Any) -> Any:
      inner_args, inner_kwargs = discover.join_arrays(dynamic, rest)
      return self._qmodule.module.apply(variables, *inner_args, rngs=rngs, method=method, mutable=mutable, **inner_kwargs)

    shapes = jax.eval_shape(call, self._variables, dynamic, rngs)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _discovered(qmodule: QuantModule, qvariables: Mapping[str, Any], forward_loop: ForwardLoop, create: Creator) -> dict[str, Any]:
  runner = Shapes(qmodule, qvariables, create, collect=False)
  forward_loop(runner)
  return runner.finished()


@register_algorithm("max")
def max_calibrate(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  forward_loop: ForwardLoop | None = None,
  create: Creator | None = None,
  exclude_padding: bool = False,
  **_: Any,
) -> dict[str, Any]:
  """amax of every weight, and of every activation over the forward loop; siblings then share their tensor-level scales.

  While the loop runs nothing is quantized, so that no layer's statistics depend on another's format. With `exclude_padding` the loop runs
  a second time, for the tokens that the call's attention_mask does not mark as padding.
  """
  quant = dict(qvariables.get("quant", {}))
  compression.refuse_compressed(tree.compressed_layers(quant), "calibration")
  if forward_loop is not None and (create is not None or any(_needs_data(q) for _, _, q in tree.items(quant) if q.param is None)):
    start = {key: q.with_mode(CALIBRATE) for key, q in _entries(quant).items()}
    runner = Runner(qmodule, {**qvariables, "quant": tree.build(start)}, create)
    forward_loop(runner)
    quant = histograms.calibrated(qmodule, {**qvariables, "quant": runner.finished()}, forward_loop)
  result = {**qvariables, "quant": groups.merge(_with_weights(qvariables, quant, lambda q: True))}
  if not exclude_padding or forward_loop is None:
    return result
  from core.calibrate.padding import max_without_padding
  from jax_backend.host import JaxHost  # it calls back into this file

  host = JaxHost(qmodule, result, forward_loop, exclude_padding=True)
  max_without_padding(host)
  return host.variables


def _with_weights(qvariables: Mapping[str, Any], quant: Mapping[str, Any], which: Callable[[AnyQuantizer], bool]) -> dict[str, Any]:
  """The tree with the chosen weight quantizers calibrated."""
  done = _entries(quant)
  for path, name, quantizer, weight in weights.each({**qvariables, "quant": quant}):
    if quantizer.is_enabled and which(quantizer):
      done[path, name] = weights.calibrate(quantizer, weight, tree.full_name(path, name))
  return tree.build(done)


def missing_calibrated(qmodule: QuantModule, qvariables: Mapping[str, Any], forward_loop: ForwardLoop | None) -> dict[str, Any]:
  """The quantizer tree after max calibration of those static quantizers that have no amax yet."""
  quant = _with_weights(qvariables, qvariables["quant"], _lacks)
  if any(_lacks(q) for _, _, q in tree.items(quant) if q.param is None) and forward_loop is not None:
    quant = collect_activations(qmodule, {**qvariables, "quant": quant}, forward_loop, lambda path, name, q: _lacks(q))
  return groups.merge(quant)


def collect_activations(
  qmodule: QuantModule, qvariables: Mapping[str, Any], forward_loop: ForwardLoop, which: Callable[[Path, str, AnyQuantizer], bool]
) -> dict[str, Any]:
  """The quantizer tree with the amax of the chosen activation quantizers over the forward loop; nothing is quantized meanwhile."""
  before = _entries(qvariables["quant"])
  chosen = {key for key, q in before.items() if q.param is None and _needs_data(q) and which(*key, q)}
  if not chosen:
    return dict(qvariables["quant"])
  start = {key: q.with_mode(CALIBRATE if key in chosen else PASS) for key, q in before.items()}
  runner = Runner(qmodule, {**qvariables, "quant": tree.build(start)})
  forward_loop(runner)
  after = _entries(runner.finished())
  quant = tree.build({key: after[key] if key in chosen else q for key, q in before.items()})
  return histograms.calibrated(qmodule, {**qvariables, "quant": quant}, forward_loop, chosen)


def _lacks(quantizer: AnyQuantizer) -> bool:
  return any(_waits(q) and q.amax is None for q in quantizer.leaves)


def _needs_data(quantizer: AnyQuantizer) -> bool:
  return any(_waits(q) for q in quantizer.leaves)


def _waits(quantizer: Any) -> bool:
  needs_bias = quantizer.config.bias is not None and not quantizer.config.bias.dynamic
  return quantizer.is_enabled and (quantizer.config.needs_calibration or needs_bias)


def _warn_uncalibrated(qvariables: Mapping[str, Any], forward_loop: ForwardLoop | None) -> None:
  names = [
    tree.full_name(path, name)
    for path, name, q in tree.items(qvariables.get("quant", {}))
    if q.param is None and any(_waits(one) and one.amax is None for one in q.leaves)
  ]
  if names:
    reason = "no forward_loop ran" if forward_loop is None else "the calibration data never reached them, or no algorithm calibrated them"
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    warnings.warn(
      f"{len(names)} static activation quantizers have no amax ({reason}) and take it from each input, as dynamic ones do: {shown}",
      ConfigWarning,
      stacklevel=4,
    )
