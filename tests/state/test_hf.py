"""Quantized models in Hugging Face folders."""

from __future__ import annotations

import json

import pytest
import torch

import torch_backend as tb
from core.state import DOCUMENT
from tests.experiments import tiny
from tests.torch_backend.models import quietly, tiny_llama, tokens
from torch_backend import hf

OFF = {"default": {"enable": False}}
CONFIG = {"quant_cfg": {**OFF, "*proj*weight_quantizer": {"format": "nvfp4"}, "*proj*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_with_tokenizer(dtype, tied, tmp_path):
  from transformers import PreTrainedTokenizerFast

  tiny.save_tokenizer(tmp_path / "tokenizer")
  tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "tokenizer"))
  model = tiny_llama(tied=tied)
  for parameter in model.parameters():  # as transformers does it; .to(dtype) rounds the tables of positions as well
    parameter.data = parameter.data.to(dtype)
  quietly(model, CONFIG, lambda m: m(tokens()))
  hf.save_pretrained(model, tmp_path / "model", tokenizer, metadata={"perplexity": 9.5})
  names = {path.name for path in (tmp_path / "model").iterdir()}
  assert {"config.json", "generation_config.json", "tokenizer.json", DOCUMENT} <= names
  assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
  other = hf.from_pretrained(tmp_path / "model", attn_implementation="eager")
  assert not other.training and next(other.parameters()).dtype == dtype
  assert torch.equal(other(tokens()).logits, model(tokens()).logits)
  assert (other.lm_head.stored_weight is other.model.embed_tokens.stored_weight) == tied
  assert PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "model")).vocab_size == tokenizer.vocab_size


def test_a_folder_that_transformers_wrote(tmp_path):
  from transformers import LlamaForCausalLM

  model = quietly(tiny_llama(), CONFIG, lambda m: m(tokens()))
  model.save_pretrained(tmp_path)  # parameters and statistics, no formats
  tb.save(model, tmp_path)
  loaded = LlamaForCausalLM.from_pretrained(str(tmp_path), attn_implementation="eager").eval()
  assert not tb.is_quantized(loaded)
  for other in (tb.restore(loaded, tmp_path), hf.from_pretrained(tmp_path, attn_implementation="eager")):
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_compressed_and_untied_by_calibration(tmp_path):
  model = tiny_llama(tied=True)
  quant_cfg = {**CONFIG["quant_cfg"], "*lm_head.weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 32}}}
  quietly(model, {"quant_cfg": quant_cfg, "algorithm": "gptq"}, lambda m: m(tokens()))
  tb.compress(model, "*proj*")
  hf.save_pretrained(model, tmp_path)
  other = hf.from_pretrained(tmp_path, attn_implementation="eager")
  assert tb.is_compressed(other) and torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_folders_that_lack_something(tmp_path):
  model = quietly(tiny_llama(), CONFIG, lambda m: m(tokens()))
  with pytest.raises(TypeError, match=r"takes a transformers model, got Linear; use save\(model, directory\)"):
    hf.save_pretrained(torch.nn.Linear(2, 2), tmp_path)
  tb.save(model, tmp_path)
  with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
    hf.from_pretrained(tmp_path)
  hf.save_pretrained(model, tmp_path)
  config = tmp_path / "config.json"
  held = json.loads(config.read_text())
  for name in ("AutoConfig", "NoSuchModel", "os"):
    config.write_text(json.dumps(held | {"architectures": [name]}))
    with pytest.raises(ValueError, match=rf"\['{name}'\], which is no model of transformers"):
      hf.from_pretrained(tmp_path)
  config.write_text(json.dumps(held | {"hidden_size": 32}))
  with pytest.raises(ValueError, match="the saved model does not fit"):
    hf.from_pretrained(tmp_path)
