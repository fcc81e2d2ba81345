"""Calibration algorithms by name: reading `algorithm`, the options each one takes, and which are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from core.config.frozen import FrozenDict, check_choice, check_keys, thaw

# Options that every method takes. Those of ModelOpt's own machinery are accepted and have no effect.
COMMON = (
  "layerwise", "true_sequential", "checkpoint_dir", "exclude_padding", "include",
  "moe_calib_experts_ratio", "debug", "distributed_sync", "shared_states",
)  # fmt: skip

# Method -> the options it takes besides the common ones; None for any. Filled by `register_algorithm_name`; `core.calibrate.algorithms`
# brings the built-in ones.
ALGORITHMS: dict[str, tuple[str, ...] | None] = {
  "max": ("sync_expert_weight_amax", "skip_forward_without_activation_calib"),
}


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


def register_algorithm_name(name: str, options: Iterable[str] | None = None) -> None:
  """Makes `algorithm: name` valid.

  Args:
    name: method name.
    options: the options it takes besides the common ones; None for any.
  """
  ALGORITHMS[name] = None if options is None else tuple(options)


def unregister_algorithm_name(name: str) -> None:
  """Makes `algorithm: name` an error again."""
  ALGORITHMS.pop(name, None)


def read_algorithm(value: Any) -> tuple[AlgorithmConfig, ...]:
  """Reads None, a name, {"method": name, option: value}, or a list of those that run in order.

  Raises:
    ValueError: unknown method or option; names it, near misses and what is allowed.
  """
  from core.calibrate import algorithms

  algorithms.load()
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
    check_keys(f"algorithm {method!r}", options, (*allowed, *COMMON))
  if "include" in options:
    _check_include(method, options["include"])
  return (AlgorithmConfig(method, FrozenDict(options)),)


def _check_include(method: str, include: Any) -> None:
  if method == "max":
    raise ValueError(
      "algorithm 'max' has 'include', which it does not take: every layer that no other step calibrates gets max calibration; leave it out"
    )
  if isinstance(include, str) or not isinstance(include, list | tuple) or not all(isinstance(item, str) and item for item in include):
    raise ValueError(f"algorithm {method!r}: include is {include!r}; a list of patterns of layer names is needed, such as ['*.q_proj']")
