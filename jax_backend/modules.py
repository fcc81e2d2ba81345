"""Which linen modules are quantized, which of their parameters are weights, and how their tensors lie in memory.

A `ModuleKind` is data: it is read when quantizers are created, and the resulting layouts are kept in the quantizers themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from jax_backend import layouts
from jax_backend.layouts import CHANNELS_LAST, SAME, Layout

LayoutRule = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Layout]
"""Layout of a tensor of a module from the module and the arguments of the call."""


@dataclasses.dataclass(frozen=True)
class ModuleKind:
  """How to quantize the modules of one class.

  Attributes:
    weights: (parameter name, layout rule) of each weight.
    input: layout rule of the first argument, or None where inputs have no quantizer.
    output: layout rule of the result, or None where outputs have no quantizer.
    parent_classes: names for `parent_class` entries of a config, torch's first.
    methods: methods whose input and output are quantized; the weights are quantized in every method.
    weight_methods: further methods that use the weights and make the module one that gets quantizers.
  """

  weights: tuple[tuple[str, LayoutRule], ...] = ()
  input: LayoutRule | None = None
  output: LayoutRule | None = None
  parent_classes: Callable[[nn.Module], tuple[str, ...]] = lambda module: ()
  methods: tuple[str, ...] = ("__call__",)
  weight_methods: tuple[str, ...] = ()

  def weight_names(self) -> dict[str, str]:
    """Parameter name -> quantizer name. A single weight's is "weight_quantizer"; several are told apart by their parameter."""
    if len(self.weights) == 1:
      return {self.weights[0][0]: "weight_quantizer"}
    return {param: f"{param}_weight_quantizer" for param, _ in self.weights}


def _always(layout: Layout) -> LayoutRule:
  return lambda module, args, kwargs: layout


def _as_tuple(value: Any) -> tuple[Any, ...]:
  return tuple(value) if isinstance(value, Sequence) else (value,)


