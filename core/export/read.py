"""An exported folder read back: codes, scales and weights of every layer, by `core` alone. Nothing in a file is trusted.

>>> artefact = read("out/smollm2-nvfp4")
>>> artefact.layers                                             # names of the quantized layers
>>> artefact.stored("model.layers.0.mlp.up_proj").weight        # QuantizedTensor
>>> artefact.stored("model.layers.0.mlp.up_proj").values()      # what the model computes with, float32
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.export import compressed_tensors, gguf_layout, modelopt, read_compressed_tensors, read_gguf, read_modelopt
from core.export.folder import METADATA
from core.export.gguf_file import GgufFile
from core.export.layout import Stored
from core.export.safetensors_file import File, to_float
from core.export.source import natural

READERS: dict[str, Any] = {
  compressed_tensors.NAME: read_compressed_tensors,
  modelopt.NAME: read_modelopt,
  gguf_layout.NAME: read_gguf,
}
MAX_JSON = 50_000_000
_PARTS = (
  "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_shape", "weight_zero_point", "input_scale",
  "input_global_scale", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b",
)  # fmt: skip
Files = Sequence[File | GgufFile]


class Artefact:
  """An exported folder.

  Attributes:
    directory: where it is.
    layout: "compressed-tensors", "modelopt" or "gguf".
    config: content of config.json; of a GGUF file, what it says of sizes.
    settings: how the model is quantized, as the layout writes it.
    layers: names of the quantized layers, in order.
    floats: names of the unquantized tensors, in order.
    caches: scales of the key/value cache by name ("model.layers.0.self_attn.k_scale").
  """

  def __init__(self, directory: Path, layout: str, config: dict[str, Any], settings: dict[str, Any], files: Files) -> None:
    self.directory, self.layout, self.config, self.settings = directory, layout, config, settings
    self._files = {name: file for file in files for name in file.entries}
    self._exact = _exact(files)
    named = (name.removesuffix(".weight_scale") for name in self._files if name.endswith(".weight_scale"))
    self.layers = sorted(settings["layers"] if layout == gguf_layout.NAME else named, key=natural)
    owned = {f"{layer}.{part}" for layer in self.layers for part in (*_PARTS, "weight")}
    self.caches = sorted((n for n in self._files if n.endswith((".k_scale", ".v_scale"))), key=natural)
    self.floats = sorted(self._files.keys() - owned - set(self.caches), key=natural)
    lost = [name for name in self.floats if name.rpartition(".")[2] in _PARTS]
    if lost:
      raise ValueError(f"{directory}: {', '.join(lost[:3])} belong to no layer with a weight_scale")

  def stored(self, layer: str) -> Stored:
    """Codes and scales of a layer.

    Raises:
      ValueError: no such layer, or its tensors and the configuration do not fit.
    """
    if layer not in self.layers:
      raise ValueError(f"{self.directory} has no quantized layer {layer!r}; it has {', '.join(self.layers[:4])}, ...")
    module = READERS[self.layout]
    return module.read(module.scheme_of(self.settings, layer), layer, lambda suffix: self._get(f"{layer}.{suffix}"), self._exact)

  def tensor(self, name: str) -> np.ndarray:
    """An unquantized tensor: float64 where it is, else float32.

    Raises:
      ValueError: no such tensor.
    """
    if name not in self.floats and name not in self.caches:
      raise ValueError(f"{self.directory} has no unquantized tensor {name!r}")
    file = self._files[name]
    return to_float(file.read(name), file.entries[name].dtype)

  def dtype(self, name: str) -> str:
    """dtype of any tensor of the folder, as safetensors writes it."""
    return self._files[name].entries[name].dtype

  def scheme(self, layer: str) -> dict[str, Any]:
    """What the configuration says of a layer."""
    return READERS[self.layout].scheme_of(self.settings, layer)

  def layer_size(self, layer: str) -> int:
    """Number of weights of a layer."""
    return int(np.prod(self.stored(layer).weight.shape, dtype=np.int64))

  def layer_bytes(self) -> dict[str, int]:
    """Bytes of all tensors of each quantized layer's weight; inputs' scales are left out."""
    parts = [part for part in (*_PARTS, "weight") if not part.startswith("input_")]
    names = {layer: [f"{layer}.{part}" for part in parts if f"{layer}.{part}" in self._files] for layer in self.layers}
    return {layer: sum(self._files[name].entries[name].nbytes for name in held) for layer, held in names.items()}

  def _get(self, name: str) -> np.ndarray | None:
    file = self._files.get(name)
    if file is None:
      return None
    bits, dtype = file.read(name), file.entries[name].dtype
    return to_float(bits, dtype) if dtype in ("F16", "BF16") else bits


def read(directory: str | Path) -> Artefact:
  """Open an exported folder. Headers and configuration are checked now, tensors are read when they are asked for.

  Raises:
    FileNotFoundError: no such folder, or files are missing.
    ValueError: a file is damaged, or its content does not fit; names the file and what is wrong.
  """
  folder = Path(directory)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder} is no folder")
  single = _gguf(folder)
  if single is not None:
    file = GgufFile(single)
    return Artefact(folder, gguf_layout.NAME, *read_gguf.described(file), [file])
  config = _json(folder / "config.json")
  settings = config.get("quantization_config")
  beside = folder / "hf_quant_config.json"
  method = settings.get("quant_method") if isinstance(settings, dict) else None
  if method == modelopt.NAME:
    settings = _json(beside)
  elif method != compressed_tensors.NAME:
    raise ValueError(f"{folder / 'config.json'}: quant_method is {str(method)[:40]!r}; known are {', '.join(READERS)}")
  assert isinstance(settings, dict)
  return Artefact(folder, str(method), config, settings, open_files(folder))


def _gguf(folder: Path) -> Path | None:
  """The GGUF file of a folder that is exported as one."""
  path = folder / gguf_layout.FILE
  return path if path.is_file() and not (folder / "config.json").exists() else None


def open_files(folder: Path) -> Files:
  """model.safetensors, or the files that its index names, or model.gguf; headers are checked.

  Raises:
    FileNotFoundError: files are missing.
    ValueError: a file or the index is damaged.
  """
  single = _gguf(folder)
  if single is not None:
    return [GgufFile(single)]
  index = folder / "model.safetensors.index.json"
  if not index.exists():
    return [File(_existing(folder / "model.safetensors"))]
  places = _json(index).get("weight_map")
  if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
    raise ValueError(f"{index}: weight_map is not a mapping of tensors to files")
  found = []
  for name in sorted(set(places.values())):
    if name != Path(name).name or not name.endswith(".safetensors") or "\\" in name:
      raise ValueError(f"{index} names the file {name[:80]!r}; only names of safetensors files in the same folder are allowed")
    file = File(_existing(folder / name))
    listed = {tensor for tensor, place in places.items() if place == name}
    if listed != set(file.entries):
      wrong = sorted(listed ^ set(file.entries))
      raise ValueError(f"{index} and {name} disagree about the tensors {', '.join(wrong[:3])}")
    found.append(file)
  return found


def _existing(path: Path) -> Path:
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there")
  return path


def _json(path: Path) -> dict[str, Any]:
  size = _existing(path).stat().st_size
  if size > MAX_JSON:
    raise ValueError(f"{path} has {size} bytes; at most {MAX_JSON} are read")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{path} is no JSON ({error})") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds {type(value).__name__}, not an object")
  return value


def _exact(files: Files) -> dict[str, np.ndarray]:
  found: dict[str, np.ndarray] = {}
  for file in files:
    text = file.metadata.get(METADATA)
    if text is None:
      continue
    try:
      scales = json.loads(text)["tensor_scales"]
      values = {str(name): np.float32(float.fromhex(value)) for name, value in scales.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
      raise ValueError(f"{file.path}: the metadata {METADATA!r} is damaged ({error})") from error
    if not all(np.isfinite(value) and value > 0 for value in values.values()):
      raise ValueError(f"{file.path}: the metadata {METADATA!r} holds tensor scales that are no positive numbers")
    found |= {name: np.asarray(value) for name, value in values.items()}
  return found
