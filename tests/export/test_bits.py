"""What is exported is what was simulated: dequantize(export) == fake, bit for bit; and both backends write the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.config import KV_PRESETS, PRESETS
from tests.export import quantized as q

WHOLE = [name for name in PRESETS if name not in KV_PRESETS and name != "NVFP4_EXPERTS_ONLY_CFG"]  # the last has nothing to quantize here
CT, MODELOPT = "compressed-tensors", "modelopt"
# One of every kind of tensor that a layout has.
KINDS = [
  ("INT8_DEFAULT_CFG", CT), ("INT8_WEIGHT_ONLY_CFG", CT), ("FP8_DEFAULT_CFG", CT), ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", CT),
  ("NVFP4_DEFAULT_CFG", CT), ("MXFP4_DEFAULT_CFG", CT), ("MXFP8_DEFAULT_CFG", CT), ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", MODELOPT),
  ("W4A8_AWQ_BETA_CFG", MODELOPT), ("NVFP4_SVDQUANT_DEFAULT_CFG", MODELOPT), ("FP8_PER_CHANNEL_PER_TOKEN_CFG", MODELOPT),
]  # fmt: skip
# These change weights by what they see, so that each backend ends up with weights of its own.
OTHER = ("W4A8_AWQ_BETA_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG")
# What each layout has no place for, and why; every other preset is exported.
REFUSED = {
  CT: {
    "INT8_SMOOTHQUANT_CFG": "pre_quant_scale",
    "INT4_AWQ_CFG": "pre_quant_scale",
    "NVFP4_AWQ_LITE_CFG": "pre_quant_scale",
    "NVFP4_AWQ_FULL_CFG": "pre_quant_scale",
    "NVFP4_SVDQUANT_DEFAULT_CFG": "pre_quant_scale",
    "W4A8_AWQ_BETA_CFG": "pre_quant_scale",
    "MXFP6_DEFAULT_CFG": "MXFP6-E3M2",
    "MXINT8_DEFAULT_CFG": "MXINT8",
    "W4A8_MXFP4_FP8_CFG": "not calibrated",
    "W4A8_NVFP4_FP8_CFG": "blocks of 16",
    "NVFP4_MLP_WEIGHT_ONLY_CFG": "blocks of 16",
    "NVFP4_FP8_MHA_CONFIG": r"no place for the quantizers .*q_bmm_quantizer",
  },
  MODELOPT: {
    "MXFP6_DEFAULT_CFG": "MXFP6-E3M2",
    "MXINT8_DEFAULT_CFG": "MXINT8",
    "W4A8_MXFP4_FP8_CFG": "not calibrated",
    "NVFP4_MLP_WEIGHT_ONLY_CFG": "NVFP4 block 32",
    "NVFP4_FP8_MHA_CONFIG": "embedding",
  },
}


def check_preset(
  backend: str, folder: Path, out: Path, name: str, dtype: str = "float32", layouts: tuple[str, ...] = (CT, MODELOPT)
) -> int:
  made, count = q.quantized(backend, folder, name, dtype), 0
  for layout in layouts:
    reason = REFUSED[layout].get(name)
    if reason is None:
      count += q.compared(made, q.exported(made, out / layout, layout, folder))
      continue
    with pytest.raises(ValueError, match=reason):
      q.exported(made, out / layout, layout, folder)
    assert not (out / layout).exists()
  return count


@pytest.mark.parametrize("name", WHOLE)
def test_export_is_simulation(llama: Path, tmp_path: Path, name: str) -> None:
  expressible = sum(name not in REFUSED[layout] for layout in (CT, MODELOPT))
  assert check_preset("torch", llama, tmp_path, name) >= expressible * 196_608


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "layout"), KINDS)
def test_narrow_models(llama: Path, tmp_path: Path, name: str, layout: str, dtype: str) -> None:
  assert check_preset("torch", llama, tmp_path, name, dtype, (layout,)) == 294_912


@pytest.mark.parametrize("name", [name for name in q.OWN])
def test_further_formats(llama: Path, tmp_path: Path, name: str) -> None:
  made = q.quantized("torch", llama, name)
  assert q.compared(made, q.exported(made, tmp_path / "out", CT, llama)) >= 262_144


@pytest.mark.parametrize(
  ("name", "layout"),
  [pytest.param(*kind, marks=() if i in (4, 7) else pytest.mark.slow) for i, kind in enumerate(KINDS) if kind[0] not in OTHER],
)
def test_backends_write_the_same_bytes(llama: Path, tmp_path: Path, name: str, layout: str) -> None:
  """With the amax of one backend in the other: the activations behind them come out of matmuls, which round differently."""
  torch_made, jax_made = q.quantized("torch", llama, name), q.quantized("jax", llama, name)
  jax_made.adopt(torch_made.leaves())
  for made in (torch_made, jax_made):
    q.exported(made, tmp_path / made.backend, layout, llama)
  assert q.compared(jax_made, q.core_export.read(tmp_path / "jax")) == 294_912
  names = sorted(path.name for path in (tmp_path / "torch").iterdir())
  assert names == sorted(path.name for path in (tmp_path / "jax").iterdir())
  for file in names:
    assert (tmp_path / "torch" / file).read_bytes() == (tmp_path / "jax" / file).read_bytes(), file


@pytest.mark.parametrize(("name", "algorithm"), [("MXFP4_FP8", "W4A8_MXFP4_FP8"), ("NVFP4_FP8", "W4A8_NVFP4_FP8"), ("INT8_TENSOR", "")])
def test_further_formats_of_modelopt(llama: Path, tmp_path: Path, name: str, algorithm: str) -> None:
  made = q.quantized("torch", llama, name)
  if not algorithm:
    with pytest.raises(ValueError, match="have no name in this layout"):
      q.exported(made, tmp_path / "out", MODELOPT, llama)
    return
  artefact = q.exported(made, tmp_path / "out", MODELOPT, llama)
  assert q.compared(made, artefact) == 294_912 and artefact.settings["quantization"]["quant_algo"] == algorithm
  layer = artefact.layers[0]
  amax = made.model.get_submodule(layer).input_quantizer.amax.numpy()
  assert artefact.stored(layer).input_scale == amax / np.float32(448)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_preset_in_jax(llama: Path, tmp_path: Path, name: str, dtype: str) -> None:
  check_preset("jax", llama, tmp_path, name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_preset_in_narrow_torch(llama: Path, tmp_path: Path, name: str, dtype: str) -> None:
  check_preset("torch", llama, tmp_path, name, dtype)
