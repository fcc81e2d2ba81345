"""The GGUF reader against a file written the way llama.cpp writes one, and the conversion of SmolLM2."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from experiments.models import folders, gguf_llama, load_jax, load_tokenizer, load_torch_twin
from tests.experiments import tiny

_NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
  module = name.removesuffix(".weight")
  if module in _NAMES:
    return f"{_NAMES[module]}.weight"
  _, _, layer, *rest = module.split(".")
  kind = _NAMES.get(rest[-1]) or {"o_proj": "attn_output"}.get(rest[-1])
  kind = kind or ("ffn_" if rest[0] == "mlp" else "attn_") + rest[-1].removesuffix("_proj")
  return f"blk.{layer}.{kind}.weight"


def _permute(weights: np.ndarray, heads: int) -> np.ndarray:
  """As in llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute)."""
  return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _write(path, model, *, architecture: str = "llama", pre: str = "smollm") -> None:
  import gguf

  c = model.config
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_vocab_size(c.vocab_size)
  writer.add_embedding_length(c.hidden_size)
  writer.add_feed_forward_length(c.intermediate_size)
  writer.add_block_count(c.num_hidden_layers)
  writer.add_head_count(c.num_attention_heads)
  writer.add_head_count_kv(c.num_key_value_heads)
  writer.add_rope_dimension_count(c.head_dim)
  writer.add_context_length(c.max_position_embeddings)
  writer.add_layer_norm_rms_eps(c.rms_norm_eps)
  writer.add_rope_freq_base(c.rope.theta)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  tokens = ["<|end|>", "<|start|>", "a", "b", "ab", "1", "2", "Ġ"]
  tokens += [f"x{i}" for i in range(c.vocab_size - len(tokens))]
  writer.add_token_list(tokens)
  writer.add_token_types([3, 3] + [1] * (c.vocab_size - 2))
  writer.add_token_merges(["a b"])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(0)
  writer.add_pad_token_id(0)
  writer.add_unk_token_id(0)
  heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
  for name, value in model.state_dict().items():
    if name == "lm_head.weight" and c.tie_word_embeddings:
      continue
    own = heads.get(name.split(".")[-2])
    writer.add_tensor(_gguf_name(name), value.numpy() if own is None else _permute(value.numpy(), own))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_the_folder_it_was_made_from(tmp_path, tied):
  (tmp_path / "made").mkdir()
  original, _ = load_torch_twin(tiny.llama_folder(tmp_path / "from", tie_word_embeddings=tied))
  _write(tmp_path / "model.gguf", original)
  gguf_llama.convert(tmp_path / "model.gguf", tmp_path / "made")
  made, tokenizer = load_torch_twin(tmp_path / "made")
  assert made.config == original.config
  for name, value in original.state_dict().items():
    assert torch.equal(made.state_dict()[name], value), name
  assert tokenizer("ab12 a<|start|>", add_special_tokens=False)["input_ids"] == [4, 5, 6, 7, 2, 1]
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)


def test_other_files_are_refused(tmp_path):
  original, _ = load_torch_twin(tiny.llama_folder(tmp_path))
  _write(tmp_path / "bert.gguf", original, architecture="bert")
  with pytest.raises(ValueError, match="holds architecture 'bert'; allowed is 'llama'"):
    gguf_llama.convert(tmp_path / "bert.gguf", tmp_path)
  _write(tmp_path / "pre.gguf", original, pre="qwen2")
  with pytest.raises(ValueError, match=r"holds a tokenizer \('gpt2', 'qwen2'\)"):
    gguf_llama.convert(tmp_path / "pre.gguf", tmp_path)


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
  def fail(source, folder):
    (folder / "config.json").write_text("{}")
    raise OSError("disk full")

  monkeypatch.setenv("TWINQUANT_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(gguf_llama, "convert", fail)
  with pytest.raises(OSError, match="disk full"):
    folders._convert(tmp_path / "model.gguf", folders.cache_folder() / "model")
  assert list((tmp_path / "cache").iterdir()) == []


def test_the_faster_of_two_conversions_wins(tmp_path, monkeypatch):
  target = tmp_path / "model"

  def convert(source, folder):
    (folder / "config.json").write_text("mine")
    target.mkdir()
    (target / "config.json").write_text("theirs")

  monkeypatch.setattr(gguf_llama, "convert", convert)
  folders._convert(tmp_path / "model.gguf", target)
  assert (target / "config.json").read_text() == "theirs"
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.models
def test_smollm2_facts():
  module, variables, tokenizer = load_jax("smollm2", "bfloat16")
  c = module.config
  assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.tie_word_embeddings) == (576, 30, 9, 3, True)
  head = variables["params"]["lm_head"]["kernel"]
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) - head.size == 134_515_008
  text = "In 2024, it's 12345\n\n  naïve 日本"
  ids = load_tokenizer("smollm2")(text)["input_ids"]
  assert tokenizer.decode(ids) == text
  assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isdigit()] == list("202412345")
