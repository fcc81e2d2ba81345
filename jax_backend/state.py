"""save and restore: a quantized model as files that either backend reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from core import state as files
from core.state import Leaf, Packed, State, Tensor
from jax_backend import discover, edit, layouts, packing, tree
from jax_backend.apply import QuantModule
from jax_backend.convert import check_module, example
from jax_backend.edit import is_quantized
from jax_backend.quantizer import CALIBRATE, FOLDED, OFF, PASS, QUANTIZE, AnyQuantizer, Quantizer, SequentialQuantizer
from jax_backend.state_names import PASSING, Slot, Stacks, slots, weight_name
from jax_backend.tree import Path as ModulePath

DTYPES: dict[str, Any] = {
  name: np.dtype(getattr(jnp, word))
  for name, word in {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool_",
  }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MODES = {"quantize": QUANTIZE, "pass": PASS, "off": OFF, "folded": FOLDED}


def save(
  qmodule: QuantModule,
  qvariables: Mapping[str, Any],
  directory: str | os.PathLike[str],
  *,
  config: Mapping[str, Any] | None = None,
  metadata: Mapping[str, Any] | None = None,
) -> Path:
  """Save a quantized model: its parameters, its other collections and all that its quantizers know.

  The files hold tensors and JSON, nothing that runs; `restore` of either backend reads them. An earlier state in the directory is
  replaced in one step, other files there are left alone. Collections of a single call (intermediates, cache) are not saved.

  Args:
    qmodule: what `quantize` returned.
    qvariables: its variables.
    directory: made if need be.
    config: kept as the quantization config; None keeps the one that `quantize` was given.
    metadata: whatever else is to be kept, of values that JSON can hold: a text's hash, measured numbers.

  Returns:
    The directory.

  Raises:
    ValueError: the variables have no quantizers, are being calibrated, or hold what the files cannot.
    OSError: the directory cannot be written.
  """
  return files.write(state_of(qmodule, qvariables, config, metadata), directory)


def restore(
  module: nn.Module | QuantModule,
  variables: Mapping[str, Any],
  directory: str | os.PathLike[str],
  *,
  example_inputs: Any = None,
  adopt_dtype: bool = False,
) -> tuple[QuantModule, dict[str, Any]]:
  """The model that was saved. Nothing that is given is changed.

  Args:
    module: of the same architecture; what `quantize` returned will do as well.
    variables: float or already quantized; whatever quantizers they have start over. Arrays or jax.ShapeDtypeStruct
      (`jax.eval_shape(module.init, ...)`). Collections of a single call (cache) are passed on.
    directory: what `save` of either backend wrote.
    example_inputs: as in `quantize`, so that layers are found; None guesses inputs from the parameters.
    adopt_dtype: parameters take the type that was saved, where the variables have another.

  Returns:
    (qmodule, qvariables).

  Raises:
    ValueError: the files are damaged or do not fit the model; names what.
    OSError: a file is missing or cannot be read.
  """
  inner = module.module if isinstance(module, QuantModule) else module
  check_module(inner, variables)
  return apply(inner, variables, files.read(directory), example_inputs, adopt_dtype)


# -- model -> state --------------------------------------------------------------------------------------------------------------------


def state_of(
  qmodule: QuantModule, qvariables: Mapping[str, Any], config: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None
) -> State:
  """What `save` writes.

  Raises:
    ValueError: as `save`.
  """
  if not is_quantized(qvariables):
    raise ValueError("these variables have no quantizers; call quantize(module, variables, config, forward_loop) first")
  stacks = Stacks(qvariables["quant"], qvariables["params"])
  found = {}
  held = {(c, path): leaf for c in qvariables if c not in PASSING for path, leaf in tree.leaves(qvariables[c])}
  for name, slot in slots(qvariables, stacks).items():
    found[name] = _parameter(name, held[slot.collection, slot.path], slot)
  leaves: dict[str, tuple[Leaf, ...]] = {}
  packed = {}
  for path, role, quantizer in tree.items(qvariables["quant"]):
    for index, owner in stacks.copies(path):
      first = quantizer.leaves[0]
      if first.packed is not None:
        packed[weight_name(owner, str(quantizer.param))] = packing.to_files(first, index, _NAMES[np.dtype(first.packed.dtype)])
      name = f"{owner}.{role}" if owner else role
      leaves[name] = tuple(_leaf(name, q, index, stacks, path) for q in quantizer.leaves)
  given = qmodule.config if config is None else config
  return State("jax", found, leaves, packed, {}, files.plain(given, "config"), dict(metadata or {}), files.versions())


def _parameter(name: str, held: Any, slot: Slot) -> Tensor:
  return Tensor(_dtype_name(name, held.dtype), slot.shape, lambda: _bytes(slot.to_torch(jnp.asarray(held))))


def _dtype_name(name: str, dtype: Any) -> str:
  known = _NAMES.get(np.dtype(dtype))
  if known is None:
    raise ValueError(f"parameter {name!r} is of type {dtype} and cannot be kept; allowed are {', '.join(map(str, _NAMES))}")
  return known


def _bytes(value: Any) -> np.ndarray:
  array = np.ascontiguousarray(np.asarray(value))
  return array.reshape(-1).view(np.uint8).view(files.CARRIERS[_NAMES[array.dtype]]).reshape(np.shape(value))


def _leaf(name: str, q: Quantizer, index: tuple[int, ...], stacks: Stacks, path: ModulePath) -> Leaf:
  if q.mode == CALIBRATE:
    raise ValueError(f"quantizer {name!r} is collecting statistics; finish calibration before saving")
  tensors = {}
  for field in files.FIELDS:
    value = getattr(q, field)
    if value is not None and not (field == "tensor_amax" and q.spec.dynamic):  # dynamic two-level: amax is the tensor amax
      copy = np.asarray(value)[index]
      tensors[field] = Tensor(_dtype_name(name, copy.dtype), copy.shape, lambda copy=copy: _bytes(copy))
  mode = next(word for word, mode in _MODES.items() if mode == q.mode)
  group = None if q.group is None else stacks.numbered(q.group, path, index)
  return Leaf(q.config, mode, group, tensors)


# -- state -> model --------------------------------------------------------------------------------------------------------------------


def apply(
  module: nn.Module, variables: Mapping[str, Any], state: State, example_inputs: Any, adopt_dtype: bool
) -> tuple[QuantModule, dict[str, Any]]:
  """A state put into a model.

  Raises:
    ValueError: it does not fit.
  """
  variables = packing.with_room(variables)
  quant = _blank(module, variables, example_inputs)
  base = {**variables, "quant": quant}
  stacks = Stacks(quant, variables["params"])
  held = {(c, path): leaf for c in variables if c not in PASSING for path, leaf in tree.leaves(variables[c])}
  found = slots(base, stacks)
  shapes = {name: (_NAMES.get(np.dtype(held[s.collection, s.path].dtype), "?"), s.shape) for name, s in found.items()}
  layers = {
    weight_name(owner, str(q.param)): (path, role, index)
    for path, role, q in tree.items(quant)
    if q.param is not None
    for index, owner in stacks.copies(path)
  }
  wanted = files.check_tensors(state, shapes, adopt_dtype, layers)
  copies = {
    (path, role): [(index, f"{owner}.{role}" if owner else role) for index, owner in stacks.copies(path)]
    for path, role, _ in tree.items(quant)
  }
  files.check_quantizers(state, [name for names in copies.values() for _, name in names])
  made = {}
  for path, role, quantizer in tree.items(quant):
    weight = next((s.shape for s in found.values() if s.path == (*path, quantizer.param)), None)
    made[path, role] = _quantizer(quantizer, copies[path, role], state, stacks, path, weight)
  plain = {name: tensor for name, tensor in wanted.items() if isinstance(tensor, Tensor)}
  packed = {layers[name]: (found[name], weight) for name, weight in wanted.items() if isinstance(weight, Packed)}
  filled = {**base, **_filled(variables, held, found, plain), "quant": tree.build(made)}
  return QuantModule(module, state.config), packing.with_codes(filled, packed, {k: v.shape for k, v in held.items()})


def _blank(module: nn.Module, variables: Mapping[str, Any], example_inputs: Any) -> dict[str, Any]:
  """The model's quantizers as before any rule: off, without statistics."""
  if is_quantized(variables):
    held = {(path, name): (name, q.leaves[0]) for path, name, q in tree.items(variables["quant"])}
    return tree.build(
      {key: Quantizer(edit._default(name), OFF, q.layout, q.param, q.parent_classes, q.stack) for key, (name, q) in held.items()}
    )
  plain = dict(variables)
  args, kwargs = example(example_inputs) if example_inputs is not None else (discover.guess_inputs(module, plain), {})
  return tree.build(edit.create(discover.trace(module, plain, args, kwargs, rngs=None, method=None, mutable=False), ()))


