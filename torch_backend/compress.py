"""compress: hold weights as packed codes and scales, in the place of floats."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import core
from core import compression
from core import matmul as codes
from core.compression import CompressionReport, WeightSize
from core.config import ConfigWarning
from torch_backend import matmul as products
from torch_backend.modules import QuantWeight
from torch_backend.names import compressed_layers, is_quantized
from torch_backend.packed import PackedWeight
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import tensor_quantizers
from torch_backend.snapshot import restored_on_error

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def compress(model: nn.Module, include: str | Iterable[str] | None = None, matmul: str | None = None) -> nn.Module:
  """Replace the weights of a quantized model by their codes and scales, packed, in place. The float weights are freed.

  Every call dequantizes a weight anew, so outputs stay what simulation gave, bit for bit: each layer is checked before its float weight
  goes. Of a sequence of quantizers (W4A8) the codes of the first are held, and the others are applied to what they stand for. The weights
  cannot be trained or calibrated any more; `decompress` brings floats back. A weight that several modules share stays shared where all of
  them quantize it alike.

  Args:
    model: a quantized model.
    include: a pattern, or several, of the layers to compress, for example "*.mlp.*"; None takes every layer with an enabled weight
      quantizer.
    matmul: None dequantizes and leaves the product to the layer. "int8" and "float8" multiply codes: another arithmetic than the
      simulation's, whose outputs are near its own and not equal (`core.matmul`); without gradients.

  Returns:
    The same model.

  Raises:
    ValueError: the model is not quantized, matmul is unknown, a pattern matches no
      layer, or nothing could be compressed; names layers and reasons.

  Warns:
    ConfigWarning: layers that cannot be compressed, with the reason, and weights that another module still holds as floats.
  """
  codes.check_name(matmul)
  modules = _modules(model)
  chosen = compression.selected(include, list(modules))
  refused: dict[str, str] = {}
  done: dict[int, list[tuple[Tensor, PackedWeight]]] = {}  # keeps the float weights that it has seen, so that an id is not used twice
  count = 0
  with restored_on_error(model):
    for name in chosen:
      module = modules[name]
      if module.packed_weight is not None or not module.weight_quantizer.is_enabled:
        count += module.packed_weight is not None
        continue
      reason = _refusal(module) or (products.refusal(module, matmul) if matmul is not None else None) or _replace(module, done, matmul)
      if reason is None:
        count += 1
      else:
        refused[name] = reason
    compression.report_refusals(refused, count, stacklevel=4)
    _warn_held_elsewhere(model, {key: held[0][0] for key, held in done.items()})
  return model


@torch.no_grad()
def decompress(model: nn.Module, include: str | Iterable[str] | None = None) -> nn.Module:
  """Put float weights in the place of codes, in place: the values that the codes stand for, with quantizers folded. Outputs stay.

  Nothing of the calibration of these weights is left; calibrate again to quantize them anew.

  Args:
    model: a quantized model.
    include: a pattern, or several, of layers; None takes every compressed layer.

  Returns:
    The same model.

  Raises:
    ValueError: the model is not quantized, or a pattern matches no layer.
  """
  modules = _modules(model)
  shared: dict[int, nn.Parameter] = {}
  for name in compression.selected(include, list(modules)):
    module = modules[name]
    if module.packed_weight is not None:
      _restore(module, shared)
  return model


def is_compressed(model: nn.Module) -> bool:
  """Whether any weight of the model is held as codes."""
  return bool(compressed_layers(model))


def compression_report(model: nn.Module) -> CompressionReport:
  """What the model takes in memory, weight by weight. `.print()` shows it as a table."""
  rows, seen = [], set()
  for name, module in _modules(model).items():
    held = module.packed_weight
    owner = held if held is not None else module._parameters.get("weight")
    if owner is None or id(owner) in seen:
      continue
    seen.add(id(owner))
    rows.append(_size(name, module, held))
  scales = [t for m in model.modules() if isinstance(m, TensorQuantizer) and m.scales is not None for t in m.scales if t is not None]
  everything = {id(t): t for t in (*model.parameters(), *model.buffers(), *scales)}
  total = sum(t.numel() * t.element_size() for t in everything.values())
  return CompressionReport(tuple(rows), total - sum(row.nbytes for row in rows))


def print_compression_report(model: nn.Module) -> CompressionReport:
  """Print bytes and bits per weight of every layer, and the totals."""
  report = compression_report(model)
  report.print()
  return report


def _modules(model: nn.Module) -> dict[str, QuantWeight]:
  if not is_quantized(model):
    raise ValueError("the model has no quantized modules; call quantize(model, config, forward_loop) first")
  return {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}


def _size(name: str, module: QuantWeight, held: PackedWeight | None) -> WeightSize:
  if held is not None:
    return WeightSize(name, _format(module), held.shape, held.nbytes, math.prod(held.shape) * held.like.element_size(), True)
  weight = module._parameters["weight"]
  assert weight is not None
  size = weight.numel() * weight.element_size()
  return WeightSize(name, "", tuple(module.canonical(weight.detach()).shape), size, size, False)


def _format(module: QuantWeight) -> str:
  return " then ".join(q.config.describe() for q in tensor_quantizers(module.weight_quantizer))


def _refusal(module: QuantWeight) -> str | None:
  """Why a layer cannot be compressed, as far as its tensors and settings say; None where it can."""
  quantizers = tensor_quantizers(module.weight_quantizer)
  weight = module._parameters.get("weight")
  if weight is None:
    return "its weight is not a parameter of the layer (weight_norm, a parametrization)"
  if weight.is_meta:
    return "its weight is on the meta device and has no values"
  if not weight.numel():
    return "its weight has no values"
  if not all(q.is_enabled and q.is_quantizing and not q.is_calibrating for q in quantizers):
    return "not all quantizers of its weight are quantizing (one is off, or calibration is on)"
  return compression.refusal([q.spec for q in quantizers])


def _replace(module: QuantWeight, done: dict[int, list[tuple[Tensor, PackedWeight]]], matmul: str | None) -> str | None:
  """Put codes in the place of a layer's weight, if they stand for what the simulation computes; else the reason why not."""
  weight = module._parameters["weight"]
  assert weight is not None
  expected = module.compute_weight().detach()
  q, offset = tensor_quantizers(module.weight_quantizer)[0].codes(module.canonical(weight.detach()))
  held = PackedWeight(core.pack_tensor(q), offset, weight)
  held.matmul = matmul
  held.requires_grad_weight = weight.requires_grad
  same = next((other for _, other in done.get(id(weight), []) if _same_state(held, other)), None)
  module.packed_weight = held if same is None else same
  del module._parameters["weight"]
  if not same_bits(module.compute_weight(), expected):
    module.packed_weight = None
    _insert(module, weight)
    return compression.NOT_EQUAL
  module.drop_kept_weight()
  tensor_quantizers(module.weight_quantizer)[0].drop_block_amax()
  if same is None:
    done.setdefault(id(weight), []).append((weight, held))
  return None


