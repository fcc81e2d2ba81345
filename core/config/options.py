"""The attributes that are small records of their own: bias (affine quantization), rotate (Hadamard), calibrator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from core.config.frozen import FrozenDict, as_int, check_bool, check_choice, check_keys

BIAS_METHODS = ("mean", "max_min")
ROTATE_KEYS = ("enable", "mode", "rotate_fp32", "block_size", "seed")
ROTATE_MODES = ("rotate", "rotate_back")
CALIBRATORS: dict[str, tuple[str, ...]] = {
  "max": (),
  "histogram": ("num_bins", "skip_zeros", "grow_method", "method", "percentile"),
}
HISTOGRAM_METHODS = ("entropy", "percentile", "mse")


@dataclasses.dataclass(frozen=True)
class BiasSpec:
  """Affine quantization: y = Q(x - b) + b, b taken over `axes`.

  Attributes:
    axes: axes that are REDUCED to get b (negative, or of the torch layout).
    dynamic: b from each input; otherwise from calibration.
    method: "mean", or "max_min" for (max + min) / 2.
  """

  axes: tuple[int, ...]
  dynamic: bool = False
  method: str = "mean"

  @classmethod
  def from_attribute(cls, value: Any) -> BiasSpec | None:
    """Reads {axis: None, ..., "type": "static" | "dynamic", "method": "mean" | "max_min"}; None stays None."""
    if value is None:
      return None
    if not isinstance(value, Mapping):
      raise ValueError(f"bias is {value!r}; a mapping such as {{-2: None, 'type': 'static'}} is needed")
    axes = {axis: item for key, item in value.items() if (axis := as_int(key)) is not None}
    check_keys("bias", {key: item for key, item in value.items() if as_int(key) is None}, ("type", "method"))
    if not axes:
      raise ValueError(f"bias {dict(value)!r} names no axis; give the axes that are reduced as keys, such as {{-2: None}}")
    for axis, item in axes.items():
      if item is not None:
        raise ValueError(f"bias[{axis}] is {item!r}; allowed is None (the whole axis is reduced)")
    kind = check_choice("bias['type']", value.get("type", "static"), ("static", "dynamic"))
    return cls(tuple(axes), kind == "dynamic", check_choice("bias['method']", value.get("method", "mean"), BIAS_METHODS))

  def to_attribute(self) -> dict[str, Any]:
    axes: dict[str, Any] = {str(axis): None for axis in self.axes}
    return axes | {"type": "dynamic" if self.dynamic else "static", "method": self.method}


@dataclasses.dataclass(frozen=True)
class RotateSpec:
  """Normalised Hadamard rotation of the last axis before quantization.

  Attributes:
    mode: "rotate", or "rotate_back" to undo it after quantization.
    rotate_fp32: rotate in float32 whatever the input type.
    block_size: rotate blocks of this many elements; None is the largest power of two that divides the axis.
    seed: random signs before the rotation (a randomised Hadamard transform); None for none.

  References: Ashkboos et al., 2024, arXiv:2404.00456 (QuaRot).
  """

  mode: str = "rotate"
  rotate_fp32: bool = False
  block_size: int | None = None
  seed: int | None = None

  @classmethod
  def from_attribute(cls, value: Any) -> RotateSpec | None:
    """Reads True, False or {"enable", "mode", "rotate_fp32", "block_size", "seed"}; off is None."""
    if value is None or isinstance(value, bool):
      return cls() if value else None
    if not isinstance(value, Mapping):
      raise ValueError(f"rotate is {value!r}; allowed are True, False, and a mapping of {', '.join(ROTATE_KEYS)}")
    check_keys("rotate", value, ROTATE_KEYS)
    if "enable" not in value:
      raise ValueError(f"rotate {dict(value)!r} does not say whether it is on; add 'enable': True or 'enable': False")
    size, seed = (None if value.get(key) is None else as_int(value[key]) for key in ("block_size", "seed"))
    if value.get("block_size") is not None and (size is None or size < 1 or size & (size - 1)):
      raise ValueError(f"rotate['block_size'] is {value['block_size']!r}; allowed are powers of two, or None")
    if value.get("seed") is not None and (seed is None or not 0 <= seed < 2**31):
      raise ValueError(f"rotate['seed'] is {value['seed']!r}; allowed are integers from 0 to 2^31 - 1, or None")
    spec = cls(
      check_choice("rotate['mode']", value.get("mode", "rotate"), ROTATE_MODES),
      check_bool("rotate['rotate_fp32']", value.get("rotate_fp32", False)),
      size,
      seed,
    )
    return spec if check_bool("rotate['enable']", value["enable"]) else None

  def to_attribute(self) -> dict[str, Any] | bool:
    return True if self == RotateSpec() else {"enable": True, **dataclasses.asdict(self)}


def register_calibrator(name: str, options: tuple[str, ...] = ()) -> None:
  """Makes `calibrator: name` valid, with the options it takes."""
  CALIBRATORS[name] = tuple(options)


def read_calibrator(value: Any) -> tuple[str, FrozenDict]:
  """Reads "max", "histogram", or a pair of name and options such as ["histogram", {"num_bins": 2048}].

  Options of "histogram": `method` ("entropy", the default, "percentile" or "mse"), `percentile` (of that method), `num_bins`,
  `skip_zeros`; `grow_method` may say "doubling" or None, since bins grow no other way here.

  Raises:
    ValueError: an unknown name or option, or a value that is not allowed.
  """
  options: Any = {}
  if isinstance(value, list | tuple):
    if len(value) != 2 or not isinstance(value[1], Mapping):
      raise ValueError(f"calibrator is {value!r}; allowed are a name, or a pair [name, {{option: value}}]")
    value, options = value
  name = check_choice("calibrator", value, CALIBRATORS)
  if CALIBRATORS[name]:
    check_keys(f"calibrator {name!r}", options, CALIBRATORS[name])
  elif options:
    raise ValueError(f"calibrator {name!r} takes no options; got {dict(options)!r}")
  if name == "histogram":
    _check_histogram(options)
  return name, FrozenDict(options)


def _check_histogram(options: Mapping[str, Any]) -> None:
  where = "calibrator 'histogram': "
  method = check_choice(where + "method", options.get("method", HISTOGRAM_METHODS[0]), HISTOGRAM_METHODS)
  check_bool(where + "skip_zeros", options.get("skip_zeros", False))
  bins, grow = options.get("num_bins", 2), options.get("grow_method")
  if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
    raise ValueError(f"{where}num_bins is {bins!r}; allowed are whole numbers of at least 2, such as 2048")
  if grow not in (None, "doubling"):
    raise ValueError(f"{where}grow_method is {grow!r}; allowed are 'doubling' and None: bins double until they hold the largest value")
  if "percentile" not in options:
    return
  percentile = options["percentile"]
  if method != "percentile":
    raise ValueError(f"{where}percentile is {percentile!r}, which method {method!r} does not use; add 'method': 'percentile', or drop it")
  if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 0 < percentile <= 100:
    raise ValueError(f"{where}percentile is {percentile!r}; allowed is a number above 0 and at most 100, such as 99.99")
