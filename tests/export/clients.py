"""transformers with compressed-tensors as a client of exported folders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core
import torch_backend


def load(folder: Path, dequantize: bool, dtype: str = "float32") -> Any:
  """The model as transformers loads it: dense floats, or lazily with quantized inputs."""
  import transformers

  config = transformers.CompressedTensorsConfig(dequantize=dequantize)
  kind = getattr(torch, dtype)
  return transformers.AutoModelForCausalLM.from_pretrained(
    str(folder), quantization_config=config, dtype=kind, local_files_only=True
  ).eval()


@torch.no_grad()
def logits(model: Any, ids: np.ndarray) -> np.ndarray:
  return model(torch.from_numpy(ids).long()).logits.float().numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a - b).max())


def weights_alone(model: Any) -> Any:
  """The simulation without its quantized inputs, which is what `dequantize=True` computes."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch_backend.disable_quantizer(model, "*input_quantizer")
  return model


def divided_inputs(model: Any, ids: np.ndarray) -> tuple[np.ndarray, int]:
  """(logits with INT8 inputs quantized as transformers does, by x / scale where we take x * (1 / scale); number of codes that flip)."""
  flips: list[int] = []
  handles = []

  def hook(quantizer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    step = torch.from_numpy(np.array(core.scales(quantizer.amax.numpy(), quantizer.spec).step))
    client = torch.clamp(inputs[0] / step, -128, 127).round() * step
    flips.append(int((client != output).sum()))
    return client

  for name, quantizer in torch_backend.quantizers(model).items():
    if name.endswith("input_quantizer") and quantizer.is_enabled:
      handles.append(quantizer.register_forward_hook(hook))
  found = logits(model, ids)
  for handle in handles:
    handle.remove()
  return found, sum(flips)


def through_bfloat16(stored: Any) -> np.ndarray:
  """An NVFP4 weight as compressed-tensors 0.20 computes it: level * (block scale / global scale), rounded to bfloat16."""
  import ml_dtypes

  from core import encoding, formats

  weight = stored.weight
  block = encoding.decode(weight.scale, formats.E4M3) / np.float32(np.float32(1) / np.float32(weight.tensor_scale))
  levels = encoding.decode(weight.codes.astype(np.int32), formats.E2M1)
  values = levels.reshape(*block.shape, -1) * block[..., None]
  return values.reshape(weight.shape).astype(ml_dtypes.bfloat16).astype(np.float32)