def _quantizer(
  blank: AnyQuantizer,
  copies: list[tuple[tuple[int, ...], str]],
  state: State,
  stacks: Stacks,
  path: ModulePath,
  weight: tuple[int, ...] | None,
) -> AnyQuantizer:
  known = [(index, name, state.quantizers[name]) for index, name in copies if name in state.quantizers]
  if not known:
    return blank
  if len(known) != len(copies):
    absent = [name for _, name in copies if name not in state.quantizers]
    raise ValueError(f"the state has {known[0][1]!r} and lacks {absent[0]!r}; the layers of a stack are saved together")
  index, first, leaves = known[0]
  for _, name, other in known:
    for leaf in other:
      files.check_leaf(name, leaf, weight if blank.param is not None else None)
    if [(x.config, x.mode) for x in other] != [(x.config, x.mode) for x in leaves]:
      raise ValueError(
        f"{first!r} and {name!r} were saved with different formats or switches; the layers of a scanned or vmapped stack share one; "
        "unroll the stack to give layers formats of their own"
      )
  made = []
  for place, leaf in enumerate(leaves):
    group = None if leaf.group is None else stacks.unnumbered(leaf.group, path, index)
    q = blank.leaves[0].replace(config=leaf.config, mode=_MODES[leaf.mode], group=group)
    every = {name: (i, one[place]) for i, name, one in known}
    values = {
      field: _stacked(field, every, tuple(max(i) + 1 for i in zip(*(i for i, _ in every.values()), strict=True))) for field in files.FIELDS
    }
    q = q.with_amax(values.pop("amax"), values.pop("tensor_amax"))
    made.append(q.replace(**values))
  return made[0] if len(made) == 1 else SequentialQuantizer(tuple(made))


