"""Configurations, a tokenizer and models of the tests of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core import export as core_export
from tests.experiments import tiny
from tests.export import quantized as q

Q8_0 = {"num_bits": 8, "block_sizes": {-1: 32, "scale_bits": (5, 10)}}
MXFP4 = {"format": "mxfp4"}
MIXED = q.config(Q8_0)
MIXED["quant_cfg"] = {**MIXED["quant_cfg"], "*mlp*weight_quantizer": MXFP4, "*o_proj*": q.OFF, "nn.Embedding": {"*weight_quantizer": Q8_0}}
CONFIGS = {
  "Q8_0": q.config(Q8_0),
  "MXFP4": q.config(MXFP4),
  "MIXED": MIXED,
  "BOTH": q.config(Q8_0, MXFP4),
  "FLOAT32": q.config({**Q8_0, "block_sizes": {-1: 32}}),
}
WEIGHTS = 294_912  # of the linear layers


def bpe_tokenizer(folder: Path, pre: Any) -> None:
  """A byte-level BPE tokenizer of `tiny.VOCABULARY` - 2 tokens in place of the folder's own."""
  from tokenizers import AddedToken, Tokenizer, decoders, models
  from transformers import PreTrainedTokenizerFast

  tokens = ["<|end|>", "<|start|>", "a", "b", "ab", "1", "2", "Ġ"]
  tokens += [f"x{i}" for i in range(tiny.VOCABULARY - 2 - len(tokens))]
  tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")]))
  tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:2]])
  special = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|end|>"}
  made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}", **special)
  made.save_pretrained(str(folder))


def smollm() -> Any:
  from tokenizers import pre_tokenizers

  return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def quantized(backend: str, folder: Path, name: str, dtype: str = "float32") -> Any:
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(q.OWN, name, CONFIGS[name])
    return q.quantized(backend, folder, name, dtype)


def exported(made: Any, out: Path, source: Path, **options: Any) -> core_export.Artefact:
  return q.exported(made, out, "gguf", source, **options)


def loaded(folder: Path, dtype: str = "float32") -> Any:
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(str(folder), gguf_file="model.gguf", dtype=getattr(torch, dtype)).eval()
