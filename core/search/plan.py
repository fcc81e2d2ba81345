"""The problem of a search: groups, what each may be, what that costs, and the limits. All of it is known before any calibration."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.config import matches_name
from core.search import costs
from core.search.costs import Counting
from core.search.groups import search_groups
from core.search.host import SearchLayer
from core.search.solver import Limit
from core.search.spaces import NONE, Format, Formats, Spaces, space_of

Table = dict[str, dict[str, float]]
BUDGETS = ("effective_bits", "weight_bytes")
OPTIONS = ("cost_model", "cost")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be decided.

  Attributes:
    layers: the layers that some format quantizes, in the model's order, disabled ones included.
    formats: candidates by name.
    groups: group name -> layers that share a format, sorted by name.
    choices: group name -> names of the formats it may have; a disabled group has NONE alone.
    counting: how bits are counted.
    tables: the user's costs: name -> layer -> format -> number.
  """

  layers: tuple[SearchLayer, ...]
  formats: Formats
  groups: dict[str, tuple[str, ...]]
  choices: dict[str, tuple[str, ...]]
  counting: Counting
  tables: dict[str, Table]

  @functools.cached_property
  def by_name(self) -> dict[str, SearchLayer]:
    return {layer.name: layer for layer in self.layers}

  def to_score(self) -> dict[str, tuple[str, ...]]:
    """Layer -> formats to be scored: where there is a choice, and the format does something."""
    layers = self.by_name
    found: dict[str, tuple[str, ...]] = {}
    for group, members in self.groups.items():
      names = self.choices[group] if len(self.choices[group]) > 1 else ()
      for member in members:
        wanted = tuple(name for name in names if self.formats[name].quantizes(layers[member]))
        if wanted:
          found[member] = wanted
    return {layer.name: found[layer.name] for layer in self.layers if layer.name in found}

  def total_bits(self, counted: bool = True) -> Table:
    """Group -> format -> bits of all its weights; `counted` applies the cost model's factors."""
    layers = self.by_name

    def bits(name: str, choice: str) -> float:
      return self._bits[name, choice] * (self.counting.weight(layers[name]) if counted else 1.0)

    return {g: {f: math.fsum(bits(m, f) for m in self.groups[g]) for f in self.choices[g]} for g in self.groups}

  @functools.cached_property
  def _bits(self) -> dict[tuple[str, str], float]:
    """Bits of every layer in every format of its group, all copies together."""
    unquantized, layers = Format(NONE, None), self.by_name
    return {
      (member, choice): costs.stored_bits(layers[member], self.formats.get(choice, unquantized), self.counting)
      for group, members in self.groups.items()
      for member in members
      for choice in self.choices[group]
    }

  def weights(self) -> dict[str, float]:
    """Group -> number of weights, with the cost model's factors."""
    layers = self.by_name
    return {
      g: math.fsum(layers[m].copies * math.prod(layers[m].shape) * self.counting.weight(layers[m]) for m in members)
      for g, members in self.groups.items()
    }

  def limits(self, constraints: Mapping[str, Any]) -> list[Limit]:
    """The constraints as limits on sums over the groups.

    Raises:
      ValueError: an unknown constraint, no number, none at all, or one that no assignment meets; names the least possible.
    """
    budgets = {key: value for key, value in constraints.items() if key not in OPTIONS}
    allowed = (*BUDGETS, *self.tables)
    unknown = [key for key in budgets if key not in allowed]
    if unknown or not budgets:
      what = f"unknown constraint {unknown[0]!r}" if unknown else "no constraint"
      raise ValueError(
        f"constraints {dict(constraints)!r}: {what}; allowed are {', '.join(map(repr, allowed))}, and ModelOpt's 'cost_model' and 'cost'; "
        "a limit of your own needs a table of its name in `costs`"
      )
    found = [self._limit(name, value) for name, value in budgets.items()]
    for limit in found:
      limit.check()
    return found

  def _limit(self, name: str, value: Any) -> Limit:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
      raise ValueError(f"constraints[{name!r}] is {value!r}; allowed is a finite number above 0")
    if name == "effective_bits":
      return Limit(name, self.total_bits(), float(value), math.fsum(self.weights().values()))
    if name == "weight_bytes":
      return Limit(name, self.total_bits(counted=False), float(value), 8.0)
    table = self.tables[name]
    return Limit(name, {g: {f: self._of_table(name, table, g, f) for f in self.choices[g]} for g in self.groups}, float(value), 1.0)

  def _of_table(self, name: str, table: Table, group: str, choice: str) -> float:
    for member in self.groups[group]:
      if choice not in table[member]:
        raise ValueError(f"costs[{name!r}] has no cost of layer {member!r} in format {choice!r}; add it (patterns such as '*' are allowed)")
    return math.fsum(table[member][choice] for member in self.groups[group])

  def effective_bits(self, assignment: Mapping[str, str]) -> float:
    """Bits per weight of an assignment, over all groups; 0 where the cost model counts nothing."""
    bits, weights = self.total_bits(), math.fsum(self.weights().values())
    return math.fsum(bits[g][f] for g, f in assignment.items()) / weights if weights else 0.0

  def weight_bytes(self, assignment: Mapping[str, str]) -> float:
    """Bytes of all weights of the groups."""
    bits = self.total_bits(counted=False)
    return math.fsum(bits[g][f] for g, f in assignment.items()) / 8


