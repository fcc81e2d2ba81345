"""ONNX from a quantized Flax model: traced with one placeholder per quantizer, converted by jax2onnx, then written out by `core.export`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

import core
from core.export.onnx_model import finish, write
from core.export.onnx_packages import package
from core.export.onnx_piece import DOMAIN, PLACEHOLDER, OnnxOptions, Piece
from jax_backend import affine, layouts, packed, tree
from jax_backend.apply import QuantModule
from jax_backend.quantizer import DATA_FIELDS, QUANTIZE, AnyQuantizer, Quantizer, SequentialQuantizer

placeholder_p = Primitive("twinquant_quantizer")
placeholder_p.def_impl(lambda x, *, quantizer: x)
placeholder_p.def_abstract_eval(lambda x, *, quantizer: x)
mlir.register_lowering(placeholder_p, mlir.lower_fun(lambda x, *, quantizer: x, multiple_results=False))


def _no_batching(args: Any, dims: Any, *, quantizer: str) -> Any:
  raise ValueError(f"quantizer {quantizer!r} stands under vmap; ONNX export needs a model without nn.vmap around quantized layers")


batching.primitive_batchers[placeholder_p] = _no_batching


def export_onnx(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  args: Sequence[Any],
  path: str | Path,
  *,
  kwargs: Mapping[str, Any] | None = None,
  opset: int | None = None,
  form: str = "standard",
  fp4: str = "portable",
  input_names: Sequence[str] | None = None,
  output_names: Sequence[str] | None = None,
  method: Any = None,
) -> Path:
  """Write a quantized model as ONNX with standard operators, its weights as packed codes and scales.

  Quantizers become QuantizeLinear and DequantizeLinear of the standard domain, named after them
  (`model.layers.0.mlp.up_proj.input_quantizer/codes`). See docs/onnx.md for what each format becomes and who runs it.

  Args:
    qmodule: what `quantize` returned.
    qvariables: what `quantize` returned, the parameters in float32.
    args: example arguments of the module, arrays or `jax.ShapeDtypeStruct`; of the latter, dimensions may be symbolic
      (`jax.export.symbolic_shape`).
    path: of the .onnx file; written aside and renamed. Models above 2 GB get their tensors in `<name>.data` beside it.
    kwargs: further arguments of the module; constants of the graph.
    opset: 21 to 25; None is the lowest that has all types (21, or 23 for native FP4).
    form: "standard" or "exact" (`core.export.onnx_piece.OnnxOptions`).
    fp4: "portable" or "native".
    input_names: names of the graph's inputs.
    output_names: names of its outputs.
    method: as in Flax.

  Returns:
    The path.

  Raises:
    ImportError: a package of the `onnx` extra is missing.
    ValueError: the model is not quantized, an option is not allowed, or ONNX cannot express a quantizer; named.
  """
  options = OnnxOptions.make(opset, form, fp4)
  package("onnx")
  with _quiet():
    jax2onnx = package("jax2onnx")
    _register_plugin()
  if not any(True for _ in tree.items(qvariables.get("quant", {}))):
    raise ValueError("the variables hold no quantizers; call quantize first")
  _check_types(qvariables)
  recorder = _Recorder()
  traced = _with_placeholders(qvariables, recorder)
  inputs = [_as_struct(a) for a in args]
  with recorder.tracing():
    closed, shape = jax.make_jaxpr(lambda *xs: qmodule.apply(traced, *xs, method=method, **dict(kwargs or {})), return_shape=True)(*inputs)
  names = output_names or [f"output_{i}" for i in range(len(jax.tree.leaves(shape)))]
  with _quiet():
    model = jax2onnx.to_onnx(
      jaxpr_as_fun(closed),
      inputs=inputs,
      opset=min(options.opset, 23),
      return_mode="ir",
      input_names=input_names or [f"input_{i}" for i in range(len(inputs))],
      output_names=names,
    )
  finish(model, recorder.pieces, options)
  write(model, path)
  return Path(path)


@contextlib.contextmanager
def _quiet() -> Any:
  """jax2onnx warns of each of its plugins that does not fit this version of JAX; what a model lacks is an error of its own."""
  logger = logging.getLogger("jax2onnx.plugins.plugin_system")
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(before)


def _check_types(qvariables: Mapping[str, Any]) -> None:
  for path, leaf in tree.leaves(qvariables.get("params", {})):
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
      raise ValueError(
        f"parameter {'/'.join(path)} is {leaf.dtype}; jax2onnx writes float32 models only: load the model in float32 to export"
      )


def _as_struct(array: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


class _Recorder:
  """What the placeholders of one export stand for. Hashed by identity, so that it can be a static part of quantizers."""

  def __init__(self) -> None:
    self.pieces: dict[str, Piece] = {}
    self._tracing = False

  @contextlib.contextmanager
  def tracing(self) -> Any:
    """From here on tensors are traced; before, they are weights."""
    self._tracing = True
    try:
      yield
    finally:
      self._tracing = False

  def quantize(self, quantizer: _Placeholder, shown: Any, seen: layouts.View, spec: core.QuantSpec) -> Any:
    """The placeholder of a tensor in the axes of its view; the codes of a weight."""
    name = quantizer.label
    if not self._tracing:
      amax = quantizer._fitted(quantizer.amax, shown.shape, seen, spec)
      tensor_amax = None if spec.dynamic else quantizer.tensor_amax
      stored = core.quantize(np.asarray(shown, np.float32), spec, _numpy(amax), tensor_amax=_numpy(tensor_amax), key=(0, 0))
      self.pieces[name] = Piece(name, spec, weight=stored)
      return shown
    if name not in self.pieces:
      self.pieces[name] = _activation(quantizer, spec, seen)
    return placeholder_p.bind(shown, quantizer=name)


def _activation(quantizer: _Placeholder, spec: core.QuantSpec, seen: layouts.View) -> Piece:
  amax, tensor_amax = quantizer.amax, quantizer.tensor_amax
  if any(isinstance(value, Tracer) for value in (amax, tensor_amax)):
    raise ValueError(
      f"quantizer {quantizer.label!r} stands inside a scan or another transform; build the model without it (scan_layers=False)"
    )
  with jax.ensure_compile_time_eval():
    shown = layouts.amax_to_view(_padded(amax, spec, seen), seen) if not (spec.two_level and spec.dynamic) else amax
  return Piece(quantizer.label, spec, _numpy(shown), None if spec.dynamic else _numpy(tensor_amax))


def _padded(amax: Any, spec: core.QuantSpec, seen: layouts.View) -> Any:
  """amax with the leading axes that an activation's lacks."""
  if amax is None or not amax.ndim:
    return amax
  extra = int(spec.zero_point)
  missing = max(len(seen.axes) + extra - amax.ndim, 0)
  return amax.reshape((*amax.shape[:extra], *(1,) * missing, *amax.shape[extra:]))


