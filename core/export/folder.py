"""Whole Hugging Face folders, written beside their place and renamed: a folder is there complete or not at all."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.export import card as model_card
from core.export import gguf_layout, gguf_write
from core.export.plan import DTYPES, HEAD, Item, Plan, plan, warn
from core.export.safetensors_file import Writer
from core.export.source import Source
from core.tensor_header import Entry

METADATA = "twinquant"
COPIED = (
  "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def write(
  source: Source,
  directory: str | Path,
  *,
  layout: str = "compressed-tensors",
  base: str | Path | None = None,
  config: Mapping[str, Any] | None = None,
  generation: Mapping[str, Any] | None = None,
  tokenizer: Any = None,
  max_shard_size: int | str = "5GB",
  dtype: str | None = None,
  card: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> Path:
  """Write a quantized model as a folder that clients load.

  Args:
    source: the model.
    directory: folder to make.
    layout: "compressed-tensors", "modelopt" or "gguf" (one file model.gguf, of any size).
    base: Hugging Face folder of the float model: config.json, generation_config.json and tokenizer files come from it.
    config: content of config.json; None takes that of `base`.
    generation: content of generation_config.json; None takes that of `base`.
    tokenizer: an object with `save_pretrained`, in place of the files of `base`.
    max_shard_size: bytes, or "500MB".
    dtype: of the unquantized tensors; None leaves each in its own.
    card: for README.md, see `core.export.card.text`.
    overwrite: replace a folder that is there.

  Returns:
    The folder.

  Raises:
    ValueError: the layout cannot express the model (nothing is written then), or arguments that do not fit.
    FileExistsError: the folder exists and holds something.

  Warns:
    ConfigWarning: clients that compute other numbers, and a config.json that only says how the model is quantized.
  """
  target = Path(directory)
  limit = shard_size(max_shard_size)
  check_free(target, overwrite)
  config = config if config is not None else _read_json(Path(base) / "config.json") if base is not None else None
  tied = bool((config or {}).get("tie_word_embeddings")) and _is_tied(source)
  made = plan(source, layout, dtype, tied)
  if layout == gguf_layout.NAME:
    gguf_write.check(made, config)
  if config is None:
    made.notes.append(
      "config.json says only how the model is quantized; give `source`, the folder of the float model, for one that clients load"
    )
  warn(made)
  with _beside(target, overwrite) as work:
    _copy(base, work, tokenizer, generation)
    if layout == gguf_layout.NAME:
      gguf_write.write(made, work, config or {}, str((card or {}).get("title") or "A quantized model"))
    else:
      write_tensors(made, work, limit)
      _write_json(work / "config.json", _config(config or {}, made, source, dtype, tied))
    for name, content in made.beside.items():
      _write_json(work / name, content)
    (work / "README.md").write_text(model_card.text(made, card or {}), encoding="utf-8")
  return target


def shard_size(value: int | str) -> int:
  """Bytes of 5_000_000 or "5MB".

  Raises:
    ValueError: neither.
  """
  found = re.fullmatch(r"(\d+)\s*([KMG]B)?", str(value).strip().upper())
  size = int(found[1]) * _UNITS[found[2] or ""] if found and not isinstance(value, bool) else 0
  if size < 1:
    raise ValueError(f"max_shard_size is {value!r}; allowed are a number of bytes and texts such as '500MB' and '5GB'")
  return size


def check_free(target: Path, overwrite: bool) -> None:
  """Raises:
  FileExistsError: the folder is taken.
  """
  if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
    raise FileExistsError(f"{target} exists and is not empty; choose another folder, or pass overwrite=True")


@contextlib.contextmanager
def _beside(target: Path, overwrite: bool) -> Iterator[Path]:
  """A new folder beside the target that takes its place when all is written, and disappears when anything fails."""
  target.parent.mkdir(parents=True, exist_ok=True)
  work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
  old = work.with_name(f"{work.name}-old")
  try:
    yield work
    work.chmod(0o755)  # mkdtemp makes folders that nobody else can read
    if target.exists():
      check_free(target, overwrite)
      target.rename(old)
    work.rename(target)
  finally:
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# -- tensors -----------------------------------------------------------------------------------------------------------------------


def write_tensors(made: Plan, folder: Path, limit: int) -> None:
  """model.safetensors, or shards with an index; one item at a time is in memory."""
  shards = split(made.items, limit)
  names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  places = {}
  for name, items in zip(names, shards, strict=True):
    entries: dict[str, Entry] = {}
    for item in items:
      entries |= item.entries
    with Writer(folder / name, entries, _metadata(made, set(entries))) as writer:
      for item in items:
        for tensor, array in item.make().items():
          writer.write(tensor, array)
    places |= dict.fromkeys(entries, name)
  if len(shards) > 1:
    total = sum(entry.nbytes for item in made.items for entry in item.entries.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def split(items: list[Item], limit: int) -> list[list[Item]]:
  """Items in as many files as needed, none above `limit` bytes unless one item is."""
  shards: list[list[Item]] = [[]]
  size = 0
  for item in items:
    more = sum(entry.nbytes for entry in item.entries.values())
    if shards[-1] and size + more > limit:
      shards.append([])
      size = 0
    shards[-1].append(item)
    size += more
  return shards


def _metadata(made: Plan, tensors: set[str]) -> dict[str, str]:
  exact = {name: float(scale).hex() for name, scale in made.exact.items() if f"{name}.weight_packed" in tensors}
  return {"format": "pt"} | ({METADATA: json.dumps({"version": 1, "tensor_scales": exact}, sort_keys=True)} if exact else {})


# -- everything else ---------------------------------------------------------------------------------------------------------------


def _is_tied(source: Source) -> bool:
  """Whether the head is still the table of embeddings: it has no weight, or an equal one that is not quantized."""
  shapes = source.parameter_shapes()
  if HEAD not in shapes:
    return "lm_head" not in source.weighted() or not source.weight_stages("lm_head")
  if source.weight_stages("lm_head"):
    return False
  tables = [f"{name}.weight" for name in source.weighted() if source.is_table(name) and not source.weight_stages(name)]
  return any(shapes.get(name) == shapes[HEAD] and np.array_equal(source.tensor(name), source.tensor(HEAD)) for name in tables)


def _config(base: Mapping[str, Any], made: Plan, source: Source, dtype: str | None, tied: bool) -> dict[str, Any]:
  config = {key: value for key, value in base.items() if key != "quantization_config"}
  if config.get("tie_word_embeddings") and not tied:
    config["tie_word_embeddings"] = False  # calibration gave the head a weight of its own
  held = dtype or _common_type(source)
  for key in ("dtype", "torch_dtype"):
    if key in config and held is not None:
      config[key] = held
  return config | {"quantization_config": made.settings}


def _common_type(source: Source) -> str | None:
  kinds = list(source.parameter_types().values())
  names = {short: name for name, short in DTYPES.items()}
  return names[max(set(kinds), key=kinds.count)] if kinds else None


def _copy(base: str | Path | None, work: Path, tokenizer: Any, generation: Mapping[str, Any] | None) -> None:
  if base is not None:
    skipped: Callable[[str], bool] = lambda name: tokenizer is not None and name != "generation_config.json"  # noqa: E731
    for name in COPIED:
      if (Path(base) / name).is_file() and not skipped(name):
        shutil.copyfile(Path(base) / name, work / name)
  if tokenizer is not None:
    tokenizer.save_pretrained(str(work))
  if generation is not None:
    _write_json(work / "generation_config.json", generation)


def _read_json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there; `source` must be a Hugging Face folder with a config.json")
  value = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds {type(value).__name__}, not an object")
  return value


def _write_json(path: Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
