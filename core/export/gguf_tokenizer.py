"""The vocabulary of a GGUF file, from the tokenizer.json of a folder. Byte-level BPE whose splitting llama.cpp knows by a name.

References: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp, convert_hf_to_gguf.py (get_vocab_base, SpecialVocab) and
llama-vocab.cpp (the regular expressions of each name).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # of Llama 3
)
_BYTES = ("ByteLevel", False, True)
SPLITS: dict[tuple[Any, ...], str] = {
  (_BYTES,): "gpt-2",
  (("Digits", True), _BYTES): "smollm",
  (("Split", _LLAMA3, "Isolated", False), ("ByteLevel", False, False)): "llama-bpe",
}


class Vocabulary(NamedTuple):
  """What the file says.

  Attributes:
    split: llama.cpp's name for how text is split before the merges.
    tokens: one for every row of the embedding table.
    kinds: gguf.TokenType of each.
    merges: "left right", most important first.
    special: "bos", "eos", "pad", "unk" -> index.
    add_bos: whether every text starts with the token "bos".
    template: of chats, or None.
  """

  split: str
  tokens: list[str]
  kinds: list[int]
  merges: list[str]
  special: dict[str, int]
  add_bos: bool
  template: str | None


class Unknown(ValueError):
  """This tokenizer cannot be written. The message completes "the tokenizer is left out: "."""


def vocabulary(folder: Path, config: Mapping[str, Any], rows: int) -> Vocabulary:
  """The vocabulary of a Hugging Face folder.

  Args:
    folder: holds tokenizer.json, and perhaps tokenizer_config.json and chat_template.jinja.
    config: content of the model's config.json, for the indices of its special tokens.
    rows: of the embedding table; unnamed ones get names.

  Raises:
    Unknown: there is no tokenizer.json, or it splits text in a way that llama.cpp has no name for here.
  """
  if not (folder / "tokenizer.json").is_file():
    raise Unknown("there is no tokenizer.json")
  content, beside = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
  model = content.get("model") or {}
  if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
    raise Unknown(f"its model is {model.get('type')!r}{' with byte_fallback' if model.get('byte_fallback') else ''}, not byte-level BPE")
  if content.get("normalizer") is not None:
    raise Unknown(f"it normalizes text ({content['normalizer'].get('type')})")
  split = SPLITS.get(_steps(content.get("pre_tokenizer") or {}))
  if split is None:
    raise Unknown(f"no name for its pre_tokenizer is known here; known are {', '.join(SPLITS.values())}")
  names = {int(index): token for token, index in model["vocab"].items()}
  added = {int(token["id"]): token for token in content.get("added_tokens") or []}
  names |= {index: token["content"] for index, token in added.items()}
  if max(names) >= rows:
    raise Unknown(f"it has tokens up to index {max(names)}, the embedding table {rows} rows")
  kinds = [
    CONTROL if added.get(i, {}).get("special") else USER_DEFINED if i in added else NORMAL if i in names else UNUSED for i in range(rows)
  ]
  merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
  special = _special({**names}, config, beside)
  tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
  return Vocabulary(split, tokens, kinds, merges, special, _adds_bos(content, special), _template(folder, beside))


def _steps(value: Mapping[str, Any]) -> tuple[Any, ...]:
  """A pre-tokenizer as a key of `SPLITS`."""
  kind = value.get("type")
  if kind == "Sequence":
    return tuple(step for one in value["pretokenizers"] for step in _steps(one))
  if kind == "ByteLevel":
    return ((kind, value.get("add_prefix_space", True), value.get("use_regex", True)),)
  if kind == "Digits":
    return ((kind, value.get("individual_digits", False)),)
  if kind == "Split":
    return ((kind, (value.get("pattern") or {}).get("Regex"), value.get("behavior"), value.get("invert", False)),)
  return ((kind,),)


def _special(names: Mapping[int, str], config: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, int]:
  index = {token: i for i, token in names.items()}
  found = {}
  for kind in ("bos", "eos", "pad", "unk"):
    text = beside.get(f"{kind}_token")
    text = text.get("content") if isinstance(text, Mapping) else text
    value = config.get(f"{kind}_token_id")
    value = index.get(text) if isinstance(text, str) else value[0] if isinstance(value, list) and value else value
    if type(value) is int and value in names:
      found[kind] = value
  return found


def _adds_bos(content: Mapping[str, Any], special: Mapping[str, int]) -> bool:
  """Whether the post-processor puts "bos" before a text."""
  processor = content.get("post_processor") or {}
  parts = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
  for part in parts or []:
    first = (part.get("single") or [{}])[0].get("SpecialToken")
    if part.get("type") == "TemplateProcessing" and first is not None:
      return special.get("bos") in part["special_tokens"].get(first["id"], {}).get("ids", [])
  return False


def _template(folder: Path, beside: Mapping[str, Any]) -> str | None:
  path = folder / "chat_template.jinja"
  found = path.read_text(encoding="utf-8") if path.is_file() else beside.get("chat_template")
  return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
