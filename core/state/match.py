"""Whether a saved model fits the model that is to take it: both sides' names, shapes and types are compared before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from core import blocks
from core.state.model import STATISTICS, Leaf, State
from core.state.tensors import Tensor

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (type, shape)."""
# torch counts the batches that a norm has seen, Flax does not; neither computes with the number while momentum is given.
OPTIONAL = (".num_batches_tracked",)
SHOWN = 6


def check_tensors(state: State, model: Shapes, adopt_dtype: bool) -> dict[str, Tensor]:
  """The tensor for every name of the model that gets one.

  Args:
    state: what was saved.
    model: what the model has.
    adopt_dtype: other types are no error.

  Raises:
    ValueError: missing or extra names, other shapes or types; names all of them, the first few in full.
  """
  saved = {**state.tensors, **{name: state.tensors[other] for name, other in state.tied.items()}}
  tied = set(state.tied) | set(state.tied.values())
  missing = [name for name in model if name not in saved and not name.endswith(OPTIONAL)]
  # One of several names of a shared parameter is enough: a Flax model has no name for a head that uses the table itself.
  held = {state.tied.get(name, name) for name in model if name in tied}
  extra = [n for n in saved if n not in model and not n.endswith(OPTIONAL) and not (n in tied and state.tied.get(n, n) in held)]
  both = [name for name in model if name in saved]
  shapes = [f"{n} (saved {list(saved[n].shape)}, model {list(model[n][1])})" for n in both if saved[n].shape != model[n][1]]
  types = [f"{n} (saved {saved[n].dtype}, model {model[n][0]})" for n in both if saved[n].dtype != model[n][0]]
  problems = [
    *_listed(missing, "the state lacks", "of the model's tensors"),
    *_listed(extra, "the state holds", "tensors that the model has not"),
    *_listed(shapes, "the state has", "tensors of another shape"),
    *([] if adopt_dtype else _listed(types, "the state has", "tensors of another type (adopt_dtype=True takes the saved type)")),
  ]
  if problems:
    raise ValueError(f"the saved model does not fit: {'; '.join(problems)}")
  return {name: saved[name] for name in both}


def _listed(names: Sequence[str], before: str, after: str) -> list[str]:
  if not names:
    return []
  more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return [f"{before} {len(names)} {after}: {', '.join(names[:SHOWN])}{more}"]


def check_quantizers(state: State, names: Iterable[str]) -> None:
  """Raises:
  ValueError: quantizers that do something are in the state and not in the model; names them.
  """
  known = set(names)
  absent = [name for name, leaves in state.quantizers.items() if name not in known and any(leaf.matters for leaf in leaves)]
  if absent:
    raise ValueError(f"the saved model does not fit: {_listed(absent, 'the state holds', 'quantizers that the model has not')[0]}")


def check_leaf(name: str, leaf: Leaf, shape: tuple[int, ...] | None) -> None:
  """Checks a quantizer's tensors against its configuration and, of a weight, against the weight.

  Args:
    name: of the quantizer.
    leaf: what was saved.
    shape: of the weight in torch's layout; None for an activation.

  Raises:
    ValueError: a shape, type or value that cannot be.
  """
  for field, tensor in leaf.tensors.items():
    try:
      if field in STATISTICS and not np.isfinite(tensor.float32()).all():
        raise ValueError("it holds NaN or infinity")
      expected = expected_shape(field, leaf, shape)
      if expected is not None and tensor.shape != expected:
        raise ValueError(f"its shape is {list(tensor.shape)}; for a weight of shape {list(shape or ())} it must be {list(expected)}")
    except ValueError as error:
      raise ValueError(f"{field} of quantizer {name!r} ({leaf.config.describe()}): {error}") from error
  if len({"low_rank_a", "low_rank_b"} & set(leaf.tensors)) == 1:
    raise ValueError(f"quantizer {name!r} has one of low_rank_a and low_rank_b; both or none are needed")


def expected_shape(field: str, leaf: Leaf, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
  """The shape that a tensor of a quantizer must have; None where that depends on what is not known here."""
  spec = leaf.config.spec
  if field == "tensor_amax":
    return ()
  if shape is None:
    return None
  if field == "amax":
    if leaf.config.constant_amax is not None or (spec.two_level and spec.dynamic):
      return ()
    scales = blocks.tiling(shape, spec).scales
    return (2, *scales) if spec.zero_point else scales
  rank = leaf.tensors["low_rank_a"].shape[:1] if "low_rank_a" in leaf.tensors else ()
  columns = tuple(shape[1:2])
  return {"low_rank_a": (*rank, *columns), "low_rank_b": (shape[0], *rank)}.get(field) if len(shape) == 2 else None
