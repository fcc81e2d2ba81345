"""Work on configurations that are still dicts: merging, extending, finding, and the question whether data is needed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from core.config.entries import Entry, QuantConfig, normalize, normalize_entries
from core.config.presets import preset


def normalize_quant_cfg_list(quant_cfg: Any) -> list[dict[str, Any]]:
  """`quant_cfg` in any form as the ordered list of entries ("quantizer_name", "parent_class", "cfg", "enable"), of JSON values."""
  return [entry.to_dict() for entry in normalize_entries(quant_cfg)]


def find_quant_cfg_entry_by_path(quant_cfg: Any, quantizer_name: str) -> dict[str, Any]:
  """The last entry whose pattern is exactly this string: no glob is expanded.

  Args:
    quant_cfg: list or dict form.
    quantizer_name: the pattern as written.

  Returns:
    The entry itself where the list form is given, else a new entry in list form.

  Raises:
    KeyError: no such entry.
  """
  if isinstance(quant_cfg, list | tuple) and all(isinstance(item, Mapping) and "quantizer_name" in item for item in quant_cfg):
    entries: list[Any] = list(quant_cfg)
  else:
    entries = normalize_quant_cfg_list(quant_cfg)
  wanted = "*" if quantizer_name == "default" else quantizer_name
  for entry in reversed(entries):
    if entry["quantizer_name"] == wanted:
      return entry
  known = ", ".join(dict.fromkeys(repr(entry["quantizer_name"]) for entry in entries))
  raise KeyError(f"no quant_cfg entry has the pattern {quantizer_name!r}; there are {known or 'none'}")


def update_quant_cfg_with_kv_cache_quant(config: Mapping[str, Any], kv_cache_quant_cfg: Any) -> dict[str, Any]:
  """A configuration with the rules of a key/value-cache fragment after its own.

  Args:
    config: whole configuration, unchanged by this.
    kv_cache_quant_cfg: a fragment such as FP8_KV_CFG, or its "quant_cfg".

  Returns:
    A new configuration: dict form if both were, else list form. Without an algorithm it gets "max".
  """
  fragment = kv_cache_quant_cfg
  if isinstance(fragment, Mapping) and "quant_cfg" in fragment:
    fragment = fragment["quant_cfg"]
  merged: dict[str, Any] = {key: copy.deepcopy(value) for key, value in config.items()}
  merged["quant_cfg"] = append_rules(merged.get("quant_cfg") or {"default": {"enable": False}}, fragment)
  merged["algorithm"] = merged.get("algorithm") or "max"
  normalize(merged)
  return merged


def append_rules(quant_cfg: Any, later: Any) -> Any:
  """Rules of `quant_cfg`, then those of `later`, as a new value: a dict if both are, else a list."""
  if isinstance(quant_cfg, Mapping) and isinstance(later, Mapping):
    # A pattern that is written again moves behind the others, since the last match wins.
    merged = {key: copy.deepcopy(value) for key, value in quant_cfg.items() if key not in later or key == "default"}
    return merged | copy.deepcopy(dict(later))
  return _as_list(quant_cfg) + _as_list(later)


def _as_list(quant_cfg: Any) -> list[Any]:
  if isinstance(quant_cfg, Mapping):
    return normalize_quant_cfg_list(quant_cfg)
  return [copy.deepcopy(item) for item in quant_cfg or ()]


def extend_preset(config: Mapping[str, Any]) -> dict[str, Any]:
  """Resolves `preset:`, a name or a list of names, with the rules of `quant_cfg` after theirs; other keys replace the preset's.

  Raises:
    ValueError: unknown preset.
  """
  names = [config["preset"]] if isinstance(config["preset"], str) else config["preset"]
  if not isinstance(names, list | tuple) or not names:
    raise ValueError(f"config: preset is {config['preset']!r}; a preset's name or a list of names is needed")
  merged: dict[str, Any] = {"quant_cfg": {}, "algorithm": None}
  for name in names:
    base = preset(name)
    rules = append_rules(merged["quant_cfg"], base.pop("quant_cfg"))
    merged |= base if merged["algorithm"] is None else {}
    merged["quant_cfg"] = rules
  merged["quant_cfg"] = append_rules(merged["quant_cfg"], config.get("quant_cfg") or {})
  return merged | {key: copy.deepcopy(value) for key, value in config.items() if key not in ("preset", "quant_cfg")}


def need_calibration(config: Mapping[str, Any] | QuantConfig) -> bool:
  """Whether calibrating takes data: an algorithm beyond "max", or an enabled activation quantizer that is not dynamic.

  Rules are taken as written; whether a model has such quantizers is not looked at. A configuration without algorithm needs none.
  """
  checked = normalize(config)
  if any(step.method != "max" for step in checked.algorithm):
    return True
  return any(_takes_data(entry) for entry in checked.entries)


def _takes_data(entry: Entry) -> bool:
  if not entry.enables or "weight_quantizer" in entry.quantizer_name:
    return False
  return any(config.needs_calibration for config in entry.cfg or ())