# What takes the place of a tensor that one copy of a stack lacks and another has: a factor of 1, a low-rank branch of nothing.
_NEUTRAL = {"pre_quant_scale": 1.0, "low_rank_a": 0.0, "low_rank_b": 0.0}


def _stacked(field: str, every: Mapping[str, tuple[tuple[int, ...], Leaf]], sizes: tuple[int, ...]) -> Any:
  """One tensor of a quantizer, the copies of a stack in front."""
  held = {name: leaf.tensors[field] for name, (_, leaf) in every.items() if field in leaf.tensors}
  if not held:
    return None
  shapes = {t.shape for t in held.values()}
  absent = [name for name in every if name not in held]
  largest = tuple(max(n) for n in zip(*shapes, strict=True)) if len({len(s) for s in shapes}) == 1 else None
  if largest is None or ((absent or len(shapes) > 1) and field not in _NEUTRAL):
    what = f"{absent[0]!r} has none" if absent else f"shapes {sorted(map(list, shapes))}"
    raise ValueError(f"the layers of one stack have different {field}: {what}; unroll the stack")
  dtype = DTYPES[next(iter(held.values())).dtype]
  stacked = np.full((*sizes, *largest), _NEUTRAL.get(field, 0.0), dtype)
  for name, (index, _) in every.items():
    if name in held:
      stacked[(*index, *(slice(n) for n in held[name].shape))] = array(held[name])
  return jnp.asarray(stacked)


