"""What a saved model consists of, in neither framework: tensors by torch's dotted names and layout, and what every quantizer is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

import core
from core.config.schema import QuantizerConfig
from core.spec import QuantSpec
from core.state.tensors import Tensor

# What a quantizer does with its input: quantize it; let it pass although it is on; off; off because the tensor holds quantized values.
MODES = ("quantize", "pass", "off", "folded")
FIELDS = ("amax", "tensor_amax", "pre_quant_scale", "bias", "low_rank_a", "low_rank_b")
STATISTICS = FIELDS[:4]  # always float32; the low-rank factors are parameters and may have the model's type
PARTS = ("codes", "scale", "tensor_scale", "zero_point", "offset")
WEIGHT_TYPES = ("F64", "F32", "BF16", "F16")
BACKENDS = ("torch", "jax")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One quantizer; of a sequence, one of its members.

  Attributes:
    config: what it is told.
    mode: one of `MODES`.
    group: key that siblings share, or None.
    tensors: some of `FIELDS`; amax and bias as `core.amax` shapes them for the torch tensor.
    own_tensor_amax: tensor-level amax before siblings shared theirs, or None.
    key: counter of stochastic rounding in torch, two int32, or None.
  """

  config: QuantizerConfig
  mode: str
  group: str | None = None
  tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
  own_tensor_amax: float | None = None
  key: tuple[int, int] | None = None

  @property
  def matters(self) -> bool:
    """Whether a model without this quantizer would compute something else."""
    held = set(self.tensors)
    return self.mode in ("quantize", "pass") or bool(held - {"amax", "tensor_amax", "bias"}) or (self.turns and self.mode != "folded")

  @property
  def turns(self) -> bool:
    return self.config.rotate is not None


@dataclasses.dataclass(frozen=True)
class Packed:
  """A compressed weight: codes and scales in the place of values, as `core.PackedTensor` holds them in torch's layout.

  Attributes:
    spec: format of the codes.
    dtype: type that the weight is dequantized to.
    shape: of the weight, [out, in, ...].
    tensors: some of `PARTS`.
    matmul: name of the arithmetic of the layer's product (`core.matmul`), or None.
  """

  spec: QuantSpec
  dtype: str
  shape: tuple[int, ...]
  tensors: Mapping[str, Tensor]
  matmul: str | None = None

  def describe(self) -> str:
    return f"packed {self.dtype} {list(self.shape)}"

  def load(self) -> tuple[core.PackedTensor, np.ndarray | None]:
    """(codes and scales, offset or None) as numpy arrays with memory of their own."""
    held = {part: np.array(tensor.load(), order="C") for part, tensor in self.tensors.items()}
    four = (held["codes"], held["scale"], held.get("tensor_scale"), held.get("zero_point"))
    return core.PackedTensor(*four, self.spec, self.shape), held.get("offset")

  @classmethod
  def of(cls, packed: core.PackedTensor, offset: np.ndarray | None, dtype: str, matmul: str | None = None) -> Packed:
    """Of numpy arrays."""
    held = dict(zip(PARTS, (*packed[:4], offset), strict=True))
    tensors = {part: Tensor.of(np.asarray(value)) for part, value in held.items() if value is not None}
    return cls(packed.spec, dtype, tuple(packed.shape), tensors, matmul)


@dataclasses.dataclass(frozen=True)
class State:
  """A quantized model.

  Attributes:
    backend: which one saved it.
    tensors: parameters and buffers by name, weights of quantized layers as their quantizers see them: [out, in], OIHW.
    quantizers: name -> one leaf, or the members of a sequence.
    packed: compressed weights by the name that the weight has in a model that is not compressed.
    tied: name of a parameter -> the name under which the very same parameter is in `tensors` or `packed`.
    config: the quantization config as it was given, or None.
    metadata: whatever the caller wanted to keep, of values that JSON can hold.
    versions: package -> version, of whoever saved it.
  """

  backend: str
  tensors: Mapping[str, Tensor]
  quantizers: Mapping[str, tuple[Leaf, ...]]
  packed: Mapping[str, Packed] = dataclasses.field(default_factory=dict)
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: Any = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def tensor_name(quantizer: str, place: int, count: int, field: str) -> str:
  """Name of a quantizer's tensor in the files: "<quantizer>.amax", of a sequence "<quantizer>.1.amax"."""
  return f"{quantizer}.{field}" if count == 1 else f"{quantizer}.{place}.{field}"
