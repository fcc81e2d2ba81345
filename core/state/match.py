"""Whether a saved model fits the model that is to take it: both sides' names, shapes and types are compared before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from core import blocks, packed
from core.state.model import STATISTICS, Leaf, Packed, State
from core.state.tensors import Tensor

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (type, shape)."""
# torch counts the batches that a norm has seen, Flax does not; neither computes with the number while momentum is given.
OPTIONAL = (".num_batches_tracked",)
SHOWN = 6


def check_tensors(state: State, model: Shapes, adopt_dtype: bool, packable: Iterable[str]) -> dict[str, Tensor | Packed]:
  """The tensor for every name of the model that gets one.

  Args:
    state: what was saved.
    model: what the model has.
    adopt_dtype: other types are no error.
    packable: names of the weights that a quantizer belongs to.

  Raises:
    ValueError: missing or extra names, other shapes or types; names all of them, the first few in full.
  """
  saved: dict[str, Tensor | Packed] = {**state.tensors, **state.packed}
  saved |= {name: saved[other] for name, other in state.tied.items()}
  tied = set(state.tied) | set(state.tied.values())
  missing = [name for name in model if name not in saved and not name.endswith(OPTIONAL)]
  # One of several names of a shared parameter is enough: a Flax model has no name for a head that uses the table itself.
  held = {state.tied.get(name, name) for name in model if name in tied}
  extra = [n for n in saved if n not in model and not n.endswith(OPTIONAL) and not (n in tied and state.tied.get(n, n) in held)]
  both = [name for name in model if name in saved]
  shapes = [f"{n} (saved {list(saved[n].shape)}, model {list(model[n][1])})" for n in both if saved[n].shape != model[n][1]]
  types = [f"{n} (saved {saved[n].dtype}, model {model[n][0]})" for n in both if saved[n].dtype != model[n][0]]
  able = set(packable)
  floats = [name for name in both if isinstance(saved[name], Packed) and name not in able]
  for name, weight in state.packed.items():
    check_packed(name, weight)
  problems = [
    *_listed(floats, "the state has", "compressed weights of what is no quantized layer in the model"),
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


def check_packed(name: str, weight: Packed) -> None:
  """Checks shapes and types of a compressed weight's tensors.

  Raises:
    ValueError: they are not those of its format and shape.
  """
  spec = weight.spec
  scales = blocks.tiling(weight.shape, spec).scales
  second: tuple[int, ...] | None = () if spec.two_level else None
  if spec.scale_block is not None:
    second = (*scales[:-1], -(-scales[-1] // min(spec.scale_block, scales[-1]))) if scales and scales[-1] else scales
  expected = {"codes": packed.packed_shape(spec, weight.shape), "scale": scales, "tensor_scale": second}
  expected["zero_point"] = packed.packed_zero_points(spec, weight.shape)
  types = {"codes": ("U8",), "scale": ("F32",) if spec.scale_format is None else ("F32", "F16", "U8"), "tensor_scale": ("F32",)}
  types |= {"zero_point": ("U8",), "offset": ("F32",)}
  for part, shape in expected.items():
    found = weight.tensors[part].shape if part in weight.tensors else None
    if found != shape:
      raise ValueError(f"packed weight {name!r} ({spec.element.name}, {list(weight.shape)}): {part} has shape {found}, needed is {shape}")
  for part, tensor in weight.tensors.items():
    if tensor.dtype not in types[part]:
      raise ValueError(f"packed weight {name!r}: {part} is {tensor.dtype}; allowed is {' or '.join(types[part])}")
  offset = weight.tensors.get("offset")
  fits = offset is None or (len(offset.shape) <= len(weight.shape) and _broadcasts(offset.shape, weight.shape))
  if not fits:
    raise ValueError(f"packed weight {name!r}: offset has shape {list(offset.shape)}, the weight {list(weight.shape)}")  # type: ignore[union-attr]


def _broadcasts(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
  return all(n in (1, m) for n, m in zip(reversed(shape), reversed(onto), strict=False))


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
