"""A planned Llama as one GGUF file, streamed tensor by tensor through the package gguf."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.config.rules import ConfigWarning
from core.export import gguf_layout
from core.export.gguf_facts import Facts, facts
from core.export.gguf_tokenizer import Unknown, Vocabulary, vocabulary
from core.export.plan import Plan
from core.export.safetensors_file import to_float
from core.export.source import few
from core.tensor_header import Entry

_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def package() -> Any:
  """The package gguf.

  Raises:
    ImportError: it is not installed; names the extra that brings it.
  """
  try:
    return importlib.import_module("gguf")
  except ModuleNotFoundError as error:
    if error.name != "gguf":
      raise
    message = "layout 'gguf' needs the package gguf, which is not installed; run pip install -c constraints.txt -e \".[hf]\""
    raise ImportError(message, name="gguf") from error


def check(made: Plan, config: Mapping[str, Any] | None) -> Facts:
  """What the file will say of the model; refuses what no GGUF file of a Llama can hold.

  Args:
    made: the plan.
    config: content of config.json.

  Raises:
    ValueError: says what, before anything is written.
    ImportError: the package gguf is not installed.
  """
  package()
  found = facts(config)
  entries = {name: entry for item in made.items for name, entry in item.entries.items()}
  lost = [name for name in entries if gguf_layout.gguf_name(name) is None]
  if lost:
    raise ValueError(f"layout 'gguf' has no place for {few(lost)}: a Llama in a GGUF file has no such tensor; nothing was written")
  wide = [name for name, entry in entries.items() if entry.dtype == "F64"]
  if wide:
    raise ValueError(f"{few(wide)} are float64, which clients of GGUF do not read; pass dtype='float32'")
  rows = {"q_proj": found.num_attention_heads, "k_proj": found.num_key_value_heads}
  for name, entry in entries.items():
    heads = rows.get(name.split(".")[-2])
    if heads is not None and entry.shape[0] != heads * found.head_dim:
      raise ValueError(f"{name} has {entry.shape[0]} rows; config.json says {heads} heads of {found.head_dim}")
  return found


def write(made: Plan, folder: Path, config: Mapping[str, Any], title: str) -> None:
  """Write `model.gguf`; a tokenizer that cannot be written is said in `made.notes` and warned of.

  Args:
    made: the plan, checked.
    folder: where the file goes; its tokenizer.json becomes the file's vocabulary.
    config: content of config.json.
    title: name of the model.
  """
  gguf = package()
  found = check(made, config)
  writer = gguf.GGUFWriter(folder / gguf_layout.FILE, "llama")
  try:
    writer.add_name(title)
    _add_facts(writer, gguf, found, made)
    _add_vocabulary(writer, made, folder, config, found.vocab_size)
    for item in made.items:
      for name, entry in item.entries.items():
        shape, dtype, nbytes, raw = _stored(gguf, made, name, entry)
        writer.add_tensor_info(gguf_layout.gguf_name(name), shape, dtype, nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for item in made.items:
      for name, array in item.make().items():
        writer.write_tensor_data(_arranged(name, array, item.entries[name], made, found))
  finally:
    writer.close()


def _add_facts(writer: Any, gguf: Any, found: Facts, made: Plan) -> None:
  kinds = Counter(planned.scheme["format"] for planned in made.layers.values())
  types = {"Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE}
  writer.add_file_type(int(types[max(sorted(kinds), key=lambda kind: kinds[kind])]))
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  writer.add_vocab_size(found.vocab_size)
  writer.add_context_length(found.max_position_embeddings)
  writer.add_embedding_length(found.hidden_size)
  writer.add_block_count(found.num_hidden_layers)
  writer.add_feed_forward_length(found.intermediate_size)
  writer.add_head_count(found.num_attention_heads)
  writer.add_head_count_kv(found.num_key_value_heads)
  writer.add_key_length(found.head_dim)
  writer.add_value_length(found.head_dim)
  writer.add_rope_dimension_count(found.head_dim)
  writer.add_rope_freq_base(found.rope_theta)
  writer.add_layer_norm_rms_eps(found.rms_norm_eps)


def _add_vocabulary(writer: Any, made: Plan, folder: Path, config: Mapping[str, Any], rows: int) -> None:
  try:
    found = vocabulary(folder, config, rows)
  except Unknown as error:
    readers = "transformers takes it from this folder, llama.cpp opens the file and its server cannot run it"
    note = f"the tokenizer is left out of {gguf_layout.FILE}: {error}; {readers}"
    made.notes.append(note)
    warnings.warn(f"export to layout {made.layout!r}: {note}", ConfigWarning, stacklevel=5)
    writer.add_tokenizer_model("no_vocab")
    return
  _add_tokens(writer, found)


def _add_tokens(writer: Any, found: Vocabulary) -> None:
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(found.split)
  writer.add_token_list(found.tokens)
  writer.add_token_types(found.kinds)
  writer.add_token_merges(found.merges)
  for kind, index in found.special.items():
    writer.add_uint32(f"tokenizer.ggml.{_SPECIAL[kind]}_token_id", index)
  writer.add_add_bos_token(found.add_bos)
  writer.add_add_space_prefix(False)
  if found.template is not None:
    writer.add_chat_template(found.template)


# -- tensors -----------------------------------------------------------------------------------------------------------------------


def _stored(gguf: Any, made: Plan, name: str, entry: Entry) -> tuple[tuple[int, ...], np.dtype[Any], int, Any]:
  """Shape, numpy type, bytes and ggml type of a tensor in the file. Vectors are float32: llama.cpp adds and multiplies no others."""
  layer = made.layers.get(name.removesuffix(".weight"))
  if layer is not None:
    return entry.shape, np.dtype(np.uint8), entry.nbytes, gguf.GGMLQuantizationType[layer.scheme["format"]]
  kind = "F32" if len(entry.shape) == 1 else entry.dtype
  held = Entry(kind, entry.shape)
  return held.shape, np.dtype({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind]), held.nbytes, gguf.GGMLQuantizationType[kind]


def _arranged(name: str, array: np.ndarray, entry: Entry, made: Plan, found: Facts) -> np.ndarray:
  if len(entry.shape) == 1:
    array = to_float(array, entry.dtype)
  heads = gguf_layout.heads_of(name, found.num_attention_heads, found.num_key_value_heads)
  return np.ascontiguousarray(gguf_layout.interleaved(array, heads))
