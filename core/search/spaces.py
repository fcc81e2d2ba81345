"""Which formats a layer may have: the formats by name, the rules that each one means for a layer, spaces by pattern, layers left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.calibrate import algorithms
from core.calibrate.registry import ALGORITHMS
from core.config import PRESETS, QuantConfig, Resolved, matches_name, normalize, preset, resolve
from core.config.frozen import hint, thaw
from core.search.host import SearchLayer

NONE = "none"
"""Name of the choice to leave a layer unquantized."""
WEIGHT = "weight_quantizer"
OUTPUT = "output_quantizer"

Formats = dict[str, "Format"]
Spaces = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Format:
  """One candidate: a configuration with its algorithm, or, without one, the choice to leave a layer unquantized."""

  name: str
  config: QuantConfig | None

  def resolve(self, layer: SearchLayer) -> dict[str, Resolved]:
    """Quantizers of a layer that are on in this format: name below the layer -> state."""
    if self.config is None:
      return {}
    states = {q: resolve(self.config.entries, _join(layer.name, q), layer.classes) for q in layer.quantizers}
    return {quantizer: state for quantizer, state in states.items() if state.enable}

  def quantizes(self, layer: SearchLayer) -> bool:
    """Whether it does anything to a layer's weight or input."""
    return any(quantizer != OUTPUT for quantizer in self.resolve(layer))


def _join(layer: str, quantizer: str) -> str:
  return f"{layer}.{quantizer}" if layer else quantizer


def read_formats(formats: Any) -> Formats:
  """Candidates by name, in the order given.

  Args:
    formats: a list of preset names, configurations and None (unquantized), or a mapping from names of your own to these. A configuration
      that equals a preset is called by its name, others "format_0", "format_1", ...

  Raises:
    ValueError: none given, one of them twice, one that changes several layers together, or a wrong configuration.
    TypeError: no list or mapping.
  """
  if isinstance(formats, str) or not isinstance(formats, Mapping | list | tuple):
    raise TypeError(f"quantization_formats is {formats!r}; a list of preset names, configurations and None is needed")
  items = list(formats.items()) if isinstance(formats, Mapping) else [(None, value) for value in formats]
  found: Formats = {}
  for place, (name, value) in enumerate(items):
    one = read_format(value, name, place)
    if one.name in found:
      raise ValueError(f"quantization_formats names {one.name!r} twice; give each format once (there are {', '.join(found)})")
    found[one.name] = one
  if not any(one.config is not None for one in found.values()):
    raise ValueError(f"quantization_formats is {formats!r}, which holds no format to quantize to; name presets or give configurations")
  return found


def read_format(value: Any, name: str | None = None, place: int = 0) -> Format:
  """One candidate: a preset's name, a configuration, or None.

  Raises:
    ValueError: a wrong configuration, or an algorithm that changes several layers together; names the format.
  """
  if value is None:
    return Format(NONE, None)
  if isinstance(value, str):
    return _checked(name or value, normalize(preset(value)))
  if not isinstance(value, Mapping | QuantConfig):
    raise ValueError(f"quantization format {value!r} is not allowed; give a preset's name, a configuration, or None")
  config = normalize(value)
  return _checked(name or _preset_name(config) or f"format_{place}", config)


def _preset_name(config: QuantConfig) -> str | None:
  return next((name for name in PRESETS if "_KV_" not in name and normalize(PRESETS[name]) == config), None)


def _checked(name: str, config: QuantConfig) -> Format:
  if name == NONE:
    raise ValueError(f"a format cannot be called {NONE!r}, which stands for no quantization; choose another name")
  algorithms.load()
  for step in config.algorithm:
    known = ALGORITHMS.get(str(step.method))
    if known is not None and known.whole and not known.includes:
      raise ValueError(
        f"format {name!r} uses algorithm {step.method!r}, which changes several layers together and cannot be chosen layer by layer; "
        f"run it before the search, or after it with calibrate(), or give the format another algorithm"
      )
    if "include" in step.options:
      raise ValueError(f"format {name!r}: algorithm {step.method!r} has 'include', which the search sets itself; leave it out")
  return Format(name, config)


def space_of(layer: SearchLayer, formats: Formats, spaces: Spaces | None) -> tuple[str, ...]:
  """Names of the formats that a layer may have, in the order of `formats`: those of the last pattern that matches, or all."""
  chosen: Iterable[str] = formats
  for pattern, members in (spaces or {}).items():
    if matches_name(pattern, layer.name):
      chosen = [_member(member, pattern, formats) for member in members]
  return tuple(name for name in formats if name in set(chosen))


def read_spaces(formats: Formats, spaces: Any) -> tuple[Formats, dict[str, list[str]]]:
  """(formats, with those that only a space names added; pattern -> names).

  Raises:
    ValueError: an empty space, or an unknown format.
    TypeError: no mapping from patterns to lists.
  """
  if spaces is None:
    return formats, {}
  if not isinstance(spaces, Mapping) or not all(isinstance(members, list | tuple) for members in spaces.values()):
    raise TypeError(f"module_search_spaces is {spaces!r}; a mapping from patterns of layer names to lists of formats is needed")
  everything = dict(formats)
  named: dict[str, list[str]] = {}
  for pattern, members in spaces.items():
    if not members:
      raise ValueError(f"module_search_spaces[{pattern!r}] is empty; name at least one format, [None] to leave these layers unquantized")
    for place, member in enumerate(members):
      one = formats.get(member) if isinstance(member, str) else None
      one = one or (Format(NONE, None) if member in (None, NONE) else read_format(member, None, len(everything) + place))
      everything.setdefault(one.name, one)
      named.setdefault(pattern, []).append(one.name)
  return everything, named


def _member(member: str, pattern: str, formats: Formats) -> str:
  if member not in formats:
    raise ValueError(f"module_search_spaces[{pattern!r}] names {member!r}{hint(member, formats)}; there are {', '.join(formats)}")
  return member


def to_plain(formats: Formats) -> dict[str, Any]:
  """Name -> configuration as JSON values, or None."""
  return {name: None if one.config is None else thaw(one.config.to_dict()) for name, one in formats.items()}


def from_plain(formats: Mapping[str, Any]) -> Formats:
  """The inverse of `to_plain`."""
  return {name: Format(name, None) if value is None else _checked(name, normalize(value)) for name, value in formats.items()}
