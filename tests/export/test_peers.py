"""What the peers' own code makes of our ModelOpt folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from core.export import packing
from tests.export import quantized as q

CT, MODELOPT = "compressed-tensors", "modelopt"


def bits(tensor: torch.Tensor) -> torch.Tensor:
  return tensor.reshape(-1).contiguous().view(torch.uint8)


def test_the_converter_of_compressed_tensors_agrees(llama: Path, tmp_path: Path) -> None:
  """Its ModelOptNvfp4Converter turns our ModelOpt tensors into exactly our compressed-tensors tensors."""
  from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

  made = q.quantized("torch", llama, "NVFP4_DEFAULT_CFG")
  for layout in (CT, MODELOPT):
    q.exported(made, tmp_path / layout, layout, llama)
  theirs = safetensors.torch.load_file(tmp_path / MODELOPT / "model.safetensors")
  converted = ModelOptNvfp4Converter(targets=["re:.*_proj$"], ignore=["lm_head"]).process(theirs)
  ours = safetensors.torch.load_file(tmp_path / CT / "model.safetensors")
  assert set(converted) == set(ours)
  for name, tensor in ours.items():
    assert torch.equal(bits(tensor), bits(converted[name])), name


@pytest.mark.slow  # importing modelopt takes many seconds
def test_modelopt_packs_and_decodes_alike(llama: Path, tmp_path: Path) -> None:
  from modelopt.torch.export.quant_utils import pack_int4_in_uint8
  from modelopt.torch.quantization.qtensor import NVFP4QTensor

  values = np.random.default_rng(0).integers(-8, 8, (6, 64)).astype(np.int8)
  packed = pack_int4_in_uint8(torch.from_numpy(values).float(), torch.ones(6, 1), 64)
  assert np.array_equal(packed.numpy(), packing.pack_rows(values))
  made = q.quantized("torch", llama, "W4A16_NVFP4_CFG")
  artefact = q.exported(made, tmp_path / "out", MODELOPT, llama)
  tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
  for layer in artefact.layers[:3]:
    weight, scale, second = (tensors[f"{layer}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    decoded = NVFP4QTensor(torch.Size((weight.shape[0], 2 * weight.shape[1])), torch.float32, weight)
    values = decoded.dequantize(scale=scale, double_scale=second, block_sizes={-1: 16})
    assert np.array_equal(values.numpy(), artefact.stored(layer).values())
