"""Source: what exporting sees of a quantized model, whichever framework it is in; and the facts of one layer."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple, Protocol

import numpy as np

import core
from core.config.schema import QuantizerConfig
from core.quantize import QuantizedTensor
from core.spec import QuantSpec


class Stage(NamedTuple):
  """One enabled quantizer: what it is told and what calibration found.

  Attributes:
    config: its configuration.
    amax: what `core.amax` shapes, float32, or None where it comes from each tensor.
    tensor_amax: [] float32 of a static two-level format, else None.
  """

  config: QuantizerConfig
  amax: np.ndarray | None = None
  tensor_amax: np.ndarray | None = None

  @property
  def spec(self) -> QuantSpec:
    return self.config.spec


class Source(Protocol):
  """A quantized model. Names are dotted, in torch's spelling; copies that a scan stacks have their index behind: "layers.up_proj[3]"."""

  def weighted(self) -> list[str]:
    """Names of all layers with a weight, quantized or not."""
    ...

  def weight_stages(self, name: str) -> tuple[Stage, ...]:
    """The enabled quantizers of a layer's weight, in order."""
    ...

  def activation_stages(self) -> dict[str, tuple[Stage, ...]]:
    """The enabled quantizers of every activation by the quantizer's name, those with a constant amax included."""
    ...

  def folded(self) -> list[str]:
    """Layers whose weight was replaced by its quantized values, so that there are no codes any more."""
    ...

  def is_table(self, name: str) -> bool:
    """Whether a layer is an embedding."""
    ...

  def is_linear(self, name: str) -> bool:
    """Whether a layer multiplies feature vectors with a weight [N, K] that a checkpoint stores in this very layout."""
    ...

  def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name, as `tensor` returns them; of tensors with several names, the first."""
    ...

  def parameter_types(self) -> dict[str, str]:
    """Their dtypes: F64, F32, F16, BF16."""
    ...

  def parameter(self, name: str) -> np.ndarray | None:
    """A weight for its quantizer: torch's layout, float64 where the model's is, else float32."""
    ...

  def tensor(self, name: str) -> np.ndarray:
    """A tensor in the layout of a checkpoint, float64 where the model's is, else float32."""
    ...

  def stored(self, name: str) -> QuantizedTensor | None:
    """Codes and scales of a compressed weight, else None."""
    ...

  def pre_quant_scale(self, name: str) -> np.ndarray | None:
    """[K] or [] factor on a layer's input, or None."""
    ...

  def low_rank(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(a [r, K], b [N, r]) beside a layer's weight, or None."""
    ...


@dataclasses.dataclass(frozen=True)
class Subject:
  """One quantized layer, without its weight.

  Attributes:
    name: what the source calls it.
    label: what the checkpoint calls it.
    shape: [N, K].
    weights: quantizers of the weight, at least one.
    inputs: quantizers of the input.
    scale: pre_quant_scale, or None.
    low_rank: factors, or None.
    table: whether it is an embedding.
  """

  name: str
  label: str
  shape: tuple[int, ...]
  weights: tuple[Stage, ...]
  inputs: tuple[Stage, ...] = ()
  scale: np.ndarray | None = None
  low_rank: tuple[np.ndarray, np.ndarray] | None = None
  table: bool = False

  @property
  def spec(self) -> QuantSpec:
    return self.weights[0].spec


class Refusal(ValueError):
  """A layout cannot express something. The message completes the sentence "... cannot be exported: "."""


class Granularity(NamedTuple):
  """Which elements share a scale.

  Attributes:
    kind: "tensor", "channel" (weights: one per output; inputs: one per token), "group" (along the last axis), "block" or "other".
    size: (g,) of a group, (rows, columns) of a block.
  """

  kind: str
  size: tuple[int, ...] = ()


def granularity(spec: QuantSpec, rank: int = 2) -> Granularity:
  """Granularity of a tensor's scales.

  Args:
    spec: specification.
    rank: number of axes; an activation [..., K] counts as 2, its leading axes as one.
  """
  if spec.blocks is None:
    if spec.axis is None:
      return Granularity("tensor")
    return Granularity("channel") if [a % rank for a in spec.axis] == [0] else Granularity("other")
  sizes = {axis % rank: size for axis, size in spec.blocks}
  last = rank - 1
  if sizes == {last: None}:
    return Granularity("channel")
  if set(sizes) == {last}:
    return Granularity("group", (int(sizes[last] or 0),))
  if all(size is None for size in sizes.values()):
    return Granularity("tensor") if len(sizes) == rank else Granularity("other")
  if rank == 2 and None not in sizes.values():
    return Granularity("block", (int(sizes[0] or 0), int(sizes[1] or 0)))
  return Granularity("other")


def input_scales(stage: Stage) -> np.ndarray:
  """[] float32: the scale of a static input, or the tensor scale of a two-level one.

  Raises:
    Refusal: it was not calibrated.
  """
  if stage.amax is None:
    raise Refusal("its input has a static scale and was not calibrated; call calibrate with a forward_loop")
  amax = np.asarray(stage.amax, np.float32)
  made = core.scales(amax, stage.spec)
  return np.asarray(made.scale if made.tensor_scale is None else made.tensor_scale, np.float32).reshape(())


def codes_of(source: Source, subject: Subject) -> QuantizedTensor:
  """Codes and scales of a weight after its first quantizer: those it is stored with where it is compressed."""
  held = source.stored(subject.name)
  if held is not None:
    return held
  weight = source.parameter(f"{subject.name}.weight")
  if weight is None:
    raise ValueError(f"{subject.name} has no weight")
  stage = subject.weights[0]
  return core.quantize(weight, stage.spec, stage.amax, tensor_amax=stage.tensor_amax)


_INDEX = re.compile(r"(.*?)\[([\d,]+)\](.*)")
_STACKS = ("layers", "layer", "blocks", "block", "h")


def label(name: str) -> str:
  """The name that a checkpoint has: "model.layers.mlp.up_proj[3].weight" is "model.layers.3.mlp.up_proj.weight".

  Raises:
    Refusal: several stacks, or none of the module names that hold layers.
  """
  found = _INDEX.fullmatch(name)
  if found is None:
    return name
  before, index, after = found.groups()
  parts = before.split(".")
  places = [i for i, part in enumerate(parts) if part in _STACKS]
  if not places or "," in index or "[" in after:
    raise Refusal(f"no checkpoint name is known for the stacked copy {name}; stacks are looked for in {', '.join(_STACKS)}")
  parts.insert(places[0] + 1, index)
  return ".".join(parts) + after


def subjects(source: Source) -> list[Subject]:
  """All layers with a quantized weight, in the order of their checkpoint names.

  Raises:
    ValueError: weights were folded.
  """
  folded = source.folded()
  if folded:
    raise ValueError(
      f"the weights of {few(folded)} were folded (fold_weight), so their codes and scales are gone; export the model before folding it"
    )
  inputs, shapes = source.activation_stages(), source.parameter_shapes()
  found = []
  for name in source.weighted():
    stages = source.weight_stages(name)
    if stages:
      held = source.stored(name)
      shape = shapes[f"{name}.weight"] if held is None else held.shape
      parts = (inputs.get(f"{name}.input_quantizer", ()), source.pre_quant_scale(name), source.low_rank(name), source.is_table(name))
      found.append(Subject(name, label(name), tuple(shape), stages, *parts))
  return sorted(found, key=lambda subject: natural(subject.label))


def check(subject: Subject, source: Source) -> None:
  """What no checkpoint layout can hold.

  Raises:
    Refusal: says what.
  """
  if not (source.is_linear(subject.name) or subject.table):
    raise Refusal(f"a weight of shape {list(subject.shape)} that is no Linear's and no Embedding's cannot be stored quantized")
  for what, stages in (("weight", subject.weights), ("input", subject.inputs)):
    for stage in stages:
      if stage.config.rotate is not None:
        raise Refusal(
          f"its {what} is rotated by its quantizer (rotate={stage.config.rotate.mode!r}); the algorithm 'rotate' folds rotations"
        )
      if stage.config.bias is not None:
        raise Refusal(f"its {what} has an affine bias")
      if stage.spec.rounding != "nearest":
        raise Refusal(f"its {what} is rounded {stage.spec.rounding}ally; codes of a checkpoint must not depend on a key")
  if subject.table and (subject.inputs or subject.scale is not None):
    raise Refusal("it is an embedding with a quantized input")


def natural(name: str) -> list[Any]:
  """Sorting key: numbers inside names by value."""
  return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def few(names: list[str]) -> str:
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
