"""What the experiments share: reading configurations by name or from files, token windows, loading a backend's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import config as presets
from core.config.frozen import thaw
from experiments import data, models
from experiments.manifest import digest
from experiments.models import folders

BACKENDS = ("torch", "jax")


@dataclasses.dataclass(frozen=True)
class Config:
  """A quantization configuration under the name that the tables show.

  Attributes:
    name: preset name, or a file's name without its suffix.
    value: the configuration.
    full: the same, normalized, as plain data for the manifest.
  """

  name: str
  value: Any
  full: dict[str, Any]


def read_configs(names: Iterable[str]) -> list[Config]:
  """Configurations from preset names and YAML or JSON paths.

  Raises:
    ValueError: nothing given, an unknown preset, an invalid file, or two of one name.
    FileNotFoundError: no such file.
  """
  found = []
  for name in names:
    path = Path(name)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
      value: Any = presets.load_config(path)
      name = path.stem
    else:
      value = presets.preset(name)
    found.append(Config(name, value, thaw(presets.normalize(value).to_dict())))
  twice = sorted({c.name for c in found if sum(c.name == other.name for other in found) > 1})
  if not found or twice:
    raise ValueError(f"--configs names {', '.join(twice)} twice" if twice else "--configs is empty; name presets or YAML files")
  return found


def backends(name: str) -> tuple[str, ...]:
  """("torch",), ("jax",) or both."""
  return BACKENDS if name == "both" else (name,)


def load(backend: str, source: str, dtype: str = "float32", twin: bool = False, jit: bool = False) -> Any:
  """The float model in one backend; the other framework is not imported for it."""
  if backend == "torch":
    from experiments import on_torch as adapter
  else:
    from experiments import on_jax as adapter
  return adapter.Model.load(source, dtype, twin, jit)


def is_language_model(source: str) -> bool:
  """Whether a model predicts tokens; otherwise it is an encoder."""
  return isinstance(models.read_config(folders.find(source)), models.LlamaConfig)


@dataclasses.dataclass(frozen=True)
class Windows:
  """Token windows of one text, and what identifies them."""

  source: str
  sha256: str
  text: data.Text
  tokenizer: Any

  def cut(self, part: str, samples: int, tokens: int, seed: int | None = None) -> np.ndarray:
    """[samples, tokens] int32; see `data.token_windows`."""
    return data.token_windows(self.tokenizer, self.text, samples, tokens, part, seed=seed)


def open_text(source: str, text: str, text_file: str) -> Windows:
  """The text and the tokenizer of a model."""
  loaded = data.load_text(text, text_file or None)
  return Windows(loaded.source, loaded.sha256, loaded, models.load_tokenizer(source))


def in_batches(windows: np.ndarray, size: int) -> list[np.ndarray]:
  """The windows in batches of at most `size`.

  Raises:
    ValueError: size is not positive.
  """
  if size < 1:
    raise ValueError(f"batch size {size} must be at least 1")
  return [windows[i : i + size] for i in range(0, len(windows), size)]


def describe_windows(windows: np.ndarray) -> dict[str, Any]:
  """Count, length and SHA-256 of the token ids, for the manifest."""
  return {"samples": int(windows.shape[0]), "tokens_per_sample": int(windows.shape[1]), "sha256": digest(windows)}


def only(values: Sequence[str], allowed: Sequence[str], what: str) -> None:
  """Raises:
  ValueError: a value that is not allowed.
  """
  for value in values:
    if value not in allowed:
      raise ValueError(f"{what} {value!r} is unknown; allowed are {', '.join(map(repr, allowed))}")
