"""Siblings share their tensor-level scales, as the engines that fuse their weights do. Rules: `core.config.groups`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

import core
from core import formats
from core.config import groups as rules
from jax_backend import tree
from jax_backend.quantizer import Quantizer, SequentialQuantizer
from jax_backend.tree import Path

ROLES = ("input_quantizer", "weight_quantizer")


def assign(quant: Mapping[str, Any], group_rules: Iterable[str] | None) -> dict[str, Any]:
  """The tree with the quantizers of siblings marked with their group's name. Whether a group shares anything is decided by its formats."""
  with_weight = {".".join(path): path for path, _, q in tree.items(quant) if q.param is not None}
  marks: dict[tuple[Path, str], str] = {}
  for members in rules.group(with_weight, group_rules):
    paths = [with_weight[name] for name in members]
    depth = next(i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
    parent = rules.canonical_name("/".join(paths[0][:depth]))
    tails = "|".join(rules.canonical_name("/".join(path[depth:])) for path in paths)
    for path in paths:
      for role in ROLES:
        marks[path, role] = f"{parent + '.' if parent else ''}({tails}).{role}"

  def mark(path: Path, name: str, quantizer: Any) -> Any:
    group = marks.get((path, name))
    if isinstance(quantizer, SequentialQuantizer):
      return SequentialQuantizer(tuple(q.replace(group=group and f"{group}.{i}") for i, q in enumerate(quantizer.children)))
    return quantizer.replace(group=group)

  return tree.build({(path, name): mark(path, name, q) for path, name, q in tree.items(quant)})


def shares_scale(quantizer: Quantizer) -> bool:
  """Whether a quantizer has a tensor-level float32 scale that serving engines fuse: static FP8 with one scale, or two-level scales."""
  spec = quantizer.config.spec
  if not quantizer.is_enabled or quantizer.config.constant_amax is not None or tensor_level_amax(quantizer) is None:
    return False
  one_scale = spec.axis is None and spec.blocks is None and not spec.dynamic
  return spec.two_level or (one_scale and isinstance(spec.element, formats.FloatFormat))


def tensor_level_amax(quantizer: Quantizer) -> Any:
  """The amax behind the tensor-level scale, stacked axes in front; None without one."""
  return quantizer.tensor_amax if quantizer.config.spec.two_level else quantizer.amax


def with_tensor_level_amax(quantizer: Quantizer, value: Any) -> Quantizer:
  """A copy with another tensor-level amax; block amax stays."""
  if quantizer.config.spec.two_level and not quantizer.config.spec.dynamic:
    return quantizer.with_amax(quantizer.amax, value)
  return quantizer.with_amax(value)


def merge(quant: Mapping[str, Any]) -> dict[str, Any]:
  """The tree in which the members of every group have the largest of their tensor-level amax, for members of one format."""
  members: dict[tuple[str, core.QuantSpec, tuple[int, ...]], list[Any]] = {}
  for _, _, quantizer in tree.items(quant):
    for q in quantizer.leaves:
      if q.group is not None and shares_scale(q):
        members.setdefault(_key(q), []).append(tensor_level_amax(q))
  largest = {}
  for key, values in members.items():
    if len(values) > 1:
      shared = values[0]
      for value in values[1:]:
        shared = jnp.maximum(shared, value)
      largest[key] = shared

  def share(q: Quantizer) -> Quantizer:
    if q.group is None or not shares_scale(q) or _key(q) not in largest:
      return q
    return with_tensor_level_amax(q, largest[_key(q)])

  return tree.build({(path, name): q.map(share) for path, name, q in tree.items(quant)})


def _key(quantizer: Quantizer) -> tuple[str, core.QuantSpec, tuple[int, ...]]:
  assert quantizer.group is not None
  return quantizer.group, quantizer.config.spec, tuple(tensor_level_amax(quantizer).shape)
