"""Folders: complete or absent, sharded, with everything that clients ask for; and read back with suspicion."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torch_backend
from core import export as core_export
from core.config import ConfigWarning
from core.export.folder import shard_size
from core.export.plan import Item
from core.export.safetensors_file import File
from experiments import models
from tests.calibrate import twins
from tests.export import clients
from tests.export import quantized as q

CT = "compressed-tensors"


@pytest.fixture(scope="module")
def made(llama: Path) -> Any:
  return q.quantized("torch", llama, "NVFP4_DEFAULT_CFG")


@pytest.fixture(scope="module")
def folder(llama: Path, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
  out = tmp_path_factory.mktemp("nvfp4") / "out"
  q.exported(made, out, CT, llama, card={"title": "Small", "metrics": {"perplexity": 3.25}, "recipe": {"config": "NVFP4_DEFAULT_CFG"}})
  return out


def test_content(folder: Path) -> None:
  assert sorted(path.name for path in folder.iterdir()) == [
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
  ]  # fmt: skip
  config = json.loads((folder / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
  group = config["quantization_config"]["config_groups"]["group_0"]
  assert group["input_activations"]["dynamic"] == "local" and group["weights"]["scale_dtype"] == "torch.float8_e4m3fn"
  card = (folder / "README.md").read_text()
  assert "# Small" in card and "| perplexity | 3.25 |" in card and "- config: NVFP4_DEFAULT_CFG" in card and "bfloat16" in card


def test_the_peers_read_the_configuration(folder: Path) -> None:
  from compressed_tensors.quantization import QuantizationConfig

  settings = json.loads((folder / "config.json").read_text())["quantization_config"]
  read = QuantizationConfig.model_validate(settings)
  assert read.config_groups["group_0"].weights.group_size == 16 and read.ignore == ["lm_head"]


def test_shards(folder: Path, llama: Path, made: Any, tmp_path: Path) -> None:
  whole, parts = core_export.read(folder), q.exported(made, tmp_path / "out", CT, llama, max_shard_size="60KB")
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
  assert all(file.stat().st_size < 75_000 for file in files)  # 60 kB of tensors, or the table alone; and a header
  assert parts.layers == whole.layers and parts.floats == whole.floats
  assert q.compared(made, parts) == 294_912
  assert np.array_equal(clients.logits(clients.load(folder, True), q.IDS), clients.logits(clients.load(tmp_path / "out", True), q.IDS))


@pytest.mark.parametrize(("text", "size"), [(7, 7), ("12", 12), ("5GB", 5 * 10**9), ("10 mb", 10**7)])
def test_shard_size(text: Any, size: int) -> None:
  assert shard_size(text) == size


@pytest.mark.parametrize("text", [0, -1, "5TB", "", True, "1e9"])
def test_no_shard_size(text: Any) -> None:
  with pytest.raises(ValueError, match="max_shard_size is"):
    shard_size(text)


def test_nothing_is_left_of_a_failure(llama: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  calls = []

  def fail(item: Item) -> Any:
    calls.append(item)
    raise OSError("disk full")

  from core.export import folder as module

  (tmp_path / "out").mkdir()
  monkeypatch.setattr(module, "write_tensors", lambda *_: fail(None))  # type: ignore[arg-type]
  with pytest.raises(OSError, match="disk full"):
    q.exported(made, tmp_path / "out", CT, llama, overwrite=True)
  assert calls and [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())


def test_a_folder_is_not_overwritten_by_accident(llama: Path, made: Any, tmp_path: Path) -> None:
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine.txt").write_text("x")
  with pytest.raises(FileExistsError, match="not empty"):
    q.exported(made, tmp_path / "out", CT, llama)
  q.exported(made, tmp_path / "out", CT, llama, overwrite=True)
  assert not (tmp_path / "out" / "mine.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_own_config_and_tokenizer(llama: Path, tmp_path: Path) -> None:
  """Without `source` a transformers model brings its own config; a tokenizer may be given."""
  made = q.quantized("torch", llama, "INT8_WEIGHT_ONLY_CFG")
  torch_backend.export(made.model, tmp_path / "out", tokenizer=models.load_tokenizer(llama), dtype="bfloat16")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["dtype"] == "bfloat16" and config["model_type"] == "llama" and (tmp_path / "out" / "tokenizer.json").exists()
  assert core_export.read(tmp_path / "out").dtype("model.norm.weight") == "BF16"
  assert clients.load(tmp_path / "out", True, "bfloat16").config.num_hidden_layers == 2


def test_a_model_without_config(tmp_path: Path) -> None:
  made = twins.Torch().quantize("max", twins.FORMATS["int4"])
  with pytest.warns(ConfigWarning, match="give `source`"):
    torch_backend.export(made.model, tmp_path / "out")
  other = twins.Jax().quantize("max", twins.FORMATS["int4"])
  import jax_backend

  with pytest.warns(ConfigWarning, match="give `source`"):
    jax_backend.export(other.module, other.variables, tmp_path / "jax")
  assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "jax" / "model.safetensors").read_bytes()


def test_tied_head_with_quantization_of_its_own(tied_llama: Path, tmp_path: Path) -> None:
  model = models.load_torch(tied_llama)[0]
  assert model.lm_head.weight is model.model.embed_tokens.weight
  rules = {"default": {"enable": False}, "*lm_head*weight_quantizer": {"num_bits": 8, "axis": 0}}
  torch_backend.quantize(model, {"quant_cfg": rules, "algorithm": "max"})
  torch_backend.export(model, tmp_path / "out", source=tied_llama)
  artefact = core_export.read(tmp_path / "out")
  assert artefact.layers == ["lm_head"] and artefact.config["tie_word_embeddings"] is False
  with torch.no_grad():
    wanted = model(torch.from_numpy(q.IDS).long()).logits.numpy()
  assert np.array_equal(clients.logits(clients.load(tmp_path / "out", True), q.IDS), wanted)


# -- reading -----------------------------------------------------------------------------------------------------------------------


def edited(folder: Path, out: Path, change: Any) -> Path:
  shutil.copytree(folder, out)
  path = out / "config.json"
  config = json.loads(path.read_text())
  change(config["quantization_config"])
  path.write_text(json.dumps(config))
  return out


def every(directory: Path) -> None:
  artefact = core_export.read(directory)
  for layer in artefact.layers:
    artefact.stored(layer).values()
  for name in artefact.floats:
    artefact.tensor(name)


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (lambda c: c.update(quant_method="gptq"), "quant_method is 'gptq'"),
    (lambda c: c.pop("config_groups"), "config_groups"),
    (lambda c: c.update(config_groups={}), "belongs to no config group"),
    (lambda c: c.update(config_groups=[1]), "must be an object"),
    (lambda c: c.update(ignore=["re:.*q_proj"]), "ignored"),
    (lambda c: c.update(ignore=["re:("]), "no pattern"),
    (lambda c: c["config_groups"]["group_0"].update(weights=None), "are needed|is needed"),
    (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=32), "group_size 32"),
    (lambda c: c["config_groups"]["group_0"].update(format="pack-quantized"), "not understood|no tensor"),
    (lambda c: c["config_groups"]["group_0"].update(format="mxfp4-pack-quantized"), "group_size"),
  ],
)
def test_configurations_that_do_not_fit(folder: Path, tmp_path: Path, change: Any, reason: str) -> None:
  with pytest.raises(ValueError, match=reason):
    every(edited(folder, tmp_path / "out", change))


def test_scales_are_checked_against_each_other(folder: Path, tmp_path: Path) -> None:
  """A global scale that is not inverted is found by the exact scale beside it."""
  shutil.copytree(folder, tmp_path / "out")
  path = tmp_path / "out" / "model.safetensors"
  layer = core_export.read(folder).layers[0]
  stored = core_export.read(folder).stored(layer).weight.tensor_scale
  content = path.read_bytes()
  reciprocal = (np.float32(1) / np.float32(stored)).tobytes()
  assert content.count(reciprocal) >= 1
  path.write_bytes(content.replace(reciprocal, np.float32(stored).tobytes()))
  with pytest.raises(ValueError, match="reciprocal of the scale in the metadata"):
    every(tmp_path / "out")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "..\\x.safetensors"])
def test_an_index_stays_in_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
  shutil.copytree(folder, tmp_path / "out")
  tensors = File(folder / "model.safetensors").entries
  (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
  with pytest.raises(ValueError, match="only names of safetensors files"):
    core_export.read(tmp_path / "out")


def test_an_index_and_its_files_agree(folder: Path, tmp_path: Path) -> None:
  shutil.copytree(folder, tmp_path / "out")
  index = tmp_path / "out" / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
  with pytest.raises(ValueError, match="disagree about the tensors"):
    core_export.read(tmp_path / "out")
  index.write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))
  with pytest.raises(FileNotFoundError, match=r"other\.safetensors is not there"):
    core_export.read(tmp_path / "out")


@pytest.fixture(scope="module")
def peers_folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  out = tmp_path_factory.mktemp("w4a8") / "out"
  q.exported(q.quantized("torch", llama, "W4A8_AWQ_BETA_CFG"), out, "modelopt", llama)
  return out


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"quantization": None}, "is needed"), ({"quantization": {}}, "quant_algo"), ({"quantization": {"quant_algo": "X"}}, "'X' is unknown"),
    ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "group_size is 0"), ({"quantization": {"quant_algo": "W8A16"}}, "does not fit W8A16"),
    ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, "scales of NVFP4 were expected"),
    ({"quantization": {"quant_algo": "MIXED_PRECISION"}}, "quantized_layers of"),
    ({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": []}}, "quantized_layers of"),
    ({"quantization": {"quant_algo": "W4A8_AWQ", "group_size": 64}}, "scales of W4A8_AWQ were expected"),
    ({"quantization": {"quant_algo": ["W4A8_AWQ"]}}, "is unknown"),
    ({"quantization": {"quant_algo": "W4A8_AWQ", "group_size": 128, "exclude_modules": ["model.layers.0.mlp.up_proj"]}}, "exclude_modules"),
  ],
)  # fmt: skip
def test_configurations_of_modelopt_that_do_not_fit(peers_folder: Path, tmp_path: Path, change: Any, reason: str) -> None:
  shutil.copytree(peers_folder, tmp_path / "out")
  every(tmp_path / "out")
  (tmp_path / "out" / "hf_quant_config.json").write_text(json.dumps(change))
  with pytest.raises(ValueError, match=reason):
    every(tmp_path / "out")


def test_random_damage(folder: Path, tmp_path: Path) -> None:
  """A bit of a configuration or a header flipped: an error that is no crash, or a folder that still fits together."""
  shutil.copytree(folder, tmp_path / "out")
  rng, refused = random.Random(1), 0
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    for _ in range(100):
      name = rng.choice(["config.json", "model.safetensors"])
      content = bytearray((folder / name).read_bytes())
      place = rng.randrange(8 + int.from_bytes(content[:8], "little") if name != "config.json" else len(content))
      content[place] ^= 1 << rng.randrange(8)
      (tmp_path / "out" / name).write_bytes(bytes(content))
      try:
        every(tmp_path / "out")
      except (ValueError, FileNotFoundError):
        refused += 1
      shutil.copyfile(folder / name, tmp_path / "out" / name)
  assert refused > 50