def array(saved: Tensor) -> np.ndarray:
  """A saved tensor with memory of its own, in numpy's or ml_dtypes' type of that name."""
  raw = np.array(saved.load(), order="C")
  return raw.reshape(-1).view(np.uint8).view(DTYPES[saved.dtype]).reshape(saved.shape)


def _filled(
  variables: Mapping[str, Any], held: Mapping[Any, Any], found: Mapping[str, Slot], wanted: Mapping[str, Tensor]
) -> dict[str, Any]:
  """The collections with the saved tensors in them."""
  parts: dict[tuple[str, ModulePath], list[tuple[Slot, Tensor]]] = {}
  for name, slot in found.items():
    if name in wanted:
      parts.setdefault((slot.collection, slot.path), []).append((slot, wanted[name]))
  filled = {name: value for name, value in variables.items() if name in {collection for collection, _ in parts}}
  for (collection, path), copies in parts.items():
    filled[collection] = tree.replaced(filled[collection], path, _assembled(held[collection, path], copies))
  return filled


def _assembled(old: Any, copies: list[tuple[Slot, Tensor]]) -> Any:
  """One stored parameter from its copies, where the old one was."""
  first = copies[0][0]
  dtype = DTYPES[copies[0][1].dtype]
  one = tuple(n for i, n in enumerate(old.shape) if i not in first.stack)
  front = np.empty((*(old.shape[axis] for axis in first.stack), *one), dtype)
  for slot, saved in copies:
    seen = layouts.view(one, slot.layout.of(len(one)), torch_order=True)
    torch_shape = tuple(int(np.prod([one[a] for a in axes])) for axes in slot.layout.of(len(one)))
    front[slot.index] = _leave(array(saved).reshape(torch_shape), seen, one)
  value = np.moveaxis(front, range(len(first.stack)), first.stack) if first.stack else front
  new = jnp.asarray(value)
  if new.dtype != dtype:
    raise ValueError(f"parameter {'/'.join(first.path)!r} was saved as {dtype}, which JAX holds only with jax_enable_x64")
  return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new


def _leave(y: np.ndarray, seen: layouts.View, shape: tuple[int, ...]) -> np.ndarray:
  """`layouts.leave` for numpy arrays: no trace, no copy on a device."""
  if seen.transpose is None:
    return y.reshape(shape)
  moved = tuple(shape[a] for a in seen.transpose)
  return np.transpose(y.reshape(moved), np.argsort(seen.transpose))


# -- flax.serialization ----------------------------------------------------------------------------------------------------------------


def _to_state_dict(quantizer: Quantizer) -> dict[str, Any]:
  return {field: value for field in files.FIELDS if (value := getattr(quantizer, field)) is not None}


def _from_state_dict(quantizer: Quantizer, held: Mapping[str, Any]) -> Quantizer:
  """The quantizer with the arrays of a checkpoint; formats and switches are those of the target."""
  own = _to_state_dict(quantizer)
  if set(own) != set(held) or any(np.shape(own[field]) != np.shape(held[field]) for field in own):
    raise ValueError(
      f"a quantizer ({quantizer.config.describe()}) of the checkpoint has {_shapes(held)}, the target has {_shapes(own)}; make the target "
      "with restore() from files that were saved with this checkpoint"
    )
  values = {field: jnp.asarray(value) for field, value in held.items()}
  given = quantizer.with_amax(values.pop("amax", None), values.pop("tensor_amax", None))
  return given.replace(**values)


def _shapes(held: Mapping[str, Any]) -> str:
  return ", ".join(f"{field} {list(np.shape(value))}" for field, value in held.items()) or "no arrays"


def _register() -> None:
  serialization.register_serialization_state(Quantizer, _to_state_dict, _from_state_dict, override=True)
  serialization.register_serialization_state(
    SequentialQuantizer,
    lambda sequence: {str(i): _to_state_dict(q) for i, q in enumerate(sequence.children)},
    lambda sequence, held: SequentialQuantizer(tuple(_from_state_dict(q, held[str(i)]) for i, q in enumerate(sequence.children))),
    override=True,
  )


_register()