def _numpy(array: Any) -> np.ndarray | None:
  return None if array is None else np.asarray(array)


@dataclasses.dataclass(frozen=True, eq=False)
class _Placeholder(Quantizer):
  """A quantizer that traces as a placeholder.

  Attributes:
    label: its dotted name (static).
    recorder: keeps what it stands for (static).
  """

  label: str = ""
  recorder: _Recorder | None = None

  def _quantize(self, x: Any, key: Any) -> Any:
    seen, spec = self.view(x.shape)
    shown = layouts.enter(x, seen)
    bias = self._bias(shown, seen)
    if bias is not None:
      shown = shown.astype(jnp.float32) - bias
    assert self.recorder is not None
    y = self.recorder.quantize(self, shown, seen, spec)
    if bias is not None:
      y = core.cast_saturating(affine.unfused(y) + bias, x)
    return layouts.leave(y, seen, x.shape)


jax.tree_util.register_dataclass(
  _Placeholder, data_fields=list(DATA_FIELDS), meta_fields=[f.name for f in dataclasses.fields(_Placeholder) if f.name not in DATA_FIELDS]
)


def _with_placeholders(qvariables: Mapping[str, Any], recorder: _Recorder) -> dict[str, Any]:
  """The variables with placeholders in the place of quantizers; the weights' codes go to the recorder."""
  params, entries = qvariables.get("params", {}), {}
  for path, name, quantizer in tree.items(qvariables["quant"]):
    label = tree.full_name(path, name)
    if quantizer.stack:
      raise ValueError(f"quantizer {label!r} is a stack (nn.scan or nn.vmap); build the model without it (scan_layers=False)")
    replaced = _placeholder_of(quantizer, label, recorder)
    first, place = replaced.leaves[0], (*path, quantizer.param or "")
    if quantizer.leaves[0].packed is not None:
      params = _put(params, place, _unpacked(quantizer, label if isinstance(quantizer, Quantizer) else f"{label}.0", recorder))
    elif quantizer.param is not None and first.mode == QUANTIZE:
      first(meta.unbox(tree.lookup(params, place)))
    entries[path, name] = replaced
  return {**qvariables, "params": params, "quant": tree.build(entries)}


def _unpacked(quantizer: AnyQuantizer, label: str, recorder: _Recorder) -> Any:
  """The values of a compressed weight, for the shape of the graph; its codes go to the recorder."""
  held = quantizer.leaves[0].packed
  if held.offset is not None:
    raise ValueError(f"quantizer {label!r} holds a compressed weight with a bias; decompress the model to export it")
  stored = core.unpack_tensor(jax.tree.map(np.asarray, held).tensor)
  recorder.pieces[label] = Piece(label, stored.spec, weight=stored)
  return packed.values(quantizer, rest=False)


def _put(node: Any, path: tuple[str, ...], value: Any) -> Any:
  """The tree with a value at a path that need not exist."""
  return {**(node or {}), path[0]: _put((node or {}).get(path[0]), path[1:], value)} if path else value


def _placeholder_of(quantizer: AnyQuantizer, label: str, recorder: _Recorder) -> AnyQuantizer:
  if isinstance(quantizer, SequentialQuantizer):
    return SequentialQuantizer(tuple(_placeholder_of(q, f"{label}.{i}", recorder) for i, q in enumerate(quantizer.children)))  # type: ignore[arg-type]
  fields = {f.name: getattr(quantizer, f.name) for f in dataclasses.fields(Quantizer)}
  return _Placeholder(**{**fields, "packed": None}, label=label, recorder=recorder)


def _register_plugin() -> None:
  """Tell jax2onnx what a placeholder becomes."""
  system = package("jax2onnx.plugins.plugin_system")
  if placeholder_p.name in system.PLUGIN_REGISTRY:
    return
  ir = package("onnx_ir")

  class Plugin(system.PrimitiveLeafPlugin):
    def lower(self, ctx: Any, eqn: Any) -> None:
      (x,), (out,) = eqn.invars, eqn.outvars
      value, target = ctx.get_value_for_var(x), ctx.get_value_for_var(out)
      node = ir.node(
        PLACEHOLDER, [value], {"quantizer": eqn.params["quantizer"]}, domain=DOMAIN, outputs=[target], name=ctx.fresh_name(PLACEHOLDER)
      )
      ctx.add_node(node)

  system.register_primitive(jaxpr_primitive=placeholder_p.name)(Plugin)
