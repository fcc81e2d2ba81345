"""ONNX from a quantized torch model: torch's dynamo exporter with one placeholder per quantizer, which `core.export` then writes out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import core
from core import hadamard
from core.export.onnx_model import finish, write
from core.export.onnx_packages import package
from core.export.onnx_piece import DOMAIN, PLACEHOLDER, OnnxOptions, Piece
from torch_backend.modules import QuantWeight
from torch_backend.names import walk
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers


@torch.library.custom_op("twinquant::onnx_quantizer", mutates_args=())
def _placeholder(x: Tensor, quantizer: str) -> Tensor:
  return x.clone()


@_placeholder.register_fake
def _(x: Tensor, quantizer: str) -> Tensor:
  return torch.empty_like(x)


def export_onnx(
  model: nn.Module,
  args: Sequence[Any],
  path: str | Path,
  *,
  kwargs: Mapping[str, Any] | None = None,
  opset: int | None = None,
  form: str = "standard",
  fp4: str = "portable",
  input_names: Sequence[str] | None = None,
  output_names: Sequence[str] | None = None,
  dynamic_shapes: Any = None,
) -> Path:
  """Write a quantized model as ONNX with standard operators, its weights as packed codes and scales.

  Quantizers become QuantizeLinear and DequantizeLinear of the standard domain, named after them
  (`model.layers.0.mlp.up_proj.input_quantizer/codes`). See docs/onnx.md for what each format becomes and who runs it.

  Args:
    model: quantized model in evaluation mode; it is not changed.
    args: example arguments of its forward.
    path: of the .onnx file; written aside and renamed. Models above 2 GB get their tensors in `<name>.data` beside it.
    kwargs: example keyword arguments.
    opset: 21 to 25; None is the lowest that has all types (21, or 23 for native FP4).
    form: "standard" or "exact" (`core.export.onnx_piece.OnnxOptions`).
    fp4: "portable" or "native".
    input_names: names of the graph's inputs.
    output_names: names of its outputs.
    dynamic_shapes: as in `torch.export.export`: which lengths may vary.

  Returns:
    The path.

  Raises:
    ImportError: a package of the `onnx` extra is missing.
    ValueError: the model is not quantized or in training mode, an option is not allowed, or ONNX cannot express a quantizer; named.
  """
  options = OnnxOptions.make(opset, form, fp4)
  for name in ("onnx", "onnxscript", "onnx_ir"):
    package(name)
  if not any(True for _ in walk(model)):
    raise ValueError("the model has no quantizers; call quantize first")
  if model.training:
    raise ValueError("the model is in training mode; call model.eval() before exporting")
  with torch.no_grad(), placeholders(model) as pieces:
    program = torch.onnx.export(
      model,
      tuple(args),
      kwargs=dict(kwargs or {}),
      dynamo=True,
      opset_version=min(options.opset, 23),
      custom_translation_table={torch.ops.twinquant.onnx_quantizer.default: _translation()},
      input_names=input_names,
      output_names=output_names,
      dynamic_shapes=dynamic_shapes,
      verbose=False,
    )
  if program is None:
    raise ValueError("torch.onnx.export returned no program")
  finish(program.model, pieces, options)
  write(program.model, path)
  return Path(path)


def _translation() -> Any:
  """The function that torch's exporter calls for a placeholder."""
  values, defs = package("onnxscript").values, package("onnx").defs
  schema = defs.OpSchema(
    PLACEHOLDER,
    DOMAIN,
    1,
    inputs=[defs.OpSchema.FormalParameter("x", "T")],
    outputs=[defs.OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "double")], "")],
    attributes=[defs.OpSchema.Attribute("quantizer", defs.OpSchema.AttrType.STRING)],
  )
  op = values.Op(values.Opset(DOMAIN, 1), PLACEHOLDER, schema)

  def placeholder(x: Any, quantizer: str) -> Any:
    return op(x, quantizer=quantizer)

  return placeholder


