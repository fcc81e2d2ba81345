"""Where calibrated state lives on a mesh: beside the axes of the weight that it describes."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jax_backend.layouts import Layout


def like_weight(amax: Any, weight: Any, layout: Layout, stack: int) -> Any:
  """amax with every axis sharded as the weight's axis of the same name is; XLA alone would replicate it.

  Args:
    amax: in torch's axes, stacked axes in front.
    weight: the stored weight with its stacked axes in front; a concrete array on a mesh, or anything else.
    layout: of the weight without the stacked axes.
    stack: number of stacked axes.

  Returns:
    amax, moved where the weight is sharded.
  """
  placed = getattr(weight, "sharding", None)
  if isinstance(weight, Tracer) or not isinstance(placed, NamedSharding) or placed.mesh.size == 1 or amax.ndim <= stack:
    return amax
  names = [*placed.spec, *(None,) * (weight.ndim - len(placed.spec))]
  dims = layout.of(weight.ndim - stack)
  # a torch axis made of several stored ones is sharded as the first of them
  wanted = names[:stack] + [names[stack + group[0]] if group else None for group in dims]
  if amax.ndim != len(wanted):
    return amax
  spec = [name if _divides(amax.shape[i], name, placed.mesh) else None for i, name in enumerate(wanted)]
  return jax.device_put(amax, NamedSharding(placed.mesh, PartitionSpec(*spec)))


def _divides(length: int, name: Any, mesh: Any) -> bool:
  parts = (name,) if isinstance(name, str) else tuple(name or ())
  size = 1
  for part in parts:
    size *= mesh.shape[part]
  return length % size == 0
