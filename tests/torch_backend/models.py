"""Small models for the torch tests."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import torch_backend as tb

WHOLE_PRESETS = [name for name in sorted(tb.choices) if "_KV_" not in name]


def tiny_llama(seed: int = 0, tied: bool = False) -> nn.Module:
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(seed)
  config = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, tie_word_embeddings=tied, attn_implementation="eager",
  )  # fmt: skip
  return LlamaForCausalLM(config).eval()


def tokens(seed: int = 0, batch: int = 2, length: int = 16) -> torch.Tensor:
  return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


class TinyCNN(nn.Module):
  """Convolutions, norms, pooling and, so that every preset finds something, parts named mlp and experts."""

  def __init__(self) -> None:
    super().__init__()
    self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
    self.bn = nn.BatchNorm2d(8)
    self.act = nn.LeakyReLU()
    self.pool = nn.MaxPool2d(2)
    self.conv2 = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
    self.avg = nn.AdaptiveAvgPool2d(2)
    self.norm = nn.LayerNorm(32)
    self.mlp = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 24))
    self.moe = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(24, 10)])})

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.pool(self.act(self.bn(self.conv1(x))))
    x = self.avg(self.up(self.conv2(x))).flatten(1)
    return self.moe["experts"][0](self.mlp(self.norm(x)))


def tiny_cnn(seed: int = 0) -> nn.Module:
  torch.manual_seed(seed)
  return TinyCNN().eval()


def images(seed: int = 0, batch: int = 3) -> torch.Tensor:
  return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int = 0) -> nn.Module:
  torch.manual_seed(seed)
  return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


def quietly(model: nn.Module, config, forward_loop=None, **kwargs) -> nn.Module:
  """quantize without the warnings of presets for other architectures."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", tb.ConfigWarning)
    return tb.quantize(model, config, forward_loop, **kwargs)