def _dense_general_kernel(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  batch, joined, features = (len(_as_tuple(v)) for v in (module.batch_dims, module.axis, module.features))
  first_feature = batch + joined
  outputs = (*range(batch), *range(first_feature, first_feature + features))
  return layouts.fixed(outputs, tuple(range(batch, first_feature)))


def _dense_general_input(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  ndim = _first(args, kwargs).ndim
  return Layout("flatten", axes=tuple(sorted(a % ndim - ndim for a in _as_tuple(module.axis))))


def _dense_general_output(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  return Layout("flatten", axes=tuple(range(-len(_as_tuple(module.features)), 0)))


def _einsum_labels(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str, str]:
  given = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
  equation = module.einsum_str if given is None else given
  operands, result = equation.replace(" ", "").split("->")
  left, kernel = operands.split(",")
  return left, kernel, result


def _einsum_kernel(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  _, kernel, result = _einsum_labels(module, args, kwargs)
  inputs = tuple(i for i, label in enumerate(kernel) if label not in result)
  outputs = tuple(i for i, label in enumerate(kernel) if label in result)
  return layouts.fixed(*(group for group in (outputs, inputs) if group))


def _einsum_input(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  left, kernel, result = _einsum_labels(module, args, kwargs)
  before, _, after = left.rpartition("...") if "..." in left else ("", "", left)
  places = {label: i for i, label in enumerate(before)} | {label: i - len(after) for i, label in enumerate(after)}
  joined = tuple(places[label] for label in kernel if label not in result and label in places)
  return Layout("flatten", axes=joined) if joined else SAME


def _spatial(module: Any) -> int:
  return len(_as_tuple(module.kernel_size))


def _conv_kernel(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  n = _spatial(module)
  return layouts.fixed((n + 1,), (n,), *((i,) for i in range(n)))


def _conv_transpose_kernel(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  # Stored [spatial..., in, out], or [spatial..., out, in] with transpose_kernel. The quantizer sees [out, in, spatial...], as in torch.
  n = _spatial(module)
  inputs, outputs = (n + 1, n) if module.transpose_kernel else (n, n + 1)
  return layouts.fixed((outputs,), (inputs,), *((i,) for i in range(n)))


def _conv_activation(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
  return Layout("channels_last", spatial=_spatial(module))


def _names(*names: str) -> Callable[[nn.Module], tuple[str, ...]]:
  return lambda module: names


def _ranked(name: str) -> Callable[[nn.Module], tuple[str, ...]]:
  return lambda module: (f"nn.{name}{_spatial(module)}d",)


def _normalization(layout: Layout, *names: str) -> ModuleKind:
  return ModuleKind((), _always(layout), _always(layout), _names(*names))


_CONV = ModuleKind((("kernel", _conv_kernel),), _conv_activation, _conv_activation, _ranked("Conv"))

_BUILT_IN: dict[type[nn.Module], ModuleKind] = {
  nn.Dense: ModuleKind((("kernel", _always(layouts.from_letters("io"))),), _always(SAME), _always(SAME), _names("nn.Linear")),
  nn.DenseGeneral: ModuleKind((("kernel", _dense_general_kernel),), _dense_general_input, _dense_general_output, _names("nn.Linear")),
  nn.Einsum: ModuleKind((("kernel", _einsum_kernel),), _einsum_input, _always(SAME), _names("nn.Linear")),
  nn.Conv: _CONV,
  nn.ConvLocal: _CONV,
  nn.ConvTranspose: ModuleKind((("kernel", _conv_transpose_kernel),), _conv_activation, _conv_activation, _ranked("ConvTranspose")),
  # The input of a table is indices, so its input quantizer exists for the name only; the query of `attend` passes as it is.
  nn.Embed: ModuleKind(
    (("embedding", _always(layouts.fixed((0,), (1,)))),),
    _always(SAME),
    _always(SAME),
    _names("nn.Embedding"),
    weight_methods=("attend",),
  ),
  nn.LayerNorm: _normalization(SAME, "nn.LayerNorm"),
  nn.RMSNorm: _normalization(SAME, "nn.RMSNorm"),
  nn.GroupNorm: _normalization(CHANNELS_LAST, "nn.GroupNorm"),
  nn.InstanceNorm: _normalization(CHANNELS_LAST, "nn.InstanceNorm1d", "nn.InstanceNorm2d", "nn.InstanceNorm3d"),
  nn.BatchNorm: _normalization(CHANNELS_LAST, "nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"),
}
_REGISTERED: dict[type[nn.Module], ModuleKind] = {}
_ACTIVATIONS = {"same": SAME, "channels_last": CHANNELS_LAST}


def register(
  module_cls: type[nn.Module],
  weights: Mapping[str, str],
  *,
  activations: str | None = "same",
  parent_classes: Sequence[str] = ("nn.Linear",),
  methods: Sequence[str] = ("__call__",),
) -> None:
  """Quantize a linen module class of your own, without changing it.

  Args:
    module_cls: the class; subclasses are found too.
    weights: parameter name -> one letter per stored axis: "i" inputs, "o" outputs, "e" experts, "d" "h" "w" spatial. A Dense kernel is
      {"kernel": "io"}. A single weight gets `weight_quantizer`, several `<parameter>_weight_quantizer`.
    activations: "same" (features last, as in torch), "channels_last" (NHWC where torch has NCHW), or None for no input and output
      quantizers.
    parent_classes: names under which `parent_class` entries of a config find it, beside the class's own name.
    methods: methods whose first argument and result get the input and output quantizers.

  Raises:
    TypeError: module_cls is no linen module class.
    ValueError: letters that are not understood, or another `activations`.
  """
  if not (isinstance(module_cls, type) and issubclass(module_cls, nn.Module)):
    raise TypeError(f"register needs a flax.linen.Module class, got {module_cls!r}")
  if activations is not None and activations not in _ACTIVATIONS:
    raise ValueError(f"activations {activations!r} is unknown; allowed are {', '.join(map(repr, _ACTIVATIONS))} and None")
  rule = None if activations is None else _always(_ACTIVATIONS[activations])
  found = tuple((param, _always(layouts.from_letters(letters))) for param, letters in weights.items())
  _REGISTERED[module_cls] = ModuleKind(found, rule, rule, _names(*parent_classes), tuple(methods))


def unregister(module_cls: type[nn.Module]) -> None:
  """Undo `register`; a built-in class gets its own rules back.

  Raises:
    KeyError: the class was never registered.
  """
  if module_cls not in _REGISTERED:
    raise KeyError(f"{module_cls.__name__} is not registered; registered are {[c.__name__ for c in _REGISTERED]}")
  del _REGISTERED[module_cls]


def kind_of(module_cls: type[nn.Module]) -> ModuleKind | None:
  """The rules for a class: its own, or those of the nearest base class; None where it is not quantized."""
  for cls in module_cls.__mro__:
    kind = _REGISTERED.get(cls) or _BUILT_IN.get(cls)
    if kind is not None:
      return kind
  return None


def parent_classes(kind: ModuleKind, module: nn.Module) -> tuple[str, ...]:
  """Names for `parent_class` entries: torch's, the Flax class's own and its bases', with and without "nn."."""
  own = [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
  return (*kind.parent_classes(module), *own, *(f"nn.{name}" for name in own))


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
  return args[0] if args else next(iter(kwargs.values()))


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
  """The tensor that the input quantizer sees; None where a call has no argument."""
  return _first(args, kwargs) if args or kwargs else None


def replace_first(args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """The arguments with the first one replaced."""
  if args:
    return (value, *args[1:]), dict(kwargs)
  name = next(iter(kwargs))
  return args, {**kwargs, name: value}
