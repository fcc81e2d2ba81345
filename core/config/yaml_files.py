"""Configurations as YAML and JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import files
from core.config.edit import extend_preset
from core.config.entries import QuantConfig, normalize
from core.config.frozen import as_int, thaw

JSON_SUFFIXES = (".json",)
YAML_SUFFIXES = (".yaml", ".yml")


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads and validates a configuration file.

  YAML is read with the safe loader only; "-1" as key of an axis becomes the integer. `preset: INT8_DEFAULT_CFG` (or a list of names)
  stands for that preset, the file's `quant_cfg` is appended to its rules, the file's `algorithm` replaces its own.

  Args:
    path: a `.yaml`, `.yml` or `.json` file.

  Returns:
    The configuration as a plain dict, in the form it was written in.

  Raises:
    ValueError: unknown suffix, unreadable text, or a configuration that is not valid; the message begins with the path.
    OSError: the file cannot be read.
  """
  file = Path(path)
  text = file.read_text(encoding="utf-8")
  try:
    config = _parse(text, _suffix(file))
    if not isinstance(config, Mapping):
      raise ValueError(f"holds {type(config).__name__}, not a mapping with 'quant_cfg' and 'algorithm'")
    config = _integer_axes(extend_preset(config) if "preset" in config else config)
    normalize(config)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{file}: {error}") from error
  return config


def save_config(config: Mapping[str, Any] | QuantConfig, path: str | os.PathLike[str]) -> Path:
  """Validates a configuration and writes it, in one step: a reader sees the old file or the new one, never half of it.

  Args:
    config: any accepted form; a QuantConfig is written in list form, a dict as it is.
    path: a `.yaml`, `.yml` or `.json` file.

  Returns:
    The path.

  Raises:
    ValueError: unknown suffix, or a configuration that is not valid.
  """
  file = Path(path)
  suffix = _suffix(file)
  normalize(config)
  plain = thaw(config.to_dict() if isinstance(config, QuantConfig) else config)
  if suffix in JSON_SUFFIXES:
    text = json.dumps(_string_keys(plain), indent=2) + "\n"
  else:
    text = _yaml().safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
  return files.write(file, text)


def _suffix(file: Path) -> str:
  suffix = file.suffix.lower()
  if suffix not in (*YAML_SUFFIXES, *JSON_SUFFIXES):
    raise ValueError(f"file name {str(file)!r}: suffix {suffix!r} is unknown; allowed are {', '.join((*YAML_SUFFIXES, *JSON_SUFFIXES))}")
  return suffix


def _yaml() -> Any:
  # Only files need PyYAML; configurations written as dicts must not pay for its import.
  import yaml

  return yaml


def _parse(text: str, suffix: str) -> Any:
  if suffix in JSON_SUFFIXES:
    return json.loads(text)
  yaml = _yaml()
  try:
    return yaml.safe_load(text)
  except yaml.YAMLError as error:
    raise ValueError(f"is not valid YAML: {error}") from error


def _integer_axes(value: Any) -> Any:
  """Keys that spell integers become integers, at every depth."""
  if isinstance(value, Mapping):
    return {key if (axis := as_int(key)) is None else axis: _integer_axes(item) for key, item in value.items()}
  return [_integer_axes(item) for item in value] if isinstance(value, list | tuple) else value


def _string_keys(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _string_keys(item) for key, item in value.items()}
  return [_string_keys(item) for item in value] if isinstance(value, list) else value
