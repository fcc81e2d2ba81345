"""save and restore: a quantized model as files that either backend reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import core
from core import state as files
from core.config.rules import Resolved
from core.state import Leaf, Packed, State, Tensor
from torch_backend import edit
from torch_backend.convert import convert
from torch_backend.modules import QuantWeight
from torch_backend.names import is_quantized, quantizers, walk
from torch_backend.packed import TENSORS, PackedWeight
from torch_backend.parameters import note_untied
from torch_backend.quantizer import TensorQuantizer
from torch_backend.quantizer_state import QuantizerState
from torch_backend.sequential import tensor_quantizers
from torch_backend.snapshot import restored_on_error

DTYPES: dict[str, torch.dtype] = {
  "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
  "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
  "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A quantizer's tensors under the names of its buffers; those of the low-rank branch are parameters.
_BUFFERS = {"amax": "_amax", "tensor_amax": "_tensor_amax", "pre_quant_scale": "_pre_quant_scale", "bias": "_bias_value"}


def save(
  model: nn.Module, directory: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None
) -> Path:
  """Save a quantized model: its parameters and buffers, and all that its quantizers know.

  The files hold tensors and JSON, nothing that runs; `restore` of either backend reads them. An earlier state in the directory is
  replaced in one step, other files there are left alone.

  Args:
    model: a quantized model.
    directory: made if need be.
    config: kept as the quantization config; None keeps the one that `quantize` was given.
    metadata: whatever else is to be kept, of values that JSON can hold: a text's hash, measured numbers.

  Returns:
    The directory.

  Raises:
    ValueError: the model is not quantized, is being calibrated, or holds what the files cannot.
    OSError: the directory cannot be written.
  """
  return files.write(state_of(model, config, metadata), directory)


def restore(model: nn.Module, directory: str | os.PathLike[str], *, adopt_dtype: bool = False) -> nn.Module:
  """Make a model the one that was saved, in place. If anything is wrong, the model is left as it was.

  Args:
    model: of the same architecture, float or already quantized; whatever quantizers it has start over.
    directory: what `save` of either backend wrote.
    adopt_dtype: parameters take the type that was saved, where the model has another.

  Returns:
    The same model.

  Raises:
    ValueError: the files are damaged or do not fit the model; names what.
    OSError: a file is missing or cannot be read.
  """
  if not isinstance(model, nn.Module):
    raise TypeError(f"restore takes an nn.Module, got {type(model).__name__}")
  state = files.read(directory)
  with restored_on_error(model):
    apply(model, state, adopt_dtype)
  return model


# -- model -> state --------------------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module, config: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None) -> State:
  """What `save` writes; the tensors are views of the model's own.

  Raises:
    ValueError: as `save`.
  """
  if not is_quantized(model):
    raise ValueError("the model has no quantized modules; call quantize(model, config, forward_loop) first")
  found, tied = {}, {}
  first: dict[int, str] = {}
  for name, module, leaf, held in _tensors(model):
    if (known := first.setdefault(id(held), name)) != name:
      tied[name] = known
    else:
      found[name] = _tensor(name, _canonical(module, leaf, held.detach()))
  packed = {}
  for name, module in model.named_modules():
    if isinstance(module, QuantWeight) and (held := module.packed_weight) is not None:
      full = f"{name}.weight" if name else "weight"
      if (known := first.setdefault(id(held), full)) != full:
        tied[full] = known
      else:
        packed[full] = _packed(full, held)
  leaves = {name: tuple(_leaf(one) for one in tensor_quantizers(q)) for name, q in quantizers(model).items()}
  given = model.__dict__.get("_quantization_config") if config is None else config
  return State("torch", found, leaves, packed, tied, files.plain(given, "config"), dict(metadata or {}), files.versions())


def _tensors(model: nn.Module) -> list[tuple[str, nn.Module, str, torch.Tensor]]:
  """(name, module, name in the module, tensor) of all parameters and persistent buffers that are no quantizer's."""
  found = []
  for path, module in model.named_modules():
    if isinstance(module, QuantizerState | PackedWeight):
      continue
    held = {**module._parameters, **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}}
    for leaf, tensor in held.items():
      if tensor is not None:
        found.append((f"{path}.{leaf}" if path else leaf, module, leaf, tensor))
  return found