def _restore(module: QuantWeight, shared: dict[int, nn.Parameter]) -> None:
  held = module.packed_weight
  assert held is not None
  value = module.compute_weight().detach().contiguous()
  parameter = shared.get(id(held))
  if parameter is None or not same_bits(parameter.detach(), value):
    parameter = shared[id(held)] = nn.Parameter(value, requires_grad=held.requires_grad_weight)
  module.packed_weight = None
  _insert(module, parameter)
  module.weight_quantizer.set_folded()


def _insert(module: nn.Module, weight: nn.Parameter) -> None:
  """The parameter "weight" in front of the others, where it was."""
  rest = {name: value for name, value in module._parameters.items() if name != "weight"}
  module._parameters.clear()
  module._parameters.update({"weight": weight, **rest})


def same_bits(a: Tensor, b: Tensor) -> bool:
  """Whether two tensors hold the same bits."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  bits = _BITS[a.element_size()]
  return bool(torch.equal(a.contiguous().view(bits), b.contiguous().view(bits)))


def _same_state(a: PackedWeight, b: PackedWeight) -> bool:
  if (a.spec, a.shape, a.dtype, a.matmul) != (b.spec, b.shape, b.dtype, b.matmul):
    return False
  return all(
    (x is None) == (y is None) and (x is None or y is None or torch.equal(x, y))
    for x, y in zip(a.buffers_by_name().values(), b.buffers_by_name().values(), strict=True)
  )


def _warn_held_elsewhere(model: nn.Module, weights: dict[int, Tensor]) -> None:
  holders = [
    f"{path}.{name}"
    for path, module in model.named_modules()
    for name, p in module._parameters.items()
    if p is not None and id(p) in weights
  ]
  if holders:
    warnings.warn(
      f"weights that were compressed are still held as floats by modules that share them: {', '.join(holders[:5])}; they are not freed",
      ConfigWarning,
      stacklevel=4,
    )
