"""Changing quantizers after conversion: by rules, by pattern, by function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from core import compression
from core.config import ConfigWarning, Entry, Resolved, initial_state, matches_name, normalize_entries, resolve, unmatched_patterns
from torch_backend.modules import QuantWeight
from torch_backend.names import parent_classes, quantizers, walk
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import Quantizer, SequentialQuantizer, tensor_quantizers

Which = str | Callable[[str], bool]


def set_quantizer_by_cfg(model: nn.Module, quant_cfg: Any) -> None:
  """Apply rules to a quantized model, in place. Quantizers that no rule matches stay as they are.

  A changed format drops the quantizer's amax; calibrate again.

  Args:
    model: a quantized model.
    quant_cfg: the value of "quant_cfg" in a configuration, list or dict form.

  Raises:
    ValueError: a wrong rule; names key, value and what is allowed.
  """
  entries = normalize_entries(quant_cfg)
  apply(model, entries)
  missing = unmatched_patterns(entries, names_with_classes(model))
  if missing:
    warnings.warn(f"patterns that match no quantizer: {', '.join(map(repr, missing))}; {_known(model)}", ConfigWarning, stacklevel=2)


def enable_quantizer(model: nn.Module, which: Which) -> None:
  """Switch quantizers on.

  Args:
    model: a quantized model.
    which: a pattern such as "*input_quantizer", or a function from the quantizer's name to bool.
  """
  for quantizer in _select(model, which):
    quantizer.enable()


def disable_quantizer(model: nn.Module, which: Which) -> None:
  """Switch quantizers off; see `enable_quantizer`."""
  for quantizer in _select(model, which):
    quantizer.disable()


def names_with_classes(model: nn.Module) -> dict[str, tuple[str, ...]]:
  """Quantizer name -> names of the classes that its module is an instance of."""
  return {name: parent_classes(parent) for name, _, parent in walk(model)}


def reset(model: nn.Module) -> None:
  """Every quantizer as before any rule: off, its default format, no statistics."""
  for name, quantizer, parent in list(walk(model)):
    for one in tensor_quantizers(_set(parent, name, quantizer, initial_state(name))):
      one.reset_amax()
      one.pre_quant_scale = None
      one.set_low_rank(None, None)


def apply(model: nn.Module, entries: Iterable[Entry]) -> None:
  """Set every quantizer that some entry matches to what the entries make of it."""
  entries = tuple(entries)
  matched = [found for found in walk(model) if any(entry.matches(found[0], parent_classes(found[2])) for entry in entries)]
  compression.refuse_compressed([name for found in matched for name in _held_as_codes(*found)], "changing a weight quantizer")
  for name, quantizer, parent in matched:
    now = Resolved(tuple(one.config for one in tensor_quantizers(quantizer)), quantizer.is_enabled)
    _set(parent, name, quantizer, resolve(entries, name, parent_classes(parent), now))


def _set(parent: nn.Module, name: str, quantizer: Quantizer, state: Resolved) -> Quantizer:
  """Give one position its attribute sets and switch; the number of sets decides between a TensorQuantizer and a sequence."""
  held = tensor_quantizers(quantizer)
  if len(state.configs) != len(held):
    quantizer = _rebuilt(held[0], name, len(state.configs))
    setattr(parent, name.rpartition(".")[2], quantizer)
  for one, config in zip(tensor_quantizers(quantizer), state.configs, strict=True):
    one.set_from_attribute_config(config)
    one.enable() if state.enable else one.disable()
  return quantizer


def _rebuilt(first: TensorQuantizer, name: str, count: int) -> Quantizer:
  made = [first, *(first.sibling() for _ in range(count - 1))]
  quantizer = made[0] if count == 1 else SequentialQuantizer(*made)
  quantizer.name = name
  for place, one in enumerate(made):
    one.name = name if count == 1 else f"{name}.{place}"
  return quantizer


def _select(model: nn.Module, which: Which) -> list[Quantizer]:
  """The quantizers that a pattern or function chooses; warns if there are none.

  Raises:
    TypeError: `which` is neither a string nor a function.
  """
  if not isinstance(which, str) and not callable(which):
    raise TypeError(f"choose quantizers by a pattern such as '*weight_quantizer' or by a function of the name, got {type(which).__name__}")
  chosen = [q for name, q in quantizers(model).items() if (matches_name(which, name) if isinstance(which, str) else which(name))]
  if not chosen:
    what = f"pattern {which!r}" if isinstance(which, str) else "the function"
    warnings.warn(f"{what} matches no quantizer; {_known(model)}", ConfigWarning, stacklevel=3)
  held = [name for name, q, parent in walk(model) if any(q is one for one in chosen) for name in _held_as_codes(name, q, parent)]
  compression.refuse_compressed(held, "switching weight quantizers")
  return chosen


def _held_as_codes(name: str, quantizer: Quantizer, parent: nn.Module) -> list[str]:
  """The name, where the quantizer is that of a compressed weight."""
  is_weight = isinstance(parent, QuantWeight) and quantizer is parent.weight_quantizer
  return [name] if is_weight and parent.packed_weight is not None else []


def _known(model: nn.Module) -> str:
  names = list(quantizers(model))
  return f"there are, for example, {', '.join(map(repr, names[:5]))}" if names else "the model has none; call quantize first"
