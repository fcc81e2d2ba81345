"""Quantized modules: a subclass of the original class, which keeps its own forward, around quantizers for input, weight and output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_backend import matmul, statistics
from torch_backend.packed import PackedWeight
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import Quantizer, tensor_quantizers
from torch_backend.ste import straight_through


class QuantModule(nn.Module):
  """A module converted in place: its class is a subclass of both this and its former class.

  A subclass makes its quantizers in `_setup`, which runs once, when a module is converted.
  """

  def _setup(self) -> None:
    """Create the quantizers."""


class QuantInput(QuantModule):
  """Quantizes the first argument of forward, and on request the output."""

  input_quantizer: Quantizer
  output_quantizer: Quantizer

  def _setup(self) -> None:
    self.input_quantizer = TensorQuantizer(share_leading=True)
    self.output_quantizer = TensorQuantizer(share_leading=True, enable=False)

  def forward(self, *args: Any, **kwargs: Any) -> Any:
    beside = self._beside(args, kwargs)
    args, kwargs = self._quantized_arguments(args, kwargs)
    output = super().forward(*args, **kwargs)
    return self._quantized_output(output if beside is None else output + beside)

  def _beside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What is added to the output before it is quantized."""
    return None

  def _quantized_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the first one, however it was passed, quantized."""
    if args:
      return (self._quantized_input(args[0]), *args[1:]), kwargs
    if not kwargs:
      return args, kwargs  # the original forward says what is missing
    name = "input" if "input" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: self._quantized_input(kwargs[name])}

  def _quantized_input(self, input: Tensor) -> Tensor:
    return self.input_quantizer(input)

  def _quantized_output(self, output: Any) -> Any:
    # A pooling layer with return_indices gives (values, indices).
    if isinstance(output, tuple):
      return (self.output_quantizer(output[0]), *output[1:])
    return self.output_quantizer(output)


class QuantWeight(QuantInput):
  """Quantizes the weight as well. During a call `self.weight` is the quantized weight, so the original forward runs unchanged.

  In evaluation the quantized weight is kept and reused until the weight, the amax, or the configuration changes. Writing through
  `weight.data` in place is invisible to torch's version counter; a checksum of the weight catches it on the CPU.

  After `compress` there is no parameter "weight": `packed_weight` holds its codes, and every call dequantizes them anew. Loading the state
  of a compressed layer into one of the same configuration that is not compresses it.
  """

  weight_quantizer: Quantizer
  packed_weight: PackedWeight | None
  _weight_in_use: Tensor | None
  _weight_kept: tuple[Any, ...] | None

  def _setup(self) -> None:
    super()._setup()
    self.weight_quantizer = TensorQuantizer()
    self.packed_weight = None
    self._weight_in_use = None
    self._weight_kept = None

  @property
  def weight(self) -> Tensor:
    in_use = self.__dict__.get("_weight_in_use")
    return self.stored_weight if in_use is None else in_use

  @weight.setter
  def weight(self, value: Tensor) -> None:
    self.__dict__["weight"] = value  # weight_norm and its like put a computed tensor where the parameter was

  @property
  def stored_weight(self) -> Tensor:
    """The weight as it is trained and stored; of a compressed one, what its codes stand for."""
    parameters = self.__dict__["_parameters"]
    if "weight" in parameters:
      return parameters["weight"]
    if self.packed_weight is not None:
      return self.stored(self._dequantized(self.packed_weight))
    if "weight" in self.__dict__:
      return self.__dict__["weight"]
    return super().weight  # type: ignore[misc]  # a parametrization's property

  def canonical(self, weight: Tensor) -> Tensor:
    """The weight with its output channels on axis 0 and its input channels on axis 1: what a quantizer's axes refer to."""
    return weight

  def stored(self, weight: Tensor) -> Tensor:
    """The inverse of `canonical`."""
    return weight

  def quantized_weight(self) -> Tensor:
    """The weight after its quantizer, in the stored layout; kept between calls in evaluation.

    Under `torch.compile` it is part of the graph, computed in each call: a graph cannot notice that a kept weight has become stale.
    Fold the weights (`fold_weight`) before compiling a model that is not trained any more.
    """
    if self.packed_weight is not None:
      return self.compute_weight()
    weight = self.stored_weight
    quantizers = tensor_quantizers(self.weight_quantizer)
    gradient = torch.is_grad_enabled() and weight.requires_grad
    if torch.compiler.is_compiling() or self.training or not self.weight_quantizer.is_enabled:
      return self.compute_weight()
    if not all(q.is_quantizing and (q.is_pass_through or not gradient) for q in quantizers):
      return self.compute_weight()
    return straight_through(weight, self._kept_weight(weight))

  def _kept_weight(self, weight: Tensor) -> Tensor:
    key = self._state_of(weight)
    kept = self._weight_kept
    if kept is None or kept[0] != key:
      with torch.no_grad():
        # The alias holds the storage, so that a new weight cannot appear at the same address.
        kept = self._weight_kept = (key, weight.detach(), self.compute_weight().detach())
    return kept[2]

  def drop_kept_weight(self) -> None:
    """Free the quantized weight kept for evaluation."""
    self._weight_kept = None

  def compute_weight(self) -> Tensor:
    """The weight after its quantizer, in the stored layout, computed anew."""
    if self.packed_weight is None:
      return self.stored(self.weight_quantizer(self.canonical(self.stored_weight)))
    weight = self._dequantized(self.packed_weight)
    for quantizer in tensor_quantizers(self.weight_quantizer)[1:]:
      weight = quantizer(weight)
    return self.stored(weight)

  def _dequantized(self, held: PackedWeight) -> Tensor:
    """What the codes of the (first) weight quantizer stand for, [out, in, ...]."""
    return tensor_quantizers(self.weight_quantizer)[0].from_codes(held.packed, held.offset, held.like)

  def _state_of(self, weight: Tensor) -> tuple[Any, ...]:
    quantizers = tuple(q.state_key() for q in tensor_quantizers(self.weight_quantizer))
    return weight.data_ptr(), statistics.version(weight), weight.dtype, weight.shape, statistics.checksum(weight), quantizers

  def forward(self, *args: Any, **kwargs: Any) -> Any:
    held = self.packed_weight
    if (
      held is not None
      and held.matmul is not None
      and all(q.is_enabled and q.is_quantizing for q in tensor_quantizers(self.input_quantizer))
    ):
      beside = self._beside(args, kwargs)
      output = matmul.linear(self, held, args[0] if args else next(iter(kwargs.values())))
      return self._quantized_output(output if beside is None else output + beside)
    object.__setattr__(self, "_weight_in_use", self.quantized_weight())  # not registered as a parameter
    try:
      return super().forward(*args, **kwargs)
    finally:
      object.__setattr__(self, "_weight_in_use", None)

  def _beside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The low-rank branch b (a x) of the scaled, unquantized input, where the weight quantizer has one."""
    first = tensor_quantizers(self.weight_quantizer)[0]
    a, b = first.low_rank_a, first.low_rank_b
    if a is None or b is None:
      return None
    x = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
    x = tensor_quantizers(self.input_quantizer)[0].scaled(x)
    return nn.functional.linear(nn.functional.linear(x, a.to(x.dtype)), b.to(x.dtype))

  def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if f"{prefix}packed_weight.codes" in state_dict and self.packed_weight is None:
      weight, first = self.stored_weight, tensor_quantizers(self.weight_quantizer)[0]
      shape = tuple(self.canonical(weight.detach()).shape)
      self.packed_weight = PackedWeight.empty(state_dict, f"{prefix}packed_weight.", first.spec, shape, weight)
      del self._parameters["weight"]
      first.drop_block_amax()
    super()._load_from_state_dict(state_dict, prefix, *args)

  def train(self, mode: bool = True) -> QuantWeight:
    self._weight_kept = None
    return super().train(mode)

  def _apply(self, fn: Any, recurse: bool = True) -> QuantWeight:
    self._weight_kept = None
    return super()._apply(fn, recurse)


class IdleQuantizer(TensorQuantizer):
  """The input quantizer of a layer whose inputs are no real numbers: it has a name like all others and cannot be switched on."""

  def enable(self) -> None:
    self.disable()


class QuantTable(QuantWeight):
  """An embedding: integer inputs pass, the table and on request the output are quantized.

  `input_quantizer` exists, so that every quantized module answers to the same names, and never does anything.
  """

  def _setup(self) -> None:
    super()._setup()
    self.input_quantizer = IdleQuantizer(enable=False)

  def _quantized_input(self, input: Tensor) -> Tensor:
    return input
