"""Creating quantizers from rules, and changing them later: by rules, by pattern, by function. Everything returns new variables."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from core import compression
from core.config import ConfigWarning, matching, rules
from core.config.rules import Entry, Resolved
from core.config.schema import QuantizerConfig
from jax_backend import tree
from jax_backend.discover import Found
from jax_backend.interceptors import INPUT, OUTPUT
from jax_backend.layouts import Layout
from jax_backend.quantizer import FOLDED, OFF, QUANTIZE, AnyQuantizer, Quantizer, SequentialQuantizer
from jax_backend.tree import Path

Which = str | Callable[[str], bool]
Entries = dict[tuple[Path, str], AnyQuantizer]


def create(found: Iterable[Found], entries: Iterable[Entry]) -> Entries:
  """Quantizers of the modules that a trace has found, set by the rules.

  Raises:
    ValueError: a rule gives layers of one scanned stack different formats.
  """
  entries = tuple(entries)
  made: Entries = {}
  for module in found:
    for name, param, layout in _slots(module):
      start = Quantizer(_default(name), OFF, layout, param, module.parent_classes, module.stack)
      raw = "/".join((*module.path, name))
      resolved = _checked(rules.resolve(entries, raw, module.parent_classes), raw)
      if module.sizes:
        check_one_format(entries, module.path, name, module, resolved)
      aval = module.input_aval if name == INPUT else None
      indices = aval is not None and not jnp.issubdtype(aval.dtype, jnp.floating)
      made[module.path, name] = configured(start, resolved, force_off=indices, sizes=module.sizes)
  return made


def _checked(state: Resolved, raw: str) -> Resolved:
  for config in state.configs:
    config.check_simulated(matching.canonical_name(raw))
  return state


def _slots(module: Found) -> list[tuple[str, str | None, Layout]]:
  """(quantizer name, parameter or None, layout) of a module."""
  slots: list[tuple[str, str | None, Layout]] = []
  if module.input is not None:
    slots.append((INPUT, None, module.input))
  names = module.kind.weight_names()
  slots += [(names[param], param, layout) for param, layout in module.weights.items()]
  if module.output is not None:
    slots.append((OUTPUT, None, module.output))
  slots += [(name, None, layout) for name, (layout, _) in module.operands.items()]
  return slots


def _default(name: str) -> QuantizerConfig:
  return rules.initial_state(name).configs[0]


def configured(quantizer: AnyQuantizer, resolved: Resolved, force_off: bool = False, sizes: tuple[int, ...] = ()) -> AnyQuantizer:
  """A quantizer of that state. Another specification drops amax; a constant amax is set."""
  old = quantizer.leaves
  base = old[0]
  children = []
  for i, config in enumerate(resolved.configs):
    same = i < len(old) and len(old) == len(resolved.configs) and old[i].config.spec == config.spec and old[i].config.bias == config.bias
    child = old[i] if same else base.replace(amax=None, tensor_amax=None, scales=None, bias=None)
    mode = QUANTIZE if resolved.enable and not force_off else OFF
    child = child.replace(config=config, mode=mode, statistics=None)
    if config.constant_amax is not None:
      child = child.with_amax(jnp.full(sizes or _sizes(base), config.constant_amax, jnp.float32))
    children.append(child)
  return children[0] if len(children) == 1 else SequentialQuantizer(tuple(children))


def _sizes(quantizer: Quantizer) -> tuple[int, ...]:
  known = next((leaf for leaf in (quantizer.amax, quantizer.tensor_amax) if leaf is not None), None)
  return () if known is None else tuple(known.shape[: len(quantizer.stack)])


def check_one_format(entries: tuple[Entry, ...], path: Path, name: str, module: Found, resolved: Resolved) -> None:
  """A rule that names the stack as a whole holds for each of its layers.

  Raises:
    ValueError: written with a layer's number, the name would get another format: a scanned stack has one body, hence one format.
  """
  whole = "/".join((*path, name))
  for place in range(1, len(path) + 1):
    for layer in range(module.sizes[0]):
      numbered = "/".join((*path[:place], str(layer), *path[place:], name))
      matching = (e for e in entries if any(e.matches(n, module.parent_classes) for n in (whole, numbered)))
      other = rules.resolve((dataclasses.replace(e, quantizer_name="*", parent_class=None) for e in matching), numbered)
      if other != resolved:
        shown = tree.full_name(path, name)
        raise ValueError(
          f"the rules give layer {layer} of {shown!r} another format than the rest ({numbered.replace('/', '.')!r} would be "
          f"{_describe(other)}, the stack {_describe(resolved)}); the {module.sizes[0]} layers of a scanned or vmapped stack share one "
          "body and so one format; unroll the stack to give layers formats of their own"
        )


def _describe(resolved: Resolved) -> str:
  return " then ".join(config.describe() for config in resolved.configs) if resolved.enable else "off"


def quantizers(qvariables: Mapping[str, Any]) -> dict[str, AnyQuantizer]:
  """Dotted name, in torch's spelling -> quantizer. Two Flax paths that would read the same are told apart by their own spelling."""
  named: dict[str, AnyQuantizer] = {}
  for path, name, quantizer in tree.items(_quant(qvariables)):
    full = tree.full_name(path, name)
    named[full if full not in named else ".".join((*path, name))] = quantizer
  return named