def make_plan(
  layers: Sequence[SearchLayer],
  formats: Formats,
  *,
  spaces: Spaces | None = None,
  disabled: Iterable[str] = (),
  group_rules: Iterable[str] | None = None,
  counting: Counting | None = None,
  tables: Mapping[str, Any] | None = None,
) -> Plan:
  """The problem for a model.

  Args:
    layers: all layers of the model.
    formats: candidates.
    spaces: pattern -> names of formats, for layers that may not have all of them.
    disabled: patterns of layers that stay unquantized, with their whole group. They count as what they are.
    group_rules: which layers share a format; None is SEARCH_GROUPS.
    counting: how bits are counted.
    tables: costs of your own: name -> pattern of layers -> format -> number.

  Raises:
    ValueError: a format that quantizes nothing, patterns that match nothing, or a group without a common format.
  """
  rules = () if disabled is None else (disabled,) if isinstance(disabled, str) else tuple(disabled)
  used = tuple(layer for layer in layers if any(formats[name].quantizes(layer) for name in space_of(layer, formats, spaces)))
  _check_formats(formats, layers, spaces)
  _check_patterns("disabled_layers", rules, layers)
  _check_patterns("module_search_spaces", spaces or (), layers)
  groups = search_groups([layer.name for layer in used], group_rules)
  by_name = {layer.name: layer for layer in used}
  choices = {}
  for group, members in groups.items():
    if any(matches_name(pattern, member) for pattern in rules for member in members):
      choices[group] = (NONE,)
    else:
      choices[group] = _common(group, [space_of(by_name[m], formats, spaces) for m in members], members)
  costed = {name: costs.cost_table(table, used, (*formats, NONE), name) for name, table in (tables or {}).items()}
  for name in costed:
    if name in (*BUDGETS, *OPTIONS):
      raise ValueError(f"costs holds a table called {name!r}, which is a constraint of its own; choose another name")
  return Plan(used, formats, groups, choices, counting or Counting(), costed)


def _common(group: str, spaces: Sequence[tuple[str, ...]], members: Sequence[str]) -> tuple[str, ...]:
  common = tuple(name for name in spaces[0] if all(name in space for space in spaces))
  if not common:
    raise ValueError(
      f"the layers of group {group!r} have no format in common: "
      + "; ".join(f"{member}: {', '.join(space)}" for member, space in zip(members, spaces, strict=True))
      + "; give them one search space, or other group rules"
    )
  return common


def _check_formats(formats: Formats, layers: Sequence[SearchLayer], spaces: Spaces | None) -> None:
  for name, one in formats.items():
    if one.config is not None and not any(name in space_of(layer, formats, spaces) and one.quantizes(layer) for layer in layers):
      raise ValueError(
        f"format {name!r} quantizes nothing: none of its rules switches a quantizer of the {len(layers)} layers on ({_shown(layers)}); "
        "correct its patterns, or leave it out"
      )


def _shown(layers: Sequence[SearchLayer]) -> str:
  return (", ".join(layer.name for layer in layers[:5]) + (", ..." if len(layers) > 5 else "")) or "there are none"


def _check_patterns(what: str, patterns: Iterable[str], layers: Sequence[SearchLayer]) -> None:
  for pattern in patterns:
    if not any(matches_name(pattern, layer.name) for layer in layers):
      raise ValueError(f"{what}: pattern {pattern!r} matches no layer; the layers are {_shown(layers)}")
