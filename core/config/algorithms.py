"""Calibration algorithms by name: reading `algorithm`, the options each one takes, and which are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping
from typing import Any

from core.config.frozen import FrozenDict, check_choice, check_keys, thaw

_COMMON = ("moe_calib_experts_ratio", "layerwise", "debug", "distributed_sync")
_SEARCH = ("shared_states", "step_size", "start_multiplier", "stop_multiplier", "fp8_scale_sweep")
_CLIP = ("max_co_batch_size", "max_tokens_per_batch", "min_clip_ratio", "shrink_step")
_LEARNED = ("learnable_amax", "tied_amax", "quantize_pre_scale", "scale_algorithm")

# Method -> the options it takes besides the common ones; None for any.
ALGORITHMS: dict[str, tuple[str, ...] | None] = {
  "max": ("shared_states", "sync_expert_weight_amax", "skip_forward_without_activation_calib"),
  "mse": _SEARCH,
  "local_hessian": (*_SEARCH, "block_size"),
  "smoothquant": ("alpha",),
  "awq_lite": ("alpha_step",),
  "awq_clip": _CLIP,
  "awq_full": (*_CLIP, "alpha_step"),
  "svdquant": ("lowrank", "skip_layers"),
  "gptq": ("perc_damp", "block_size", "fused"),
  "lsq": _LEARNED,
  "dual_lsq": _LEARNED,
  "nvfp4_act_headroom": ("anchor_percentile", "upper_percentile", "rho", "weight_scale_algorithm"),
  "entropy": None,
  "percentile": None,
  "rotate": None,
}
IMPLEMENTED_ALGORITHMS = {"max"}
IMPLEMENTED_CALIBRATORS = {"max"}


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
  """One calibration step.

  Attributes:
    method: its name; None does nothing.
    options: its arguments, as written (`options["alpha_step"]`).
  """

  method: str | None
  options: FrozenDict = dataclasses.field(default_factory=FrozenDict)

  def to_dict(self) -> dict[str, Any]:
    return {"method": self.method, **thaw(self.options)}


def register_algorithm_name(name: str, options: Iterable[str] | None = None, implemented: bool = True) -> None:
  """Makes `algorithm: name` valid.

  Args:
    name: method name.
    options: the options it takes besides the common ones; None for any.
    implemented: whether backends can run it; otherwise they calibrate with max and say so.
  """
  ALGORITHMS[name] = None if options is None else tuple(options)
  if implemented:
    IMPLEMENTED_ALGORITHMS.add(name)


def read_algorithm(value: Any) -> tuple[AlgorithmConfig, ...]:
  """Reads None, a name, {"method": name, option: value}, or a list of those that run in order.

  Raises:
    ValueError: unknown method or option; names it, near misses and what is allowed.
  """
  if value is None:
    return ()
  if isinstance(value, AlgorithmConfig):
    return (value,)
  if isinstance(value, list | tuple):
    return tuple(step for item in value for step in read_algorithm(item))
  if isinstance(value, str):
    return (AlgorithmConfig(check_choice("algorithm", value, ALGORITHMS)),)
  if not isinstance(value, Mapping):
    raise ValueError(f"algorithm is {value!r}; allowed are None, a name, a mapping with 'method', and a list of these")
  if "method" not in value:
    raise ValueError(f"algorithm {dict(value)!r} names no method; add 'method', one of {', '.join(ALGORITHMS)}")
  if value["method"] is None:
    return ()
  method = check_choice("algorithm['method']", value["method"], ALGORITHMS)
  options = {key: item for key, item in value.items() if key != "method"}
  allowed = ALGORITHMS[method]
  if allowed is not None:
    check_keys(f"algorithm {method!r}", options, (*allowed, *_COMMON))
  return (AlgorithmConfig(method, FrozenDict(options)),)


def substitute_unimplemented(
  algorithms: Iterable[AlgorithmConfig], entries: Iterable[Any] = (), implemented: Container[str] | None = None
) -> tuple[tuple[AlgorithmConfig, ...], list[str]]:
  """Puts max in the place of what cannot run yet.

  Args:
    algorithms: the steps that were asked for.
    entries: the rules of the same configuration; attributes in them that have no effect yet are named too.
    implemented: names that the calling backend can run (one backend's user algorithms are not the other's); None is
      IMPLEMENTED_ALGORITHMS.

  Returns:
    (steps that can run, in order and without a repeated max; messages that name each replacement, to be given out as ConfigWarning).
  """
  steps: list[AlgorithmConfig] = []
  messages: list[str] = []
  maximum = AlgorithmConfig("max")
  runnable = IMPLEMENTED_ALGORITHMS if implemented is None else implemented
  for step in algorithms:
    if str(step.method) not in runnable:
      messages.append(f"calibration algorithm {step.method!r} is not implemented; calibrating with 'max' in its place")
      step = maximum
    if step != maximum or maximum not in steps:
      steps.append(step)
  names = {config.calibrator for entry in entries for config in entry.cfg or ()}
  for name in sorted(names - IMPLEMENTED_CALIBRATORS):
    messages.append(f"calibrator {name!r} is not implemented; taking amax with 'max' in its place")
  return tuple(steps), messages
