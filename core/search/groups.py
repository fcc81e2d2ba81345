"""Which layers share one format: siblings that a serving engine fuses, and all experts of a layer. The rules are yours to edit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from core.config.groups import DEFAULT_GROUPS, group

# Experts come first, since earlier rules take their layers first.
SEARCH_GROUPS: tuple[str, ...] = (
  "experts.*.gate_proj|experts.*.up_proj",
  "experts.*.down_proj",
  "experts.*.w1|experts.*.w3",
  "experts.*.w2",
  "experts.*.up_proj|experts.*.gate_up_proj",
  "local_experts.*.linear_fc1",
  "local_experts.*.linear_fc2",
  "in_proj_qkv|in_proj_z",
  "in_proj_a|in_proj_b",
  *DEFAULT_GROUPS,
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def search_groups(names: Sequence[str], rules: Iterable[str] | None = None) -> dict[str, tuple[str, ...]]:
  """Layers by group.

  Args:
    names: layer names.
    rules: such as "q_proj|k_proj|v_proj" (`core.config.groups`); None is SEARCH_GROUPS, () makes every layer a group of its own.

  Returns:
    Group name -> layers, sorted by group name. A group is called "model.layers.0.self_attn.(q_proj|k_proj|v_proj)" ("experts.*.w2" for
    numbered members), a layer on its own by its name.

  Raises:
    ValueError: a wrong rule.
  """
  found: dict[str, tuple[str, ...]] = {}
  grouped = group(names, SEARCH_GROUPS if rules is None else rules)
  for members in grouped:
    name = _name(members)
    found["|".join(members) if name in found else name] = tuple(sorted(members))
  taken = {name for members in grouped for name in members}
  found |= {name: (name,) for name in names if name not in taken}
  return dict(sorted(found.items()))


def _name(members: Sequence[str]) -> str:
  """The common parent and, in brackets, the rest of each member's path, numbers inside it written as "*"."""
  parts = [name.split(".") for name in members]
  shared = 0
  while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
    shared += 1
  tails = dict.fromkeys(_NUMBER.sub("*", "." + ".".join(p[shared:]))[1:] for p in parts)
  parent = ".".join(parts[0][:shared])
  return f"{parent + '.' if parent else ''}({'|'.join(tails)})"
