"""The JSON of a saved model: one readable file that says what every tensor is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from core import matmul
from core.config.describe import spec_attributes
from core.config.entries import QuantConfig
from core.config.frozen import check_keys, thaw
from core.config.schema import QuantizerConfig, spec_from_attributes
from core.state.model import BACKENDS, FIELDS, MODES, PARTS, WEIGHT_TYPES, Leaf, Packed, State, tensor_name
from core.state.tensors import Tensor
from core.tensor_header import are_sizes

KEYS = ("format", "version", "backend", "versions", "config", "metadata", "files", "packed", "tied", "quantizers", "sha256")
LEAF_KEYS = ("attributes", "mode", "group", "tensors", "own_tensor_amax", "key")
FORMAT = "twinquant state"


def digest(document: Mapping[str, Any]) -> str:
  """SHA-256 of a document's content (not of its spelling), without its own entry."""
  content = {key: value for key, value in document.items() if key != "sha256"}
  return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plain(value: Any, what: str) -> Any:
  """Dicts with string keys, lists, strings, numbers, True, False and None.

  Raises:
    ValueError: anything else; says where.
  """
  value = thaw(value)
  if isinstance(value, Mapping):
    return {str(key): plain(item, f"{what}[{key!r}]") for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item, f"{what}[{i}]") for i, item in enumerate(value)]
  if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and value - value == 0):
    return value
  raise ValueError(f"{what} is {value!r} ({type(value).__name__}); JSON holds dicts, lists, strings, finite numbers, True, False and None")


def as_given(config: Any) -> Any:
  """A quantization config as it was given, in dicts and lists of its own: what the caller does to it later does not matter."""
  return config.to_dict() if isinstance(config, QuantConfig) else thaw(config)


def to_json(state: State, version: int, files: Mapping[str, Any]) -> dict[str, Any]:
  """The document of a state whose tensors are in these files."""
  document = {
    "format": FORMAT,
    "version": version,
    "backend": state.backend,
    "versions": dict(state.versions),
    "config": plain(state.config, "config"),
    "metadata": plain(state.metadata, "metadata"),
    "files": dict(files),
    "packed": {name: _packed_json(packed) for name, packed in state.packed.items()},
    "tied": dict(state.tied),
    "quantizers": {name: [_leaf_json(name, leaf) for leaf in leaves] for name, leaves in state.quantizers.items()},
  }
  return document | {"sha256": digest(document)}


def _packed_json(packed: Packed) -> dict[str, Any]:
  entry: dict[str, Any] = {
    "attributes": plain(spec_attributes(packed.spec), "attributes"),
    "dtype": packed.dtype,
    "shape": list(packed.shape),
  }
  entry["tensors"] = [part for part in PARTS if part in packed.tensors]
  return entry if packed.matmul is None else entry | {"matmul": packed.matmul}


def _leaf_json(name: str, leaf: Leaf) -> dict[str, Any]:
  try:
    entry: dict[str, Any] = {"attributes": plain(leaf.config.to_attributes(), "attributes"), "mode": leaf.mode}
  except ValueError as error:
    raise ValueError(f"quantizer {name!r} cannot be kept: {error}") from error
  optional = {
    "group": leaf.group,
    "tensors": [field for field in FIELDS if field in leaf.tensors] or None,
    "own_tensor_amax": leaf.own_tensor_amax,
    "key": None if leaf.key is None else list(leaf.key),
  }
  return entry | {key: value for key, value in optional.items() if value is not None}