def _canonical(module: nn.Module, leaf: str, held: torch.Tensor) -> torch.Tensor:
  return module.canonical(held) if isinstance(module, QuantWeight) and leaf == "weight" else held


def _tensor(name: str, held: torch.Tensor) -> Tensor:
  dtype = _NAMES.get(held.dtype)
  if dtype is None or held.is_meta:
    what = "on the meta device, without data" if held.is_meta else f"of type {held.dtype}"
    raise ValueError(f"tensor {name!r} is {what} and cannot be kept; allowed are {', '.join(map(str, _NAMES))}")
  return Tensor(dtype, tuple(held.shape), lambda: _bytes(held, dtype))


def _packed(name: str, held: PackedWeight) -> Packed:
  parts = {part: _tensor(f"{name}.{part}", t) for part, t in held.buffers_by_name().items() if t is not None}
  return Packed(held.spec, _NAMES[held.dtype], held.shape, parts, held.matmul)


def _bytes(held: torch.Tensor, dtype: str) -> np.ndarray:
  carrier = files.CARRIERS[dtype]
  flat = held.detach().cpu().contiguous().reshape(-1)
  return flat.view(torch.uint8).numpy().view(carrier).reshape(held.shape)


def _leaf(one: TensorQuantizer) -> Leaf:
  if one.is_calibrating:
    raise ValueError(f"quantizer {one.name!r} is collecting statistics; finish calibration (load_calib_amax, disable_calib) before saving")
  held = {field: one._buffers[buffer] for field, buffer in _BUFFERS.items()} | {"low_rank_a": one.low_rank_a, "low_rank_b": one.low_rank_b}
  tensors = {field: _tensor(f"{one.name}.{field}", value.detach()) for field, value in held.items() if value is not None}
  mode = "folded" if one.is_folded else "off" if not one.is_enabled else "quantize" if one.is_quantizing else "pass"
  key = None if one._key is None else (int(one._key[0]), int(one._key[1]))
  return Leaf(one.config, mode, one.group, tensors, one.own_tensor_amax, key)


# -- state -> model --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def apply(model: nn.Module, state: State, adopt_dtype: bool) -> None:
  """Put a state into a model. Tensors are replaced, not written into, so that `restored_on_error` can put the old ones back.

  Raises:
    ValueError: it does not fit.
  """
  convert(model)
  _unpack(model)
  held = _tensors(model)
  shapes = {name: (_dtype_name(name, t), tuple(_canonical(m, leaf, t).shape)) for name, m, leaf, t in held}
  layers = {f"{n}.weight" if n else "weight" for n, m in model.named_modules() if isinstance(m, QuantWeight)}
  wanted = files.check_tensors(state, shapes, adopt_dtype, layers)
  places = {name: (quantizer, parent) for name, quantizer, parent in walk(model)}
  files.check_quantizers(state, places)
  for name in places:
    for leaf in state.quantizers.get(name, ()):
      weight = shapes.get(f"{name.rpartition('.')[0]}.weight".lstrip("."))
      files.check_leaf(name, leaf, weight[1] if name.endswith("weight_quantizer") and weight is not None else None)
  edit.reset(model)
  for name, quantizer, parent in list(walk(model)):
    if name in state.quantizers:
      _set_quantizer(name, quantizer, parent, state.quantizers[name])
  _set_tensors(model, held, wanted, state)
  for module in model.modules():
    if isinstance(module, QuantWeight):
      module.drop_kept_weight()
  model.__dict__["_quantization_config"] = state.config


def _unpack(model: nn.Module) -> None:
  """Room for float weights where the model holds codes."""
  made: dict[int, nn.Parameter] = {}
  for module in model.modules():
    if isinstance(module, QuantWeight) and (held := module.packed_weight) is not None:
      if id(held) not in made:
        empty = torch.empty(held.shape, dtype=held.dtype, device=held.like.device)
        made[id(held)] = nn.Parameter(module.stored(empty).contiguous(), requires_grad=held.requires_grad_weight)
      module.packed_weight = None
      module._parameters["weight"] = made[id(held)]


def _dtype_name(name: str, held: torch.Tensor) -> str:
  if isinstance(held, nn.UninitializedParameter):
    raise ValueError(f"parameter {name!r} is not initialized yet; run the model once before restoring")
  return _NAMES.get(held.dtype, str(held.dtype))


