"""`quant_cfg` to ordered rules.

Three ways of writing are read: the ordered list of entries, the dict from pattern to attributes, and the list of single-key dicts. All
become one ordered tuple of `Entry`; later entries win, `"default"` stands first wherever it is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from core.config.algorithms import AlgorithmConfig, read_algorithm
from core.config.frozen import check_bool, check_keys, hint
from core.config.matching import matches_class, matches_name
from core.config.schema import ATTRIBUTES, QuantizerConfig

ENTRY_KEYS = ("quantizer_name", "parent_class", "cfg", "enable")
CONFIG_KEYS = ("quant_cfg", "algorithm", "effective_bits", "preset")
_GLOB = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One rule.

  Attributes:
    quantizer_name: glob on the dotted name of a quantizer.
    parent_class: class of the module that holds the quantizer, or None for any.
    cfg: the whole new attribute set (more than one: a sequential quantizer), or None to keep the present one.
    enable: the switch, or None where the attributes alone are meant (then on).
  """

  quantizer_name: str
  parent_class: str | None = None
  cfg: tuple[QuantizerConfig, ...] | None = None
  enable: bool | None = None

  @property
  def enables(self) -> bool:
    """Whether a quantizer that answers to this rule alone is on."""
    return self.enable is not False

  @property
  def label(self) -> str:
    """The pattern as it would be written."""
    return self.quantizer_name if self.parent_class is None else f"{self.parent_class}: {self.quantizer_name}"

  def matches(self, name: str, parent_classes: Iterable[str] = ()) -> bool:
    if self.parent_class is not None and not matches_class(self.parent_class, parent_classes):
      return False
    return matches_name(self.quantizer_name, name)

  def to_dict(self) -> dict[str, Any]:
    """The entry in list form, of values that JSON can hold."""
    entry: dict[str, Any] = {"quantizer_name": self.quantizer_name}
    if self.parent_class is not None:
      entry["parent_class"] = self.parent_class
    if self.cfg is not None:
      sets = [config.to_attributes() for config in self.cfg]
      entry["cfg"] = sets[0] if len(sets) == 1 else sets
    if self.enable is not None:
      entry["enable"] = self.enable
    return entry


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """A whole configuration, validated. `effective_bits` is its declared cost for the mixed-precision search, or None."""

  entries: tuple[Entry, ...]
  algorithm: tuple[AlgorithmConfig, ...] = ()
  effective_bits: float | None = None

  def to_dict(self) -> dict[str, Any]:
    """The configuration in list form; `normalize` gives this very value back."""
    steps = [step.to_dict() for step in self.algorithm]
    config: dict[str, Any] = {"quant_cfg": [entry.to_dict() for entry in self.entries]}
    config["algorithm"] = None if not steps else steps[0] if len(steps) == 1 else steps
    return config if self.effective_bits is None else config | {"effective_bits": self.effective_bits}


def normalize(config: Mapping[str, Any] | QuantConfig) -> QuantConfig:
  """Validates a configuration in any accepted form.

  Raises:
    ValueError: names the entry, the key, the value and what is allowed.
    TypeError: not a mapping.
  """
  if isinstance(config, QuantConfig):
    return config
  if isinstance(config, str):
    from core.config.presets import preset

    return normalize(preset(config))
  if not isinstance(config, Mapping):
    raise TypeError(f"config is {config!r}; a mapping with 'quant_cfg' and 'algorithm' is needed, for example INT8_DEFAULT_CFG")
  check_keys("config", config, CONFIG_KEYS)
  if "quant_cfg" not in config and "preset" not in config:
    raise ValueError(f"config {dict(config)!r} has no 'quant_cfg'; give a list of entries or a dict from pattern to attributes")
  if "preset" in config:
    from core.config.edit import extend_preset

    return normalize(extend_preset(config))
  bits = config.get("effective_bits")
  if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits <= 16):
    raise ValueError(f"config: effective_bits is {bits!r}; allowed is a number above 0 and at most 16, or None")
  return QuantConfig(normalize_entries(config["quant_cfg"]), read_algorithm(config.get("algorithm")), None if bits is None else float(bits))


def normalize_entries(quant_cfg: Any) -> tuple[Entry, ...]:
  """The ordered rules that `quant_cfg` writes, whatever its form. Entries of "default" come first."""
  if quant_cfg is None:
    return ()
  if isinstance(quant_cfg, Mapping):
    pairs = [entry for key, value in quant_cfg.items() for entry in _from_pair(key, value)]
  elif isinstance(quant_cfg, list | tuple):
    pairs = [entry for item in quant_cfg for entry in _from_item(item)]
  else:
    raise ValueError(f"quant_cfg is {quant_cfg!r}; a list of entries or a dict from pattern to attributes is needed")
  return tuple(entry for default, entry in pairs if default) + tuple(entry for default, entry in pairs if not default)


