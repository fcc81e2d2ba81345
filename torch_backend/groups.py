"""Siblings share their tensor-level scales, as the engines that fuse their weights do. Rules: `core.config.groups`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

import core
from core import formats
from core.config import groups as rules
from torch_backend.modules import QuantWeight
from torch_backend.names import quantizers
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers

ROLES = ("input_quantizer", "weight_quantizer")


def assign(model: nn.Module, group_rules: Iterable[str] | None) -> None:
  """Mark the quantizers of siblings with their group's key. Whether a group shares anything is decided by its formats (`merge`)."""
  modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}
  for quantizer in _all(model):
    quantizer.group = None
  for members in rules.group(modules, group_rules):
    parent = members[0].rpartition(".")[0]
    tails = "|".join(name[len(parent) + 1 :] if parent else name for name in members)
    for name in members:
      for role in ROLES:
        for place, quantizer in enumerate(tensor_quantizers(getattr(modules[name], role))):
          quantizer.group = f"{parent + '.' if parent else ''}({tails}).{role}" + (f".{place}" if place else "")


def shares_scale(quantizer: TensorQuantizer) -> bool:
  """Whether a quantizer has a tensor-level float32 scale that serving engines fuse: static FP8 with one scale, or two-level scales."""
  spec = quantizer.spec
  if not quantizer.is_enabled or quantizer.config.constant_amax is not None or quantizer.tensor_level_amax() is None:
    return False
  one_scale = spec.axis is None and spec.blocks is None and not spec.dynamic
  return spec.two_level or (one_scale and isinstance(spec.element, formats.FloatFormat))


def merge(model: nn.Module) -> None:
  """Give the members of every group the largest of their tensor-level amax, for members of one format."""
  members: dict[tuple[str, core.QuantSpec], list[TensorQuantizer]] = {}
  for quantizer in _all(model):
    quantizer.own_tensor_amax = None
    if quantizer.group is not None and shares_scale(quantizer):
      members.setdefault((quantizer.group, quantizer.spec), []).append(quantizer)
  for siblings in members.values():
    own = [float(q.tensor_level_amax()) for q in siblings]  # type: ignore[arg-type]
    if len(siblings) > 1:
      for quantizer, amax in zip(siblings, own, strict=True):
        quantizer.set_tensor_level_amax(max(own))
        quantizer.own_tensor_amax = amax


@torch.no_grad()
def cost_db(module: QuantWeight, quantizer: TensorQuantizer) -> float | None:
  """What sharing costs one weight, in dB of SQNR; None where the quantizer shares nothing or is no weight's first, or codes are held."""
  first = tensor_quantizers(module.weight_quantizer)[0]
  if quantizer is not first or quantizer.own_tensor_amax is None or quantizer.amax is None or module.packed_weight is not None:
    return None
  weight = module.canonical(module.stored_weight.detach())
  own_amax = quantizer.amax
  own_tensor = torch.tensor(quantizer.own_tensor_amax, device=own_amax.device)
  if quantizer.spec.two_level and not quantizer.spec.dynamic:
    alone = core.fake_quantize(weight, quantizer.spec, own_amax, tensor_amax=own_tensor)
  else:
    alone = core.fake_quantize(weight, quantizer.spec, own_tensor)
  shared = core.fake_quantize(weight, quantizer.spec, own_amax, tensor_amax=None if quantizer.spec.dynamic else quantizer.tensor_amax)
  return float(core.sqnr_db(weight, alone)) - float(core.sqnr_db(weight, shared))


def _all(model: nn.Module) -> Iterable[TensorQuantizer]:
  return (one for quantizer in quantizers(model).values() for one in tensor_quantizers(quantizer))
