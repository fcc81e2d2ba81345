"""transformers loads what is exported: the dense weights are the simulated ones, and where it quantizes inputs, the whole model is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.config import PRESETS
from tests.export import clients
from tests.export import quantized as q

CT = "compressed-tensors"
DENSE = (
  "INT8_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG", "INT8_DYNAMIC", "INT8_TENSOR", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_ASYMMETRIC",
  "INT4_FLOAT16",
  "FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_GROUPS", "MXFP4_DEFAULT_CFG",
  "MXFP8_DEFAULT_CFG", "MXFP6_E2M3", "MXFP4_FP8",
)  # fmt: skip
# transformers quantizes these inputs as we do; it runs NVFP4 and MX lazily in bfloat16 only, and asymmetric weights not at all
LAZY = (
  "INT8_WEIGHT_ONLY_CFG",
  "INT8_DEFAULT_CFG",
  "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
  "FP8_DEFAULT_CFG",
  "FP8_PER_CHANNEL_PER_TOKEN_CFG",
  "MIXED",
)


@pytest.mark.parametrize("name", DENSE)
def test_dense(llama: Path, tmp_path: Path, name: str) -> None:
  made = q.quantized("torch", llama, name)
  q.exported(made, tmp_path / "out", CT, llama)
  wanted = clients.logits(clients.weights_alone(made.model), q.IDS)
  assert np.array_equal(clients.logits(clients.load(tmp_path / "out", dequantize=True), q.IDS), wanted)


def test_awq_with_folded_scales(llama: Path, tmp_path: Path) -> None:
  """The scale of o_proj cannot be folded where two heads share keys and values, so that layer is left out."""
  awq = {"method": "awq_lite", "shared": True, "include": ["*[qkv]_proj", "*mlp*"]}
  q.OWN["FOLDED_AWQ"] = {**PRESETS["INT4_AWQ_CFG"].copy(), "algorithm": [awq, "fold_pre_quant_scale"]}
  made = q.quantized("torch", llama, "FOLDED_AWQ")
  assert q.compared(made, q.exported(made, tmp_path / "out", CT, llama)) == 294_912
  assert np.array_equal(clients.logits(clients.load(tmp_path / "out", dequantize=True), q.IDS), made(q.IDS))


@pytest.mark.parametrize("name", LAZY)
def test_lazy(llama: Path, tmp_path: Path, name: str) -> None:
  made = q.quantized("torch", llama, name)
  q.exported(made, tmp_path / "out", CT, llama)
  assert np.array_equal(clients.logits(clients.load(tmp_path / "out", dequantize=False), q.IDS), made(q.IDS))


@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "NVFP4_FOUR_OVER_SIX_CFG"])
def test_nvfp4_goes_through_bfloat16(llama: Path, tmp_path: Path, name: str) -> None:
  """The client's weights are ours in its own arithmetic, and one rounding to bfloat16 away from the simulated ones."""
  made = q.quantized("torch", llama, name)
  artefact = q.exported(made, tmp_path / "out", CT, llama)
  client = clients.load(tmp_path / "out", dequantize=True)
  for layer in artefact.layers:
    got = client.get_submodule(layer).weight.detach().numpy()
    stored = artefact.stored(layer)
    assert np.array_equal(got, clients.through_bfloat16(stored))
    exact = stored.values()
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact)).all()  # half an ulp of bfloat16


def test_exponent_faults_are_seen(llama: Path, tmp_path: Path) -> None:
  """The comparison can fail: with one scale doubled in the file the client's logits are others."""
  made = q.quantized("torch", llama, "INT8_WEIGHT_ONLY_CFG")
  artefact = q.exported(made, tmp_path / "out", CT, llama)
  layer = artefact.layers[0]
  file = tmp_path / "out" / "model.safetensors"
  content = bytearray(file.read_bytes())
  scale = artefact.stored(layer).weight.scale[0, 0].tobytes()
  place = bytes(content).index(scale)
  content[place : place + 4] = (np.frombuffer(scale, np.float32) * 2).tobytes()
  file.write_bytes(bytes(content))
  client = clients.logits(clients.load(tmp_path / "out", dequantize=True), q.IDS)
  assert not np.array_equal(client, made(q.IDS))


def test_bfloat16_model_loads(llama: Path, tmp_path: Path) -> None:
  """Scales stay float32 in the file; the client casts them to the model's type, so its weights are near, not equal."""
  made = q.quantized("torch", llama, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "bfloat16")
  artefact = q.exported(made, tmp_path / "out", CT, llama)
  layer = artefact.layers[0]
  assert artefact.dtype(f"{layer}.weight_scale") == "F32" and artefact.dtype("model.norm.weight") == "BF16"
  client = clients.load(tmp_path / "out", dequantize=True, dtype="bfloat16")
  got = client.get_submodule(layer).weight.detach().float().numpy()
  exact = artefact.stored(layer).values()
  assert (np.abs(got - exact) <= 2.0**-7 * np.abs(exact)).all()  # the scale and the product, each half an ulp of bfloat16


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_tied_head(tied_llama: Path, tmp_path: Path, backend: str) -> None:
  """It has no tensor of its own, and clients are told that it is not quantized."""
  made = q.quantized(backend, tied_llama, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
  artefact = q.exported(made, tmp_path / "out", CT, tied_llama)
  assert artefact.settings["ignore"] == ["lm_head"] and len(artefact.layers) == 14 and "lm_head.weight" not in artefact.floats
  client = clients.logits(clients.load(tmp_path / "out", dequantize=True), q.IDS)
  if backend == "torch":
    assert np.array_equal(client, made(q.IDS))
  else:  # another framework's matmuls: float32, 128 products of about 1
    assert np.abs(client - made(q.IDS)).max() < 1e-4