def is_quantized(qvariables: Mapping[str, Any]) -> bool:
  """Whether these variables have quantizers."""
  return isinstance(qvariables, Mapping) and "quant" in qvariables


def _quant(qvariables: Mapping[str, Any]) -> Mapping[str, Any]:
  if not is_quantized(qvariables):
    held = f"collections: {', '.join(qvariables) or 'none'}" if isinstance(qvariables, Mapping) else type(qvariables).__name__
    raise ValueError(f"these variables have no quantizers ({held}); call quantize first")
  return qvariables["quant"]


def set_quantizer_by_cfg(qvariables: Mapping[str, Any], quant_cfg: Any) -> dict[str, Any]:
  """Apply rules to quantizers. Those that no rule matches stay as they are; a changed format drops amax, so calibrate again.

  Args:
    qvariables: variables with quantizers.
    quant_cfg: the value of "quant_cfg" in a configuration, list or dict form.

  Returns:
    New variables.

  Raises:
    ValueError: a wrong rule; names key, value and what is allowed.

  Warns:
    ConfigWarning: patterns that match nothing.
  """
  entries = rules.normalize_entries(quant_cfg)
  changed: Entries = {}
  names = []
  for path, name, quantizer in tree.items(_quant(qvariables)):
    raw = "/".join((*path, name))
    names.append((raw, quantizer.parent_classes))
    now = Resolved(tuple(q.config for q in quantizer.leaves), quantizer.is_enabled)
    matched = any(entry.matches(raw, quantizer.parent_classes) for entry in entries)
    if matched:
      _refuse_packed(quantizer, path, name)
      quantizer = configured(quantizer, _checked(rules.resolve(entries, raw, quantizer.parent_classes, now), raw))
    changed[path, name] = quantizer
  missing = [e.label for e in entries if not any(e.matches(*pair) for pair in names)]
  if missing:
    warnings.warn(f"patterns that match no quantizer: {', '.join(map(repr, missing))}", ConfigWarning, stacklevel=2)
  return {**qvariables, "quant": tree.build(changed)}


def enable_quantizer(qvariables: Mapping[str, Any], which: Which) -> dict[str, Any]:
  """Switch quantizers on.

  Args:
    qvariables: variables with quantizers.
    which: a pattern such as "*input_quantizer", or a function from the quantizer's name to bool.

  Returns:
    New variables.

  Warns:
    ConfigWarning: nothing is selected.
  """
  return _switch(qvariables, which, lambda q: q.enable() if q.mode != FOLDED else q)


def disable_quantizer(qvariables: Mapping[str, Any], which: Which) -> dict[str, Any]:
  """Switch quantizers off; see `enable_quantizer`."""
  return _switch(qvariables, which, lambda q: q.disable() if q.mode != FOLDED else q)


def _refuse_packed(quantizer: AnyQuantizer, path: Path, name: str) -> None:
  if quantizer.leaves[0].packed is not None:
    compression.refuse_compressed([tree.full_name(path, name)], "changing a weight quantizer")


def _switch(qvariables: Mapping[str, Any], which: Which, change: Callable[[Any], Any]) -> dict[str, Any]:
  if not (isinstance(which, str) or callable(which)):
    raise TypeError(f"give a pattern such as '*input_quantizer' or a function of the name, got {type(which).__name__}")
  selected = 0
  changed: Entries = {}
  for path, name, quantizer in tree.items(_quant(qvariables)):
    raw = "/".join((*path, name))
    chosen = matching.matches_name(which, raw) if isinstance(which, str) else which(tree.full_name(path, name))
    selected += bool(chosen)
    if chosen:
      _refuse_packed(quantizer, path, name)
    changed[path, name] = change(quantizer) if chosen else quantizer
  if not selected:
    warnings.warn(f"{which!r} selects none of the {len(changed)} quantizers", ConfigWarning, stacklevel=3)
  return {**qvariables, "quant": tree.build(changed)}
