"""Rules at work: the state of each quantizer, and what is said when rules do not do what they seem to.

Both backends come here, so that a configuration means the same, warns the same and fails the same in each.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping

from core.config.algorithms import AlgorithmConfig
from core.config.entries import Entry, QuantConfig, normalize, normalize_entries
from core.config.matching import canonical_name, matches_class, matches_name
from core.config.schema import QuantizerConfig

# Alternatives for several architectures stand side by side in the presets; the ones that a model does not have are no mistake.
ALTERNATIVES = ("*block_sparse_moe*", "*.experts.*", "*.mixer.up_proj.", "*.mixer.down_proj.")
Names = Mapping[str, Iterable[str]] | Iterable[tuple[str, Iterable[str]]]


class ConfigWarning(UserWarning):
  """A configuration that is valid but does not do what it seems to ask for."""


@dataclasses.dataclass(frozen=True)
class Resolved:
  """What the rules make of one quantizer: attribute sets (more than one: sequential) and the switch."""

  configs: tuple[QuantizerConfig, ...]
  enable: bool


def initial_state(name: str) -> Resolved:
  """A quantizer before any rule: off, with INT8 attributes (weights per output channel) should a rule only switch it on."""
  attributes = {"num_bits": 8, "axis": 0} if name.endswith("weight_quantizer") else {"num_bits": 8}
  return Resolved((QuantizerConfig.from_attributes(attributes),), False)


def resolve(entries: Iterable[Entry], name: str, parent_classes: Iterable[str] = (), initial: Resolved | None = None) -> Resolved:
  """The state of one quantizer after all rules, the last one that matches winning.

  A rule with attributes replaces the whole set and switches on unless it says otherwise; one with only `enable` toggles.

  Args:
    entries: rules in order.
    name: its dotted (or slashed) name.
    parent_classes: names of the classes that its module is an instance of.
    initial: state before the rules; None is `initial_state(name)`: off.
  """
  state = initial_state(name) if initial is None else initial
  classes = tuple(parent_classes)
  for entry in entries:
    if entry.matches(name, classes):
      state = Resolved(state.configs if entry.cfg is None else entry.cfg, entry.enables)
  return state


def resolve_all(entries: Iterable[Entry], names_with_classes: Names) -> dict[str, Resolved]:
  """`resolve` for each quantizer: name -> state, in the order given."""
  rules = tuple(entries)
  return {name: resolve(rules, name, classes) for name, classes in _pairs(names_with_classes)}


def _pairs(names_with_classes: Names) -> list[tuple[str, tuple[str, ...]]]:
  pairs = dict(names_with_classes)
  return [(name, tuple(classes)) for name, classes in pairs.items()]


def unmatched_patterns(entries: Iterable[Entry], names_with_classes: Names) -> list[str]:
  """Patterns of enabling rules that no quantizer answers to, as written.

  Rules that switch off are left out (the default-disabled list names what most models do not have), and so are the presets'
  alternatives for other architectures (`ALTERNATIVES`).
  """
  pairs = _pairs(names_with_classes)
  missing = [
    entry.label
    for entry in entries
    if entry.enables and not entry.quantizer_name.startswith(ALTERNATIVES) and not any(entry.matches(*pair) for pair in pairs)
  ]
  return list(dict.fromkeys(missing))


def wants_weights(entries: Iterable[Entry]) -> list[str]:
  """Patterns of the rules that ask for weight quantization and are not taken back by a later rule with the same pattern."""
  last = {(entry.quantizer_name, entry.parent_class): entry for entry in entries}
  return [entry.label for entry in last.values() if entry.enables and "weight_quantizer" in entry.quantizer_name]


def check_effect(entries: Iterable[Entry], names_with_classes: Names, stacklevel: int = 3) -> dict[str, Resolved]:
  """The state of each quantizer, after a check that the rules have an effect.

  Args:
    entries: rules in order.
    names_with_classes: quantizer name -> names of the classes its module is an instance of.
    stacklevel: of the warnings; 3 points at the caller of whoever calls this.

  Returns:
    name -> Resolved.

  Raises:
    ValueError: nothing is quantized, or weights are asked for and no weight quantizer is on.

  Warns:
    ConfigWarning: patterns that match nothing, by name.
  """
  rules, pairs = tuple(entries), _pairs(names_with_classes)
  resolved = resolve_all(rules, pairs)
  missing = unmatched_patterns(rules, pairs)
  attention = [label for label in missing if is_attention_pattern(label)]
  notes = []
  if attention:
    notes.append(
      f"patterns {', '.join(map(repr, attention))} name quantizers inside attention (key/value cache, bmm, softmax); "
      "no module here has such quantizers, so these patterns have no effect; attention modules of transformers, nn.MultiheadAttention, "
      "nn.MultiHeadDotProductAttention and modules that call quantize_bmm have q, k, v and p_bmm_quantizer"
    )
  others = [label for label in missing if label not in attention]
  if others:
    notes.append(f"patterns that match no quantizer: {', '.join(map(repr, others))}; there are, for example, {_examples(resolved)}")
  _check_any_on(rules, resolved, notes)
  for note in notes:
    warnings.warn(note, ConfigWarning, stacklevel=stacklevel)
  return resolved


def is_attention_pattern(pattern: str) -> bool:
  """Whether a pattern names quantizers inside attention."""
  return "bmm" in pattern or "softmax" in pattern


def _check_any_on(rules: tuple[Entry, ...], resolved: Mapping[str, Resolved], notes: list[str]) -> None:
  why = "".join(f"; {note}" for note in notes)
  if not any(state.enable for state in resolved.values()):
    raise ValueError(
      f"the configuration quantizes nothing: all {len(resolved)} quantizers are off ({_examples(resolved)}); "
      f"add an entry such as '*weight_quantizer' that matches some of them{why}"
    )
  wanted = wants_weights(rules)
  if wanted and not any(state.enable for name, state in resolved.items() if name.endswith("weight_quantizer")):
    weights = {name: state for name, state in resolved.items() if name.endswith("weight_quantizer")}
    raise ValueError(
      f"the configuration asks for weight quantization ({', '.join(map(repr, wanted))}), but none of the {len(weights)} weight quantizers "
      f"is on ({_examples(weights)}); a later entry may switch them off, or no layer of the named kind is there{why}"
    )


def _examples(names: Iterable[str], count: int = 5) -> str:
  shown = list(names)
  if not shown:
    return "the model has none"
  return ", ".join(map(repr, shown[:count])) + (", ..." if len(shown) > count else "")


__all__ = [
  "ALTERNATIVES",
  "AlgorithmConfig",
  "ConfigWarning",
  "Entry",
  "QuantConfig",
  "Resolved",
  "canonical_name",
  "check_effect",
  "initial_state",
  "is_attention_pattern",
  "matches_class",
  "matches_name",
  "normalize",
  "normalize_entries",
  "resolve",
  "resolve_all",
  "unmatched_patterns",
  "wants_weights",
]
