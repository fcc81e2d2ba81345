"""Hashable mappings and helpful messages: what every other file of the configuration uses."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class FrozenDict(Mapping[str, Any]):
  """A read-only, hashable mapping; nested mappings and lists are frozen too (lists become tuples). Equal to the dict it was made from."""

  __slots__ = ("_items",)

  def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
    object.__setattr__(self, "_items", {str(key): freeze(value) for key, value in dict(items).items()})

  def __setattr__(self, name: str, value: Any) -> None:
    raise TypeError(f"FrozenDict is read-only; cannot set {name!r}")

  def __getitem__(self, key: str) -> Any:
    return self._items[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._items)

  def __len__(self) -> int:
    return len(self._items)

  def __hash__(self) -> int:
    return hash(frozenset(self._items.items()))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Mapping) and self._items == FrozenDict(other)._items

  def __repr__(self) -> str:
    return f"FrozenDict({self._items!r})"

  def __reduce__(self) -> tuple[Any, ...]:
    return (FrozenDict, (thaw(self),))


def freeze(value: Any) -> Any:
  """Mappings become FrozenDict, lists become tuples, other hashable values are returned as they are.

  Raises:
    ValueError: a value that cannot be hashed, such as a set or an array.
  """
  if isinstance(value, Mapping):
    return value if isinstance(value, FrozenDict) else FrozenDict(value)
  if isinstance(value, list | tuple):
    return tuple(freeze(item) for item in value)
  try:
    hash(value)
  except TypeError as error:
    raise ValueError(f"option {value!r} of type {type(value).__name__} cannot be kept; use numbers, strings, lists and dicts") from error
  return value


def thaw(value: Any) -> Any:
  """The plain, JSON-able twin: mappings become dict, tuples become lists."""
  if isinstance(value, Mapping):
    return {key: thaw(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [thaw(item) for item in value]
  return value


def hint(word: object, allowed: Iterable[str]) -> str:
  """' (did you mean ...?)' where a near miss exists, else ''."""
  near = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
  return f" (did you mean {near[0]!r}?)" if near else ""


def check_keys(where: str, given: Mapping[Any, Any], allowed: Iterable[str]) -> None:
  """Raises ValueError for the first key of `given` that is not allowed, with its value and the allowed ones."""
  names = tuple(allowed)
  for key, value in given.items():
    if key not in names:
      raise ValueError(f"{where}: unknown key {key!r} (value {value!r}){hint(key, names)}; allowed are {', '.join(names)}")


def check_choice(where: str, value: Any, allowed: Iterable[str]) -> str:
  """Returns `value` if it is one of the allowed strings.

  Raises:
    ValueError: names the value and the allowed ones.
  """
  names = tuple(allowed)
  if not isinstance(value, str) or value not in names:
    raise ValueError(f"{where} is {value!r}, which is unknown{hint(value, names)}; allowed are {', '.join(map(repr, names))}")
  return value


def check_bool(where: str, value: Any) -> bool:
  """Returns `value` if it is a bool (0 and 1 count, since YAML writers use them)."""
  if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
    return bool(value)
  raise ValueError(f"{where} is {value!r}; allowed are True and False")


def as_int(value: Any) -> int | None:
  """The integer that `value` is or spells ("-1": JSON and YAML keys are strings), or None."""
  if isinstance(value, numbers.Integral) and not isinstance(value, bool):
    return int(value)
  if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
    try:
      return int(value)
    except ValueError:
      return None
  return None
