"""Reading the vectors: JSON to specifications and numpy arrays."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import numpy as np

from core import formats
from core.formats import CodebookFormat, FloatFormat, Format, ScaleFormat
from core.spec import QuantSpec

_SCALE_FORMATS: dict[str, ScaleFormat] = {"E8M0": formats.E8M0, "E4M3": formats.E4M3, "UINT8": formats.UINT8, "FLOAT16": formats.FLOAT16}


def names() -> list[str]:
  """Names of the vector files, without suffix."""
  folder = importlib.resources.files("core.conformance") / "vectors"
  return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load(name: str) -> dict[str, Any]:
  """One vector file.

  Raises:
    ValueError: there is no such file; the message lists those that exist.
  """
  if name not in names():
    raise ValueError(f"there is no vector file {name!r}; known are {', '.join(names())}")
  return json.loads((importlib.resources.files("core.conformance") / "vectors" / f"{name}.json").read_text())


def floats(text: str) -> np.ndarray:
  """float32 from hex words."""
  return np.array([int(word, 16) for word in text.split()], np.uint32).view(np.float32)


def codes(text: str, signed: bool = False) -> np.ndarray:
  """int8 or uint8 from hex bytes."""
  return np.frombuffer(bytes.fromhex(text), np.int8 if signed else np.uint8)


def array(entry: dict[str, Any]) -> np.ndarray:
  """A float32 array with its shape."""
  return floats(entry["float32"]).reshape(entry["shape"])


def spec_from_json(entry: dict[str, Any]) -> QuantSpec:
  """QuantSpec of a case's "spec"; what is left out has its default."""
  fields = {k: v for k, v in entry.items() if k not in ("element", "scale_format", "bound")}
  for name in ("axis", "blocks"):
    if name in fields:
      fields[name] = tuple(tuple(item) if isinstance(item, list) else item for item in fields[name])
  if "scale_format" in entry:
    fields["scale_format"] = _SCALE_FORMATS[entry["scale_format"]]
  if "bound" in entry:
    fields["bound"] = float(floats(entry["bound"])[0])
  return QuantSpec(_element(entry["element"]), **fields)


def _element(entry: dict[str, Any]) -> Format:
  if entry["kind"] == "int":
    return formats.int_format(entry["bits"], entry["signed"], entry["narrow_range"])
  if entry["kind"] == "codebook":
    return CodebookFormat(entry["name"], tuple(float(v) for v in floats(entry["levels"])))
  return FloatFormat(
    entry["name"],
    entry["exponent_bits"],
    entry["mantissa_bits"],
    float(floats(entry["bound"])[0]),
    entry["bias"],
    entry["nan_code"],
    entry["inf_code"],
  )
