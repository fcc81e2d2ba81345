"""Small torch models for the search, and what is asked of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

import torch_backend as tb
from tests.torch_backend.models import tiny_llama, tokens

FORMATS = ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG"]
INT4 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}, "default": {"enable": False}}, "algorithm": "max"}


class Experts(nn.Module):
  """A router-free mixture: two experts after an attention-like pair of siblings."""

  def __init__(self) -> None:
    super().__init__()
    self.attn = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(32, 32)})
    self.experts = nn.ModuleList(
      nn.ModuleDict({"gate_proj": nn.Linear(32, 48), "up_proj": nn.Linear(32, 48), "down_proj": nn.Linear(48, 32)}) for _ in range(2)
    )
    self.head = nn.Linear(32, 8)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x + torch.tanh(self.attn["q_proj"](x)) * self.attn["k_proj"](x)
    for i, expert in enumerate(self.experts):
      if i < 2:
        x = x + expert["down_proj"](torch.relu(expert["gate_proj"](x)) * expert["up_proj"](x))
    return self.head(x)


def experts(seed: int = 0) -> nn.Module:
  torch.manual_seed(seed)
  return Experts().eval()


def features(count: int = 3, seed: int = 0, width: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
  """(x [4, width], labels [4])."""
  generator = torch.Generator().manual_seed(seed)
  scale = torch.randn(width, generator=generator).exp()
  return [(torch.randn(4, width, generator=generator) * scale, torch.randint(0, 8, (4,), generator=generator)) for _ in range(count)]


def first(model: Any, batch: Any) -> Any:
  return model(batch[0])


def cross_entropy(output: torch.Tensor, batch: Any) -> torch.Tensor:
  return nn.functional.cross_entropy(output, batch[1])


def classify(model: nn.Module, constraints: Any, formats: Any, data: Any = None, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
  """auto_quantize of a copy on `features`, without the warnings of presets for other architectures."""
  given = {"forward_step": first, "loss_func": cross_entropy, **options}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", tb.ConfigWarning)
    return tb.auto_quantize(copy.deepcopy(model), constraints, formats, features() if data is None else data, **given)


def llama_batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
  return [{"input_ids": tokens(i), "labels": tokens(i)} for i in range(count)]


def language(constraints: Any, formats: Any, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
  """auto_quantize of a tiny Llama on its own loss."""
  given = {"loss_func": lambda output, batch: output.loss, **options}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", tb.ConfigWarning)
    return tb.auto_quantize(tiny_llama() if model is None else model, constraints, formats, llama_batches(), **given)


def quantized(model: nn.Module, config: Any, data: Any, step: Any) -> nn.Module:
  """A copy through plain quantize."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", tb.ConfigWarning)
    return tb.quantize(copy.deepcopy(model), config, lambda m: [step(m, batch) for batch in data])
