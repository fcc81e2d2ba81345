"""Calibration algorithms by name, and how to add one that runs in every backend.

>>> @register_algorithm("shrink", statistics=("hessian",))
... def shrink(layer: Layer, *, factor: float = 0.9) -> Change:
...   return Change(amax=layer.amax * factor, report={"factor": factor})
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.calibrate import statistics as known
from core.calibrate.host import PREPARED, QUANTIZED
from core.config.algorithms import register_algorithm_name, unregister_algorithm_name

Wanted = Sequence[str] | Callable[[Mapping[str, Any]], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One algorithm.

  Attributes:
    name: method in a configuration.
    function: `fn(layer, **options) -> Change | None`; `fn(layers, **options) -> list[Change | None]` where grouped; `fn(host, run,
      **options)` where whole.
    statistics: names of the input statistics it reads, or a function of its options that returns them; () needs no data.
    grouped: it is given all layers that read one input at once.
    point: where inputs are observed, PREPARED or QUANTIZED, or a function of the options.
    whole: it drives the host itself, for what needs several layers at a time.
    options: names of its options.
    weights_only: layers whose weight is not quantized are left out.
    calibrated_inputs: static input quantizers have their amax before it runs.
    includes: a whole one keeps to the run's `include` itself; the others are given only the layers it names.
    teacher: it needs what the float model returned, recorded before anything changes.
  """

  name: str
  function: Callable[..., Any]
  statistics: Wanted = ()
  grouped: bool = False
  point: str | Callable[[Mapping[str, Any]], str] = PREPARED
  whole: bool = False
  options: tuple[str, ...] = ()
  weights_only: bool = True
  teacher: bool = False
  calibrated_inputs: bool = True
  includes: bool = False

  def wanted(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Statistics under these options."""
    return tuple(self.statistics(options) if callable(self.statistics) else self.statistics)

  def observed_at(self, options: Mapping[str, Any]) -> str:
    """Where inputs are observed under these options."""
    return self.point(options) if callable(self.point) else self.point


ALGORITHMS: dict[str, Algorithm] = {}


def register_algorithm(
  name: str,
  statistics: Wanted = (),
  *,
  grouped: bool = False,
  point: str | Callable[[Mapping[str, Any]], str] = PREPARED,
  whole: bool = False,
  weights_only: bool = True,
  teacher: bool = False,
  calibrated_inputs: bool = True,
  includes: bool = False,
  also: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Decorator that makes `algorithm: name` run a function of numpy arrays, in PyTorch and in JAX.

  The function is called once per layer with a `Layer` (weight, formats, amax, and the statistics asked for) and returns a `Change`, or None
  to leave the layer as it is. Its keyword-only arguments are the options that a configuration may give. Layers that saw no token, or whose
  inputs are no feature vectors (convolutions, when statistics are asked for), keep their max calibration and are reported.

  Args:
    name: the method's name in a configuration; registering it again replaces it.
    statistics: input statistics it needs (`core.calibrate.statistics.NAMES`), or a function of the options that returns them.
    grouped: call it once per group of layers that read the same input, with a list of them; it returns a list of changes.
    point: observe inputs as the input quantizer gets them ("prepared") or returns them ("quantized"); or a function of the options.
    whole: call it once, with (host, run), to drive the model itself.
    weights_only: only layers with a quantized weight.
    teacher: record what the float model returns before the first algorithm of the list runs (`host.student()`).
    calibrated_inputs: calibrate static input quantizers before it runs; False where it sets their amax itself saves a run of the model.
    includes: with `whole`: it asks `run.includes(name)`, so that a configuration may limit it to some layers.
    also: further option names that are accepted and have no effect here (options of ModelOpt about its own machinery).

  Raises:
    ValueError: unknown statistics or point.
  """
  unknown = [] if callable(statistics) else [s for s in statistics if s not in known.NAMES]
  if unknown:
    raise ValueError(f"algorithm {name!r} asks for unknown statistics {unknown}; allowed are {', '.join(known.NAMES)}")
  if not callable(point) and point not in (PREPARED, QUANTIZED):
    raise ValueError(f"algorithm {name!r} observes inputs at {point!r}; allowed are {PREPARED!r} and {QUANTIZED!r}")

  def register(function: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    wanted = statistics if callable(statistics) else tuple(statistics)
    ALGORITHMS[name] = Algorithm(name, function, wanted, grouped, point, whole, options, weights_only, teacher, calibrated_inputs, includes)
    register_algorithm_name(name, None if open_ended else (*options, *also))
    return function

  return register


def unregister_algorithm(name: str) -> None:
  """Forget an algorithm of your own.

  Raises:
    KeyError: there is none of that name.
  """
  del ALGORITHMS[name]
  unregister_algorithm_name(name)
