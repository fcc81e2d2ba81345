"""Quantizer: one tensor's specification and state as a frozen pytree node.

Arrays (amax, scales, ...) are leaves; the configuration, the mode and the layout are static, so they are part of the tree structure and of
every compilation key: changing 8 to 4 bits retraces, and a plain and a quantized call never share a compiled function.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import core
from core import Scales
from core.blocks import tiling
from core.config.schema import QuantizerConfig
from jax_backend import affine, layouts, ste
from jax_backend.layouts import SAME, Layout

OFF, CALIBRATE, QUANTIZE, FOLDED, PASS = "off", "calibrate", "quantize", "folded", "pass"
DATA_FIELDS = ("amax", "tensor_amax", "pre_quant_scale", "bias", "scales", "statistics", "low_rank_a", "low_rank_b", "packed")


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
  """Fake quantization of one tensor: `quantizer(x)`.

  Quantizers are immutable: `enable`, `disable`, `with_amax` and `replace` return new ones.

  Attributes:
    config: what to do (static); a dict of attributes such as {"num_bits": 8, "axis": 0} is read.
    mode: "quantize", "calibrate" (gather statistics, let x pass), "pass" (on, but lets x pass for now), "off", or "folded" (the
      tensor holds quantized values already) (static).
    layout: where torch's axes are in the tensors that come in (static).
    param: name of the parameter of a weight quantizer, else None (static).
    parent_classes: names under which `parent_class` entries of a config find the module (static).
    stack: positions, among the stored parameter's axes, of the axes that nn.scan or nn.vmap stack (static); leaves carry them in front.
    group: name of the sibling group whose tensor-level scale this quantizer shares, or None (static).
    amax: float32 in torch's axes, what `core.amax` returns for the torch tensor; None: taken from each input.
    tensor_amax: float32 [], the amax behind the tensor scale of a two-level specification; else None.
    pre_quant_scale: factor on the input before quantizing, over its last axis.
    bias: float32 in torch's axes, subtracted before and added after quantizing.
    scales: kept `core.Scales` of amax, in stored axes, so that a forward pass does not compute them again.
    statistics: running calibration statistics, only while calibrating.
    low_rank_a, low_rank_b: [r, K] and [N, r] float32 of a weight quantizer: the layer adds b (a x) of its scaled, unquantized input x
      (SVDQuant); None without that branch. They stay when the quantizer is off or folded.
    packed: of a compressed weight, its codes and scales (`jax_backend.packed.Packed`), in the place of the parameter; else None.
  """

  config: QuantizerConfig
  mode: str = QUANTIZE
  layout: Layout = SAME
  param: str | None = None
  parent_classes: tuple[str, ...] = ()
  stack: tuple[int, ...] = ()
  group: str | None = None
  amax: Any = None
  tensor_amax: Any = None
  pre_quant_scale: Any = None
  bias: Any = None
  scales: Scales | None = None
  statistics: dict[str, Any] | None = None
  low_rank_a: Any = None
  low_rank_b: Any = None
  packed: Any = None

  def __post_init__(self) -> None:
    if isinstance(self.config, Mapping):
      given, config = self.config, QuantizerConfig.from_attributes(self.config)
      config.check_simulated("")
      object.__setattr__(self, "config", config)
      if not given.get("enable", True):
        object.__setattr__(self, "mode", OFF)
      if config.constant_amax is not None:
        constant = self.with_amax(config.constant_amax)
        for leaf in ("amax", "tensor_amax", "scales"):
          object.__setattr__(self, leaf, getattr(constant, leaf))

  @property
  def spec(self) -> core.QuantSpec:
    """The arithmetic; its axes are torch's."""
    return self.config.spec

  @property
  def is_enabled(self) -> bool:
    return self.mode in (CALIBRATE, QUANTIZE, PASS)

  @property
  def is_folded(self) -> bool:
    return self.mode == FOLDED

  @property
  def is_calibrating(self) -> bool:
    return self.mode == CALIBRATE

  @property
  def is_dynamic(self) -> bool:
    """Whether every scale is taken from each input, so that no amax is ever kept (dynamic NVFP4 keeps its tensor amax)."""
    return self.spec.dynamic and not self.spec.two_level and self.config.constant_amax is None

  @property
  def maxbound(self) -> float:
    """Level that amax maps to: 127 for INT8, 448 for E4M3."""
    return self.spec.element_bound

  @property
  def step_size(self) -> Any:
    """Float32 step of every group, in stored axes; None where it depends on the input."""
    return None if self.scales is None else self.scales.step

  @property
  def bias_value(self) -> Any:
    """Calibrated bias of affine quantization; None without one. (torch's name for `bias`)"""
    return self.bias

  @property
  def acts(self) -> bool:
    """Whether a call changes its input at all."""
    transforms = self.pre_quant_scale is not None or self.config.rotate is not None
    return self.is_enabled or (transforms and self.mode != FOLDED)

  @property
  def needs_calibration(self) -> bool:
    return self.is_enabled and self.config.needs_calibration

  @property
  def leaves(self) -> tuple[Quantizer, ...]:
    return (self,)

  def replace(self, **changes: Any) -> Quantizer:
    """A copy with these fields changed. Another amax drops the kept scales (`with_amax` computes them anew)."""
    if "scales" not in changes and ({"amax", "tensor_amax"} & set(changes)):
      changes["scales"] = None
    return dataclasses.replace(self, **changes)

  def enable(self) -> Quantizer:
    """A copy that quantizes."""
    return self.replace(mode=QUANTIZE)

  def disable(self) -> Quantizer:
    """A copy that lets its input pass (a pre_quant_scale is still applied)."""
    return self.replace(mode=OFF)

  def with_mode(self, mode: str) -> Quantizer:
    """A copy in that mode; one that is off stays off."""
    return self.replace(mode=mode) if self.is_enabled else self

  def map(self, fn: Callable[[Quantizer], Quantizer]) -> Quantizer:
    """`fn` of this quantizer; of each child, for a sequential one."""
    return fn(self)

  def with_amax(self, amax: Any, tensor_amax: Any = None) -> Quantizer:
    """A copy with this amax (torch's axes, float32), and the scales that follow from it.

    Args:
      amax: what `core.amax` returns for the torch tensor, with stacked axes in front; None: taken from each input. Negative entries
        are negative scales where `spec.allows_signed_scale`.
      tensor_amax: shared tensor amax of a two-level specification with given block amax; None is the largest block amax.

    Raises:
      ValueError: NaN or infinite entries; negative ones where the specification has no signed scales.
    """
    # Copies: siblings share a value, not a buffer, so that the variables can be donated to a jitted step.
    amax = None if amax is None else jnp.array(amax, jnp.float32)
    tensor_amax = None if tensor_amax is None else jnp.array(tensor_amax, jnp.float32)
    for value in (amax, tensor_amax):
      _check_amax(value, self.config)
    if self.config.spec.two_level and amax is not None and tensor_amax is None:
      tensor_amax = jnp.array(jnp.max(amax, axis=tuple(range(len(self.stack), amax.ndim))))
    return self.replace(amax=amax, tensor_amax=tensor_amax, scales=self._kept_scales(amax, tensor_amax))

  def _kept_scales(self, amax: Any, tensor_amax: Any) -> Scales | None:
    spec = self.config.spec
    rank = 0 if amax is None else amax.ndim - len(self.stack)
    known = self.layout.kind == "fixed" or rank == int(spec.zero_point)
    if amax is None or not known or spec.four_over_six or (spec.two_level and spec.dynamic):
      return None
    dims = self.layout.of(0) if self.layout.kind == "fixed" else ()
    compute = functools.partial(_scales, spec, dims, layouts.needs_torch_order(spec))
    return layouts.over_stack(compute, len(self.stack))(amax, tensor_amax)

  def prepare(self, x: Any) -> Any:
    """x times pre_quant_scale, rotated, in float32: what is quantized and whose statistics count. A call casts once, at its end."""
    if self.pre_quant_scale is not None:
      x = x.astype(jnp.float32) * self.pre_quant_scale
    return self._turned(x, affine.rotate)

  def _turned(self, x: Any, turn: Callable[[Any, Any], Any]) -> Any:
    """A rotation along torch's last axis, whatever the stored layout: of a kernel [in, out] the inputs are turned."""
    if self.config.rotate is None:
      return x
    seen = layouts.view(tuple(x.shape), self.layout.of(x.ndim), torch_order=True)
    return layouts.leave(turn(layouts.enter(x, seen), self.config.rotate), seen, x.shape)

  def __call__(self, x: Any, key: Any = None) -> Any:
    """The values that the stored codes stand for.

    Args:
      x: [...] floating point, in the stored layout; anything else passes.
      key: two int32, for stochastic rounding.

    Returns:
      The shape and dtype of x.
    """
    if not self.acts or x.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    y = self.prepare(x)
    if self.mode == QUANTIZE:
      y = self._quantize(y, key)
    return core.cast_saturating(self._turned(y, affine.rotate_back), x)

  def view(self, shape: tuple[int, ...]) -> tuple[layouts.View, core.QuantSpec]:
    """How a tensor of that stored shape is looked at, and the specification in the axes of that view."""
    spec = self.config.spec
    seen = layouts.view(tuple(shape), self.layout.of(len(shape)), layouts.needs_torch_order(spec))
    return seen, layouts.map_spec(spec, seen.axes)

  def _quantize(self, x: Any, key: Any) -> Any:
    seen, spec = self.view(x.shape)
    shown = layouts.enter(x, seen)
    bias = self._bias(shown, seen)
    if bias is not None:
      shown = shown.astype(jnp.float32) - bias
    masked = not self.config.pass_through_bwd
    amax = self._fitted(self.amax, shown.shape, seen, spec) if self.scales is None or masked else None
    tensor_amax = None if spec.dynamic else self.tensor_amax
    y = ste.fake_quantize(spec, not masked, shown, amax, tensor_amax, self.scales, key)
    if bias is not None:
      y = core.cast_saturating(affine.unfused(y) + bias, x)
    return layouts.leave(y, seen, x.shape)

  def _bias(self, shown: Any, seen: layouts.View) -> Any:
    spec = self.config.bias
    if spec is None:
      return None
    if self.bias is None:
      return jax.lax.stop_gradient(affine.bias_of(shown, spec, affine.reduced_axes(spec, seen)))
    return layouts.amax_to_view(self.bias, seen)

  def _fitted(self, amax: Any, shape: tuple[int, ...], seen: layouts.View, spec: core.QuantSpec) -> Any:
    """amax in the view's axes; that of an activation may lack the axes in front, over which it is shared."""
    if amax is None or not amax.ndim or (spec.two_level and spec.dynamic):
      return amax
    extra = int(spec.zero_point)
    missing = len(seen.axes) + extra - amax.ndim
    if missing > 0:
      amax = amax.reshape((*amax.shape[:extra], *(1,) * missing, *amax.shape[extra:]))
    amax = layouts.amax_to_view(amax, seen)
    target = tiling(shape, spec).scales
    return jnp.broadcast_to(amax, (*amax.shape[:extra], *target)) if self.param is None and target else amax

  def amax_of(self, x: Any) -> Any:
    """`core.amax` of a stored tensor, in torch's axes."""
    seen, spec = self.view(x.shape)
    return layouts.amax_to_torch(core.amax(layouts.enter(x, seen), spec), seen)


