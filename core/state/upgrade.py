"""Documents of older versions, brought up to date one version at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VERSION = 2


def _with_packed(document: dict[str, Any]) -> dict[str, Any]:
  """Version 1 knew no compressed weights."""
  return {**document, "packed": {}}


STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _with_packed}
"""Version -> what makes a document of the next version of it."""


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
  """The document as the present version writes it.

  Raises:
    ValueError: the version is none, or newer than this package knows.
  """
  version = document.get("version")
  if type(version) is not int or version < 1:
    raise ValueError(f"version is {version!r}; a positive integer is needed")
  if version > VERSION:
    raise ValueError(f"version {version} is newer than {VERSION}, the newest that this package reads; update twinquant")
  while version < VERSION:
    document = STEPS[version](document) | {"version": version + 1}
    version += 1
  return document
