"""Layers of a GGUF file, for `core.export.read`."""

from __future__ import annotations

from typing import Any

import numpy as np

from core.export import gguf_layout
from core.export.gguf_file import GgufFile
from core.export.layout import Get, Stored, need


def scheme_of(settings: dict[str, Any], layer: str) -> dict[str, Any]:
  """{"format": "Q8_0"} of a layer.

  Raises:
    ValueError: it is not quantized.
  """
  if layer not in settings["layers"]:
    raise ValueError(f"{layer} is stored in no blocks")
  return {"format": settings["layers"][layer]}


def read(scheme: dict[str, Any], layer: str, get: Get, exact: dict[str, np.ndarray]) -> Stored:
  """Codes and scales of a layer.

  Raises:
    ValueError: its scales are not finite.
  """
  data, kind = need(get, layer, "weight"), scheme["format"]
  columns = data.shape[1] // gguf_layout.BYTES[kind] * gguf_layout.BLOCK
  return Stored(gguf_layout.from_blocks(data, kind, (data.shape[0], columns)))


def described(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
  """(what config.json would say of sizes, how the layers are stored)."""
  if file.facts.get("general.architecture") != "llama":
    raise ValueError(f"{file.path} holds architecture {str(file.facts.get('general.architecture'))[:40]!r}; read here is 'llama'")
  config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": file.facts.get("llama.vocab_size")}
  return config | {"tie_word_embeddings": "lm_head.weight" not in file.entries}, {"layers": file.blocks}