@contextlib.contextmanager
def placeholders(model: nn.Module) -> Iterator[dict[str, Piece]]:
  """While the context is open, enabled quantizers trace as placeholders.

  Weights pass through their quantizers once beforehand, so that their codes are known; of a sequence of quantizers on a weight only the
  first is stored, the others act on its value.

  Args:
    model: quantized model.

  Returns:
    What each placeholder stands for, by the quantizer's name.
  """
  pieces: dict[str, Piece] = {}
  held = {id(q): (name, q) for name, q in _named(model) if q.is_enabled and q.is_quantizing}
  weights = [m for m in model.modules() if isinstance(m, QuantWeight)]
  try:
    for name, quantizer in held.values():
      amax, tensor_amax = (None if t is None else _numpy(t) for t in (quantizer.amax, quantizer._tensor_amax))
      pieces[name] = Piece(name, quantizer.spec, amax, tensor_amax)
      object.__setattr__(quantizer, "_fake_quantize", functools.partial(_traced, name))
      object.__setattr__(quantizer, "from_codes", functools.partial(_traced_codes, name, quantizer))
    for module in weights:
      name, first = held.get(id(tensor_quantizers(module.weight_quantizer)[0]), ("", None))
      if first is not None:
        pieces[name] = Piece(name, first.spec, weight=_stored(module, first))
    yield pieces
  finally:
    for _, quantizer in held.values():
      for hook in ("_fake_quantize", "from_codes"):
        quantizer.__dict__.pop(hook, None)
    for module in weights:
      module.drop_kept_weight()


def _named(model: nn.Module) -> list[tuple[str, TensorQuantizer]]:
  """Every quantizer with a name of its own, those of a sequence numbered."""
  found = []
  for name, quantizer, _ in walk(model):
    ones = tensor_quantizers(quantizer)
    found += [(name if len(ones) == 1 else f"{name}.{i}", one) for i, one in enumerate(ones)]
  return found


def _traced(name: str, x: Tensor) -> Tensor:
  return torch.ops.twinquant.onnx_quantizer(x, name)


def _traced_codes(name: str, quantizer: TensorQuantizer, packed: core.PackedTensor, offset: Tensor | None, like: Tensor) -> Tensor:
  """`TensorQuantizer.from_codes` of a compressed weight, which the placeholder stands for."""
  y = _traced(name, torch.zeros(packed.shape, dtype=torch.float32, device=like.device))
  if offset is not None:
    y = y + offset
  if quantizer._rotates_back:
    y = hadamard.unrotate(y, quantizer._rotation.block_size, quantizer._rotation.seed)
  return core.cast_saturating(y, like)


def _stored(module: QuantWeight, first: TensorQuantizer) -> core.QuantizedTensor:
  """Codes and scales of a weight: what its first quantizer makes of it, or holds of a compressed one."""
  if module.packed_weight is not None:
    return module.packed_weight.quantized()
  seen: list[Tensor] = []

  def see(x: Tensor) -> Tensor:
    seen.append(x.detach())
    return x

  traced = first.__dict__["_fake_quantize"]
  object.__setattr__(first, "_fake_quantize", see)
  try:
    first(module.canonical(module.stored_weight))
  finally:
    object.__setattr__(first, "_fake_quantize", traced)
  stored = core.quantize(seen[0], first.spec, first.amax, tensor_amax=first._tensor_amax, key=first._next_key())
  return _as_numpy(stored)


def _as_numpy(q: core.QuantizedTensor) -> core.QuantizedTensor:
  scale, tensor_scale, zero = (None if t is None else _numpy(t) for t in (q.scale, q.tensor_scale, q.zero_point))
  return core.QuantizedTensor(_numpy(q.codes), scale, tensor_scale, zero, q.spec, q.shape)


def _numpy(tensor: Tensor) -> np.ndarray:
  return tensor.detach().cpu().numpy().copy()
