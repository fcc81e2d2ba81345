"""Siblings: modules that read the same input and whose weights a serving engine fuses, so that they must share one tensor-level scale."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from core.config.matching import canonical_name

# A rule is "a|b|c": modules under one parent whose paths below it are a, b, c (globs; may hold dots). Earlier rules take their modules
# first, so that keys and values of cross-attention, which read another input than its queries, are grouped without them.
DEFAULT_GROUPS: tuple[str, ...] = (
  "crossattention.self.key|crossattention.self.value",
  "encoder_attn.k_proj|encoder_attn.v_proj",
  "cross_attn.k_proj|cross_attn.v_proj",
  "EncDecAttention.k|EncDecAttention.v",
  "q_proj|k_proj|v_proj",
  "query|key|value",
  "query_proj|key_proj|value_proj",
  "q_lin|k_lin|v_lin",
  "SelfAttention.q|SelfAttention.k|SelfAttention.v",
  "wq|wk|wv",
  "q_a_proj|kv_a_proj_with_mqa",
  "gate_proj|up_proj",
  "w1|w3",
  "wi_0|wi_1",
)
# Not on by default: all experts of a layer see the same tensor, and some engines keep one scale for them all.
EXPERT_GROUPS: tuple[str, ...] = ("experts.*.gate_proj|experts.*.up_proj", "experts.*.w1|experts.*.w3")


def group(names: Iterable[str], rules: Iterable[str] | None = None) -> list[tuple[str, ...]]:
  """Sibling modules by rule.

  Args:
    names: module names, dotted or slashed (`model/layers_0/self_attn/q_proj`); rules are matched on the canonical spelling.
    rules: rules such as "q_proj|k_proj|v_proj"; None is DEFAULT_GROUPS, () groups nothing.

  Returns:
    Tuples of at least two of the given names, each name in at most one tuple; members in the order of the rule's alternatives, then of
    `names`; tuples in the order in which their first module appears in `names`.

  Raises:
    ValueError: rules that are one string, a rule that is no string, or has an empty alternative.
  """
  if isinstance(rules, str):
    raise ValueError(f"group rules are {rules!r}; give a list of rules, such as [{rules!r}]")
  ordered = list(dict.fromkeys(names))
  place = {name: index for index, name in enumerate(ordered)}
  taken: set[str] = set()
  groups: list[tuple[str, ...]] = []
  for rule in DEFAULT_GROUPS if rules is None else rules:
    for members in _by_parent(ordered, _alternatives(rule), taken).values():
      if len(members) > 1:
        names_only = tuple(name for _, _, name in sorted(members))
        groups.append(names_only)
        taken.update(names_only)
  return sorted(groups, key=lambda members: min(place[name] for name in members))


def _alternatives(rule: str) -> list[str]:
  parts = rule.split("|") if isinstance(rule, str) else []
  if not parts or not all(part.strip(". ") for part in parts):
    raise ValueError(f"group rule {rule!r} is not allowed; write the last path parts of the siblings, such as 'q_proj|k_proj|v_proj'")
  return [canonical_name(part.strip()) for part in parts]


def _by_parent(names: list[str], alternatives: list[str], taken: set[str]) -> dict[str, list[tuple[int, int, str]]]:
  """Parent -> (place in the rule, place among the names, name) of its children that the rule names."""
  found: dict[str, list[tuple[int, int, str]]] = {}
  for index, name in enumerate(names):
    parts = canonical_name(name).split(".")
    for order, tail in enumerate(alternatives):
      depth = tail.count(".") + 1
      if name not in taken and len(parts) >= depth and fnmatchcase(".".join(parts[-depth:]), tail):
        found.setdefault(".".join(parts[:-depth]), []).append((order, index, name))
        break
  return found