def _from_item(item: Any) -> list[tuple[bool, Entry]]:
  """One item of the list form: an Entry, an entry dict, or a single-key dict."""
  if isinstance(item, Entry):
    return [(False, item)]
  if not isinstance(item, Mapping):
    raise ValueError(f"quant_cfg entry {item!r}: a mapping with 'quantizer_name' and 'cfg' or 'enable' is needed")
  if "quantizer_name" not in item:
    if len(item) == 1 and not set(item) <= {*ENTRY_KEYS, *ATTRIBUTES}:
      ((key, value),) = item.items()
      return _from_pair(key, value)
    raise ValueError(f"quant_cfg entry {dict(item)!r} has no 'quantizer_name'{hint(next(iter(item), ''), ENTRY_KEYS)}")
  check_keys(f"quant_cfg entry {item['quantizer_name']!r}", item, ENTRY_KEYS)
  name, parent = item["quantizer_name"], item.get("parent_class")
  if parent is not None and (not isinstance(parent, str) or not parent):
    raise ValueError(f"quant_cfg entry {name!r}: parent_class is {parent!r}; a class name such as 'nn.Linear' is needed")
  enable = None if item.get("enable") is None else check_bool(f"quant_cfg entry {name!r}: enable", item["enable"])
  return [_entry(name, parent, item.get("cfg"), enable)]


def _from_pair(key: Any, value: Any, parent: str | None = None) -> list[tuple[bool, Entry]]:
  """One pair of the dict form: pattern -> attributes, or class -> {pattern: attributes}."""
  if parent is None and _is_class(key, value):
    return [entry for pattern, item in value.items() for entry in _from_pair(pattern, item, key)]
  if not isinstance(value, Mapping | list | tuple):
    raise ValueError(f"quant_cfg[{key!r}] is {value!r}; a dict of attributes, {{'enable': False}}, or a list of such dicts is needed")
  return [_entry(key, parent, value, None)]


def _is_class(key: Any, value: Any) -> bool:
  """Whether a pair of the dict form means a class: no glob, and a dict of dicts that are no attributes."""
  if not isinstance(key, str) or _GLOB & set(key) or key.endswith("_quantizer") or not isinstance(value, Mapping) or not value:
    return False
  return all(inner not in ATTRIBUTES and isinstance(item, Mapping | list | tuple) for inner, item in value.items())


def _entry(name: Any, parent: str | None, cfg: Any, enable: bool | None) -> tuple[bool, Entry]:
  if not isinstance(name, str) or not name:
    raise ValueError(f"quantizer_name is {name!r}; a glob such as '*weight_quantizer' is needed")
  where = f"quant_cfg entry {name!r}"
  try:
    configs, inner = _read_sets(cfg)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{where}: {error}") from error
  if inner is not None and enable is not None and inner != enable:
    raise ValueError(f"{where}: enable {enable} contradicts enable {inner} inside its attributes; leave one of them out")
  enable = inner if enable is None else enable
  if configs is None and enable is None:
    raise ValueError(f"{where} says nothing (cfg {cfg!r}); give 'cfg' with attributes, or 'enable': True or False")
  return name == "default", Entry("*" if name == "default" else name, parent, configs, enable)


def _read_sets(cfg: Any) -> tuple[tuple[QuantizerConfig, ...] | None, bool | None]:
  """Attribute sets and the switch among them. Attributes that hold nothing but `enable` are a bare toggle."""
  sets = list(cfg) if isinstance(cfg, list | tuple) else [cfg]
  if isinstance(cfg, list | tuple) and not cfg:
    raise ValueError("cfg is an empty list; give at least one set of attributes")
  if len(sets) == 1 and not sets[0]:
    return None, None
  switches = {check_bool("enable", item["enable"]) if isinstance(item, Mapping) and "enable" in item else None for item in sets}
  if len(switches - {None}) > 1 or (False in switches and None in switches):
    raise ValueError(f"cfg {cfg!r} switches parts of one sequential quantizer on and off; leave the disabled part out")
  switch = next(iter(switches - {None}), None)
  if len(sets) == 1 and isinstance(sets[0], Mapping) and set(sets[0]) == {"enable"}:
    return None, switch
  return tuple(QuantizerConfig.from_attributes(item) for item in sets), switch
