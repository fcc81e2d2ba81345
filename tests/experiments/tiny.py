"""Small model folders, made by transformers itself, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 61


def save_tokenizer(folder: Path) -> None:
  """A word-level tokenizer over "w0", "w1", ..."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(str(folder))


def llama_folder(folder: Path, dtype: str = "float32", shards: str = "1GB", **changes: Any) -> Path:
  """A random Llama with two layers, four heads over two keys and a head size that is not hidden_size / heads."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
  more = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2}
  torch.manual_seed(0)
  model = LlamaForCausalLM(LlamaConfig(**{**sizes, **more, **changes}))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a swapped or forgotten one
        parameter += 0.3 * torch.randn_like(parameter)
  model.to(getattr(torch, dtype)).save_pretrained(str(folder), max_shard_size=shards)
  save_tokenizer(folder)
  return folder


def bert_folder(folder: Path, *, pooler: bool = True, masked_lm: bool = False, **changes: Any) -> Path:
  """A random BERT with two layers."""
  import torch
  from transformers import BertConfig, BertForMaskedLM, BertModel

  sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
  config = BertConfig(**{**sizes, "max_position_embeddings": 32, "initializer_range": 0.2, **changes})
  torch.manual_seed(1)
  model = BertForMaskedLM(config) if masked_lm else BertModel(config, add_pooling_layer=pooler)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "LayerNorm" in name or name.endswith("bias"):
        parameter += 0.3 * torch.randn_like(parameter)
  model.save_pretrained(str(folder))
  save_tokenizer(folder)
  return folder


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
  """[batch, length] int32 token indices."""
  return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)