def from_json(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
  """The state that a document of the present version and its tensors describe.

  Raises:
    ValueError: names the entry and what is wrong with it.
  """
  check_keys("the document", document, KEYS)
  missing = [key for key in KEYS if key not in document]
  if missing:
    raise ValueError(f"the document lacks {', '.join(map(repr, missing))}")
  if document["backend"] not in BACKENDS:
    raise ValueError(f"backend is {document['backend']!r}; allowed are {', '.join(map(repr, BACKENDS))}")
  rest = dict(tensors)
  quantizers = {name: _leaves(name, entries, rest) for name, entries in _mapping(document, "quantizers").items()}
  packed = {name: _packed(name, entry, rest) for name, entry in _mapping(document, "packed").items()}
  tied = {name: _text(f"tied[{name!r}]", other) for name, other in _mapping(document, "tied").items()}
  for name, other in tied.items():
    if (other not in rest and other not in packed) or name in rest or name in packed:
      raise ValueError(f"{name!r} is said to be the same parameter as {other!r}; the files must hold the latter and not the former")
  versions = {name: _text(f"versions[{name!r}]", value) for name, value in _mapping(document, "versions").items()}
  metadata = _mapping(document, "metadata")
  return State(document["backend"], rest, quantizers, packed, tied, document["config"], metadata, versions)


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
  value = document[key]
  if not isinstance(value, dict):
    raise ValueError(f"{key!r} of the document is {type(value).__name__}; an object is needed")
  return value


def _text(what: str, value: Any) -> str:
  if not isinstance(value, str):
    raise ValueError(f"{what} is {value!r}; a string is needed")
  return value


def _packed(name: str, entry: Any, rest: dict[str, Tensor]) -> Packed:
  """Raises:
  ValueError: the entry is not that of a compressed weight, or its tensors are missing.
  """
  keys = {"attributes", "dtype", "shape", "tensors"}
  if not isinstance(entry, Mapping) or set(entry) - {"matmul"} != keys or name in rest:
    raise ValueError(f"packed weight {name!r}: an object with {', '.join(sorted(keys))} is needed, and no tensor of that name")
  dtype, shape, parts = entry["dtype"], entry["shape"], entry["tensors"]
  if dtype not in WEIGHT_TYPES or not are_sizes(shape) or not shape:
    raise ValueError(f"packed weight {name!r}: dtype {dtype!r} and shape {shape!r} are not those of a weight ({', '.join(WEIGHT_TYPES)})")
  if not _chosen(parts, PARTS) or not {"codes", "scale"} <= set(parts):
    raise ValueError(f"packed weight {name!r}: tensors is {parts!r}; needed are codes and scale, allowed {', '.join(PARTS)}")
  missing = [part for part in parts if f"{name}.{part}" not in rest]
  if missing:
    raise ValueError(f"packed weight {name!r}: {', '.join(missing)} is in none of the files")
  try:
    matmul.check_name(entry.get("matmul"))
    spec = spec_from_attributes(entry["attributes"])
  except (ValueError, TypeError) as error:
    raise ValueError(f"packed weight {name!r}: {error}") from error
  return Packed(spec, dtype, tuple(shape), {part: rest.pop(f"{name}.{part}") for part in parts}, entry.get("matmul"))


def _chosen(words: Any, allowed: tuple[str, ...]) -> bool:
  return isinstance(words, list) and all(isinstance(w, str) and w in allowed for w in words) and len(set(words)) == len(words)


def _leaves(name: str, entries: Any, rest: dict[str, Tensor]) -> tuple[Leaf, ...]:
  if not isinstance(entries, list) or not entries:
    raise ValueError(f"quantizer {name!r}: a list of one or more entries is needed, got {entries!r}")
  try:
    return tuple(_leaf(name, entry, place, len(entries), rest) for place, entry in enumerate(entries))
  except (ValueError, TypeError) as error:
    raise ValueError(f"quantizer {name!r}: {error}") from error


def _leaf(name: str, entry: Any, place: int, count: int, rest: dict[str, Tensor]) -> Leaf:
  if not isinstance(entry, Mapping):
    raise ValueError(f"its entry is {entry!r}; an object is needed")
  check_keys("its entry", entry, LEAF_KEYS)
  if entry.get("mode") not in MODES:
    raise ValueError(f"mode is {entry.get('mode')!r}; allowed are {', '.join(map(repr, MODES))}")
  fields = entry.get("tensors", [])
  if not _chosen(fields, FIELDS):
    raise ValueError(f"tensors is {fields!r}; allowed are {', '.join(FIELDS)}, each once")
  held = {}
  for field in fields:
    full = tensor_name(name, place, count, field)
    if full not in rest:
      raise ValueError(f"its tensor {full!r} is in none of the files")
    held[field] = rest.pop(full)
  if "attributes" not in entry:
    raise ValueError("its entry has no 'attributes'")
  config = QuantizerConfig.from_attributes(entry["attributes"])
  config.check_simulated(name)
  group = entry.get("group")
  return Leaf(
    config, entry["mode"], None if group is None else _text("group", group), held, _number(entry.get("own_tensor_amax")), _key(entry)
  )


def _number(value: Any) -> float | None:
  if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
    raise ValueError(f"own_tensor_amax is {value!r}; a number is needed")
  return None if value is None else float(value)


def _key(entry: Mapping[str, Any]) -> tuple[int, int] | None:
  value = entry.get("key")
  if value is None:
    return None
  if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and -(2**31) <= n < 2**31 for n in value):
    raise ValueError(f"key is {value!r}; a list of two int32 is needed")
  return value[0], value[1]
