"""Quantized models as Hugging Face folders: config.json, tokenizer and the saved state side by side.

transformers' own `model.save_pretrained(folder)` keeps parameters and statistics and forgets the formats; `save_pretrained` here writes
the model's config, generation config and tokenizer, and the state beside them. A folder that transformers wrote works too:
`save(model, folder)` adds the state to it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from core import state as files
from torch_backend.state import restore, save


def save_pretrained(model: Any, folder: str | os.PathLike[str], tokenizer: Any = None, metadata: dict[str, Any] | None = None) -> Path:
  """Save a quantized transformers model as a folder that `from_pretrained` reads.

  Args:
    model: a quantized `transformers.PreTrainedModel`.
    folder: made if need be; files of other names are left alone.
    tokenizer: or processor, saved with its own `save_pretrained`.
    metadata: as in `save`.

  Returns:
    The folder.

  Raises:
    ImportError: transformers is not installed.
    TypeError: model is no transformers model.
    ValueError, OSError: as `save`.
  """
  transformers = _transformers()
  if not isinstance(model, transformers.PreTrainedModel):
    raise TypeError(f"save_pretrained takes a transformers model, got {type(model).__name__}; use save(model, directory) for other modules")
  place = save(model, folder, metadata=metadata)
  config = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "model_type": model.config.model_type}
  types = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
  if len(types) == 1:
    config["dtype"] = types.pop()
  part = place / f".config.{os.getpid()}.part"
  part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  os.replace(part, place / "config.json")
  if model.generation_config is not None:
    model.generation_config.save_pretrained(str(place))
  if tokenizer is not None:
    tokenizer.save_pretrained(str(place))
  return place


def from_pretrained(folder: str | os.PathLike[str], model_class: Any = None, **config_changes: Any) -> nn.Module:
  """Build the model that a folder's config.json describes and restore its quantized state.

  Nothing is downloaded, and no code of the folder runs. Buffers that are not saved (tables of positions) are those of a model that
  transformers has loaded in that type: in float32, whereas `.to(torch.bfloat16)` would have rounded them as well.

  Args:
    folder: what `save_pretrained` wrote, or any folder with config.json into which `save` has written.
    model_class: a transformers model class; None takes the one that config.json names.
    config_changes: entries of the config to replace, such as attn_implementation="eager".

  Returns:
    The model, in evaluation mode, with its parameters in the types they were saved in.

  Raises:
    ImportError: transformers is not installed.
    FileNotFoundError: config.json or the state is missing.
    ValueError: the class is unknown, or the state does not fit.
  """
  transformers = _transformers()
  place = Path(folder)
  for name in ("config.json", files.DOCUMENT):
    if not (place / name).is_file():
      raise FileNotFoundError(f"{place} has no {name}; save_pretrained(model, folder) writes both config.json and {files.DOCUMENT}")
  config = transformers.AutoConfig.from_pretrained(str(place), local_files_only=True, **config_changes)
  cls = _class_of(transformers, config, place) if model_class is None else model_class
  from transformers.initialization import no_init_weights

  with no_init_weights():  # every parameter is about to be replaced
    model = cls._from_config(config)
  model.tie_weights()
  return restore(model.eval(), place, adopt_dtype=True)


def _class_of(transformers: Any, config: Any, place: Path) -> Any:
  """The class that a config names, if it is one of transformers' models.

  Raises:
    ValueError: it is not.
  """
  names = config.architectures or []
  found = getattr(transformers, names[0], None) if len(names) == 1 else None  # a module that loads its classes when they are asked for
  if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
    raise ValueError(f"{place / 'config.json'} names the architecture {names}, which is no model of transformers; pass model_class=")
  return found


def _transformers() -> Any:
  try:
    import transformers
  except ImportError as error:
    raise ImportError('Hugging Face folders need transformers: pip install "twinquant[hf]"') from error
  return transformers
