"""GGUF: what is refused before anything is written, and files that are read with suspicion."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import jax_backend
from core import export as core_export
from core.export import gguf_write
from tests.experiments import tiny
from tests.export import quantized as q
from tests.export.conftest import SIZES
from tests.export.gguf_cases import exported, quantized

# -- refusals ----------------------------------------------------------------------------------------------------------------------


def test_what_gguf_cannot_say_is_refused_before_anything_is_written(bpe: Path, tmp_path: Path) -> None:
  for name, reason in (
    ("BOTH", r"layers.0.mlp.down_proj.* and 11 more: its input is quantized, and a GGUF file says nothing about inputs"),
    ("FLOAT32", "lack only the float16 scale.*layout 'compressed-tensors' can"),
  ):
    with pytest.raises(ValueError, match=reason):
      exported(quantized("torch", bpe, name), tmp_path / "out", bpe)
  with pytest.raises(ValueError, match=r"NVFP4.* is neither Q8_0"):
    exported(q.quantized("torch", bpe, "NVFP4_MLP_WEIGHT_ONLY_CFG"), tmp_path / "out", bpe)
  with pytest.raises(ValueError, match="pre_quant_scale; fold it"):
    exported(q.quantized("torch", bpe, "INT4_AWQ_CFG"), tmp_path / "out", bpe)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"model_type": "mistral"}, "written for model_type 'llama'; config.json says 'mistral'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rotary embedding 'llama3' is not written"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary embedding 'linear' is not written"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"hidden_size": "128"}, "hidden_size is '128'; a positive integer"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; a positive number"),
    ({"num_attention_heads": 8}, r"q_proj.weight has 128 rows; config.json says 8 heads of 32"),
  ],
)
def test_models_that_are_no_plain_llama(bpe: Path, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
  import json

  source = Path(shutil.copytree(bpe, tmp_path / "source"))
  config = json.loads((source / "config.json").read_text())
  (source / "config.json").write_text(json.dumps(config | changes))
  with pytest.raises(ValueError, match=reason):
    exported(quantized("torch", bpe, "Q8_0"), tmp_path / "out", source)
  assert not (tmp_path / "out").exists()


def test_other_refusals(bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  biased = tiny.llama_folder(tmp_path / "biased", **SIZES, attention_bias=True)
  with pytest.raises(ValueError, match=r"no place for model.layers.0.self_attn.k_proj.bias, .* no such tensor"):
    exported(quantized("torch", biased, "Q8_0"), tmp_path / "out", biased)
  made = quantized("jax", bpe, "Q8_0")
  with pytest.raises(ValueError, match=r"needs the model's config.json; give `source`"):
    jax_backend.export(made.module, made.variables, tmp_path / "out", layout="gguf")
  with pytest.raises(ValueError, match="dtype='float32'"):
    exported(made, tmp_path / "out", bpe, dtype="float64")
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ImportError, match=r"needs the package gguf.*\[hf\]"):
    gguf_write.package()
  assert not (tmp_path / "out").exists()


# -- reading with suspicion --------------------------------------------------------------------------------------------------------


def test_damaged_files(bpe: Path, tmp_path: Path) -> None:
  """Every mutation is an error that says what is wrong, or a file with other numbers; never a crash, a hang or much memory."""
  exported(quantized("torch", bpe, "Q8_0"), tmp_path / "out", bpe)
  path = tmp_path / "out" / "model.gguf"
  whole = path.read_bytes()
  header = int(gguf.GGUFReader(path).data_offset)
  rng, errors = random.Random(3), 0
  for turn in range(200):
    data = bytearray(whole)
    if turn % 3 == 0:
      del data[rng.randrange(len(data)) :]
    for _ in range(1 + turn % 4 if turn % 3 else 0):
      data[rng.randrange(header)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    path.write_bytes(data)
    try:
      artefact = core_export.read(tmp_path / "out")
      for layer in artefact.layers:
        artefact.stored(layer)
      for name in artefact.floats:
        artefact.tensor(name)
    except ValueError as error:
      errors += str(path) in str(error) or "not finite" in str(error)
    else:
      errors += len(data) == len(whole)
  assert errors == 200


def test_files_of_others_are_refused(bpe: Path, tmp_path: Path) -> None:
  def write(architecture: str, name: str, kind: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(np.zeros((4, 32), np.float32), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

  write("llama", "blk.0.attn_q.weight", "Q4_0")
  with pytest.raises(ValueError, match=r"'blk.0.attn_q.weight' is of ggml type 2 and shape \[4, 32\]"):
    core_export.read(tmp_path)
  write("llama", "blk.0.ssm.weight", "F32")
  with pytest.raises(ValueError, match=r"'blk.0.ssm.weight' is none of a plain Llama"):
    core_export.read(tmp_path)
  write("bert", "output.weight", "F32")
  with pytest.raises(ValueError, match=r"llama.attention.head_count is None|holds architecture 'bert'"):
    core_export.read(tmp_path)