def _set_quantizer(name: str, quantizer: Any, parent: nn.Module, leaves: tuple[Leaf, ...]) -> None:
  enable = any(leaf.mode in ("quantize", "pass") for leaf in leaves)
  made = edit._set(parent, name, quantizer, Resolved(tuple(leaf.config for leaf in leaves), enable))
  device = next((p.device for p in parent.parameters()), torch.device("cpu"))
  for one, leaf in zip(tensor_quantizers(made), leaves, strict=True):
    one.reset_amax()
    one.group, one.own_tensor_amax = leaf.group, leaf.own_tensor_amax
    values = {field: tensor_from(value).to(device) for field, value in leaf.tensors.items()}
    if "amax" in values:
      one.amax = values["amax"]
    if "tensor_amax" in values:
      one.tensor_amax = values["tensor_amax"]
    one.pre_quant_scale = values.get("pre_quant_scale")
    one._bias_value = values.get("bias")
    if "low_rank_a" in values:
      one.low_rank_a, one.low_rank_b = nn.Parameter(values["low_rank_a"]), nn.Parameter(values["low_rank_b"])
    if leaf.key is not None and one._key is not None:
      one._key = torch.tensor(leaf.key, dtype=torch.int32, device=device)
    one.own_tensor_amax = leaf.own_tensor_amax
    _set_mode(one, leaf.mode)


def _set_mode(one: TensorQuantizer, mode: str) -> None:
  one.enable() if mode in ("quantize", "pass") else one.disable()
  one.disable_quant() if mode == "pass" else one.enable_quant()
  if mode == "folded":
    one.set_folded()


def tensor_from(saved: Tensor) -> torch.Tensor:
  """A saved tensor, with memory of its own."""
  raw = np.array(saved.load(), order="C")
  return torch.from_numpy(raw.reshape(-1).view(np.uint8)).view(DTYPES[saved.dtype]).reshape(saved.shape)


def _set_tensors(
  model: nn.Module, held: list[tuple[str, nn.Module, str, torch.Tensor]], wanted: Mapping[str, Tensor | Packed], state: State
) -> None:
  done: dict[int, tuple[str, np.ndarray]] = {}
  packed: dict[str, PackedWeight] = {}
  for name, module, leaf, old in held:
    saved = wanted.get(name)
    if saved is None:
      continue
    if isinstance(saved, Packed):
      key = state.tied.get(name, name)
      if key not in packed:
        packed[key] = _packed_weight(saved, old)
      module.packed_weight = packed[key]
      del module._parameters[leaf]
      tensor_quantizers(module.weight_quantizer)[0].drop_block_amax()  # type: ignore[union-attr, arg-type]
      continue
    if id(old) in done:  # two names of one parameter: still one, unless two different values were saved
      other, raw = done[id(old)]
      if state.tied.get(name, name) == state.tied.get(other, other) or np.array_equal(raw, saved.load().reshape(-1).view(np.uint8)):
        continue
      module._parameters[leaf] = nn.Parameter(_stored(module, leaf, saved, old), requires_grad=old.requires_grad)
      note_untied(model)
      continue
    new = _stored(module, leaf, saved, old)
    if isinstance(old, nn.Parameter):
      old.data = new
      done[id(old)] = (name, saved.load().reshape(-1).view(np.uint8))
    else:
      module._buffers[leaf] = new


def _packed_weight(saved: Packed, old: torch.Tensor) -> PackedWeight:
  parts = {part: tensor_from(tensor).to(old.device) for part, tensor in saved.tensors.items()}
  four = [parts.get(part) for part in TENSORS[:4]]
  made = PackedWeight(
    core.PackedTensor(*four, saved.spec, saved.shape),  # type: ignore[arg-type]
    parts.get("offset"),
    torch.empty(0, dtype=DTYPES[saved.dtype], device=old.device),
  )
  made.requires_grad_weight = old.requires_grad
  made.matmul = saved.matmul
  return made


def _stored(module: nn.Module, leaf: str, saved: Tensor, old: torch.Tensor) -> torch.Tensor:
  value = tensor_from(saved)
  if isinstance(module, QuantWeight) and leaf == "weight":
    value = module.stored(value).contiguous()
  return value.to(old.device)
