"""A Llama in a GGUF file, written as an ordinary Hugging Face folder with float32 safetensors. Numpy does it; torch is not needed.

References: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp, convert_hf_to_gguf.py (whose steps are undone here).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_TENSORS = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # gguf.TokenType.CONTROL


def convert(source: Path, folder: Path) -> None:
  """Write `config.json`, `model.safetensors` and the tokenizer of a GGUF file into a folder.

  Args:
    source: GGUF file of a Llama with default rotary embedding and a byte-level BPE tokenizer of the "smollm" family.
    folder: an existing folder.

  Raises:
    ImportError: gguf, safetensors or transformers is not installed.
    ValueError: the file holds another architecture, tokenizer or tensor.
  """
  from gguf import GGUFReader, dequantize
  from safetensors.numpy import save_file

  reader = GGUFReader(source)
  facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
  if facts.get("general.architecture") != "llama":
    raise ValueError(f"{source} holds architecture {facts.get('general.architecture')!r}; allowed is 'llama'")
  tensors = {}
  for tensor in reader.tensors:
    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    tensors[_name(tensor.name, source)] = _unpermuted(tensor.name, values, facts)
  config = _config(facts, tied="lm_head.weight" not in tensors)
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  _tokenizer(facts, source).save_pretrained(str(folder))


def _name(name: str, source: Path) -> str:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
  *start, kind, leaf = name.split(".")
  if not start and kind in _OUTER:
    return f"{_OUTER[kind]}.{leaf}"
  if len(start) == 2 and start[0] == "blk" and kind in _TENSORS:
    return f"model.layers.{start[1]}.{_TENSORS[kind]}.{leaf}"
  raise ValueError(f"{source} holds a tensor {name!r} that a plain Llama does not have")


def _unpermuted(name: str, x: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
  # llama.cpp rotates neighbouring channels, Hugging Face channel i with i + head_dim / 2: its converter interleaved the rows of q and k.
  heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}.get(name.split(".")[-2])
  if heads is None:
    return np.ascontiguousarray(x)
  return np.ascontiguousarray(x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape))


def _config(facts: dict[str, Any], tied: bool) -> dict[str, Any]:
  def fact(name: str) -> Any:
    return facts[f"llama.{name}"]

  tokens = {f"{kind}_token_id": facts.get(f"tokenizer.ggml.{name}_token_id") for kind, name in _SPECIAL.items() if kind != "unk"}
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": fact("vocab_size"),
    "hidden_size": fact("embedding_length"),
    "intermediate_size": fact("feed_forward_length"),
    "num_hidden_layers": fact("block_count"),
    "num_attention_heads": fact("attention.head_count"),
    "num_key_value_heads": fact("attention.head_count_kv"),
    "head_dim": fact("rope.dimension_count"),
    "hidden_act": "silu",
    "max_position_embeddings": fact("context_length"),
    # Stored as float32: nine digits are more than it says, and 1e-5 would come out as 9.999999747e-06.
    "rms_norm_eps": float(f"{fact('attention.layer_norm_rms_epsilon'):.6g}"),
    "rope_parameters": {"rope_type": "default", "rope_theta": fact("rope.freq_base")},
    "tie_word_embeddings": tied,
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "float32",
    **tokens,
  }


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _tokenizer(facts: dict[str, Any], source: Path) -> Any:
  """The tokenizer: byte-level BPE after splitting off every digit, as in the tokenizer.json that SmolLM2 was published with."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  kind = (facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre"))
  if kind != ("gpt2", "smollm"):
    raise ValueError(f"{source} holds a tokenizer {kind}; allowed is ('gpt2', 'smollm')")
  tokens: list[str] = facts["tokenizer.ggml.tokens"]
  merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
  tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  digits = pre_tokenizers.Digits(individual_digits=True)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
  tokenizer.decoder = decoders.ByteLevel()
  control = [
    AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if k == _CONTROL
  ]
  tokenizer.add_special_tokens(control)
  special = {f"{kind}_token": tokens[facts[f"tokenizer.ggml.{name}_token_id"]] for kind, name in _SPECIAL.items()}
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    chat_template=facts.get("tokenizer.chat_template"),
    model_max_length=facts["llama.context_length"],
    clean_up_tokenization_spaces=False,
    **special,
  )