def _check_amax(amax: Any, config: QuantizerConfig) -> None:
  if amax is None or isinstance(amax, Tracer) or not amax.is_fully_addressable or not amax.size:
    return
  held = np.asarray(amax)
  least, most = float(held.min()), float(held.max())
  signed = config.spec.zero_point or config.spec.allows_signed_scale
  if not math.isfinite(least) or not math.isfinite(most) or (least < 0 and not signed):
    allowed = "finite" if signed else "finite and not negative"
    raise ValueError(f"amax of a quantizer ({config.describe()}) must be {allowed}; got values from {least} to {most}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scales(spec: core.QuantSpec, dims: layouts.Dims, torch_order: bool, amax: Any, tensor_amax: Any) -> Scales:
  stored_rank = sum(len(group) for group in dims)
  seen = layouts.view((1,) * stored_rank, dims, torch_order)
  kept = core.scales(layouts.amax_to_view(amax, seen), layouts.map_spec(spec, seen.axes), tensor_amax)
  return Scales(kept.step, kept.inv_step, None, None, kept.zero_point)


jax.tree_util.register_dataclass(
  Quantizer,
  data_fields=list(DATA_FIELDS),
  meta_fields=[f.name for f in dataclasses.fields(Quantizer) if f.name not in DATA_FIELDS],
)


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialQuantizer:
  """Quantizers one after the other: y = Q_n(... Q_1(x)). W4A8 weights are INT4 blocks, then FP8.

  Attributes:
    children: applied in this order.
  """

  children: tuple[Quantizer, ...]

  @property
  def config(self) -> tuple[QuantizerConfig, ...]:
    return tuple(child.config for child in self.children)

  @property
  def amax(self) -> Any:
    """amax of the last one."""
    return self.children[-1].amax

  @property
  def tensor_amax(self) -> Any:
    return self.children[-1].tensor_amax

  @property
  def leaves(self) -> tuple[Quantizer, ...]:
    return self.children

  @property
  def mode(self) -> str:
    return self.children[0].mode

  @property
  def layout(self) -> Layout:
    return self.children[0].layout

  @property
  def param(self) -> str | None:
    return self.children[0].param

  @property
  def parent_classes(self) -> tuple[str, ...]:
    return self.children[0].parent_classes

  @property
  def stack(self) -> tuple[int, ...]:
    return self.children[0].stack

  @property
  def is_enabled(self) -> bool:
    return any(child.is_enabled for child in self.children)

  @property
  def acts(self) -> bool:
    return any(child.acts for child in self.children)

  @property
  def group(self) -> str | None:
    return self.children[0].group

  @property
  def needs_calibration(self) -> bool:
    return any(child.needs_calibration for child in self.children)

  def enable(self) -> SequentialQuantizer:
    """A copy whose children quantize."""
    return self.map(Quantizer.enable)

  def disable(self) -> SequentialQuantizer:
    """A copy whose children let their input pass."""
    return self.map(Quantizer.disable)

  def with_mode(self, mode: str) -> SequentialQuantizer:
    """A copy with its children in that mode; those that are off stay off."""
    return self.map(lambda child: child.with_mode(mode))

  def map(self, fn: Callable[[Quantizer], Quantizer]) -> SequentialQuantizer:
    """A copy with `fn` of each child."""
    return SequentialQuantizer(tuple(fn(child) for child in self.children))

  def __call__(self, x: Any, key: Any = None) -> Any:
    """The children, one after the other."""
    for child in self.children:
      x = child(x, key)
    return x


jax.tree_util.register_dataclass(SequentialQuantizer, data_fields=["children"], meta_fields=[])

AnyQuantizer = Quantizer | SequentialQuantizer


def is_quantizer(node: Any) -> bool:
  """Whether a tree node is a quantizer (for `is_leaf=`)."""
  return isinstance(node, (Quantizer, SequentialQuantizer))
