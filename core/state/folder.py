"""A saved model on disk: one JSON file and the tensor file that it names.

Tensor files are called after their content, so that saving over an earlier state never touches what the old JSON names; the new JSON
takes the old one's place in one step, and only then are files removed that nothing names any more.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core import files
from core.state import document, tensors, upgrade
from core.state.model import State, tensor_name
from core.state.tensors import Tensor
from core.tensor_header import parse_json

DOCUMENT = "quant_state.json"
MOST_DOCUMENT = 256 * 2**20
_FILE = re.compile(r"quant_state-[0-9a-f]{16}\.safetensors")
PACKAGES = ("twinquant", "numpy", "torch", "jax", "flax", "transformers")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
  """Versions of Python and of these packages, those that are installed; by default what a saved model may depend on."""
  found = {"python": platform.python_version()}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def write(state: State, directory: str | os.PathLike[str]) -> Path:
  """Write a state into a directory, which is made if need be; other files in it are left alone.

  Returns:
    The directory.

  Raises:
    ValueError: something that the files cannot hold, or two tensors of one name.
    OSError: the directory cannot be written.
  """
  folder = Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  everything = _all(state)
  document.to_json(state, upgrade.VERSION, {})  # whatever cannot be kept is found before anything is written
  part = tensors.temporary(folder, ".safetensors.part")
  try:
    sha = tensors.write(part, everything)
    name = f"quant_state-{sha[:16]}.safetensors"
    size = part.stat().st_size
    os.replace(part, folder / name)
  finally:
    part.unlink(missing_ok=True)
  described = document.to_json(state, upgrade.VERSION, {name: {"sha256": sha, "bytes": size}})
  files.write(folder / DOCUMENT, json.dumps(described, indent=1) + "\n")
  for old in folder.iterdir():
    if _FILE.fullmatch(old.name) and old.name != name:
      old.unlink()
  return folder


def _all(state: State) -> dict[str, Tensor]:
  """Every tensor by its name in the files."""
  everything = dict(state.tensors)
  parts = {f"{name}.{part}": tensor for name, packed in state.packed.items() for part, tensor in packed.tensors.items()}
  for name, leaves in state.quantizers.items():
    for place, leaf in enumerate(leaves):
      for field, tensor in leaf.tensors.items():
        parts[tensor_name(name, place, len(leaves), field)] = tensor
  twice = [name for name in parts if name in everything]
  if twice:
    raise ValueError(f"two tensors of the model are called {twice[0]!r}; rename the parameter of that name")
  return everything | parts


def read(directory: str | os.PathLike[str]) -> State:
  """Read and check a state: hashes, structure, every name, type and size. Tensor data are loaded when asked for.

  Raises:
    ValueError: anything is wrong with the files; names the file and the entry.
    OSError: a file is missing or cannot be read.
  """
  folder = Path(directory)
  path = folder / DOCUMENT
  if not path.is_file():
    raise FileNotFoundError(f"{folder} holds no saved model: there is no {DOCUMENT}; give the directory that save() wrote")
  if path.stat().st_size > MOST_DOCUMENT:
    raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {MOST_DOCUMENT} are read")
  try:
    held = parse_json(path.read_bytes(), path.name)
    _check_document(held)
    held = upgrade.upgraded(held)
    return document.from_json(held, _read_files(folder, held.get("files")))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{folder}: {error}") from error


def _check_document(held: Mapping[str, Any]) -> None:
  if held.get("format") != document.FORMAT:
    raise ValueError(f"{DOCUMENT} has format {held.get('format')!r}; {document.FORMAT!r} is needed")
  if held.get("sha256") != document.digest(held):
    raise ValueError(
      f"{DOCUMENT} does not have the content that its sha256 was made from; it was damaged or edited (to change a quantizer, restore, "
      "change it and save again)"
    )


def _read_files(folder: Path, files: Any) -> dict[str, Tensor]:
  if not isinstance(files, dict) or not files:
    raise ValueError(f"'files' is {files!r}; an object from file name to sha256 and bytes is needed")
  found: dict[str, Tensor] = {}
  for name, facts in files.items():
    if not _FILE.fullmatch(name):
      raise ValueError(f"file name {name!r} is not allowed; names look like quant_state-0123456789abcdef.safetensors and have no folder")
    if not isinstance(facts, dict) or set(facts) != {"sha256", "bytes"}:
      raise ValueError(f"files[{name!r}] is {facts!r}; sha256 and bytes are needed")
    path = folder / name
    if not path.is_file():
      raise FileNotFoundError(f"{folder} lacks {name}, which {DOCUMENT} names; copy the whole directory")
    size = path.stat().st_size
    if size != facts["bytes"]:
      raise ValueError(f"{name} has {size} bytes, {DOCUMENT} says {facts['bytes']!r}: truncated or another file")
    if (sha := tensors.sha256(path)) != facts["sha256"]:
      raise ValueError(f"{name} has SHA-256 {sha}, {DOCUMENT} says {facts['sha256']!r}: the file was damaged or changed")
    for tensor, entry in tensors.read(path).items():
      if tensor in found:
        raise ValueError(f"tensor {tensor!r} is in two files")
      found[tensor] = entry
  return found
