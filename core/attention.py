"""Names of the operands of attention, and how their axes may be told."""

from __future__ import annotations

from collections.abc import Iterable

ROLES = ("q", "k", "v", "p")  # queries, keys, values, and the probabilities that weigh the values


def check_operand(role: str, layout: str, layouts: Iterable[str]) -> None:
  """Raises:
  ValueError: a role that is none of `ROLES`, or a layout that is none of `layouts`.
  """
  if role not in ROLES or layout not in layouts:
    raise ValueError(
      f"role {role!r} with layout {layout!r} is unknown; roles are {', '.join(map(repr, ROLES))}, layouts {', '.join(map(repr, layouts))}"
    )
