"""The built-in algorithms. Importing one of the files here registers what it holds; `load` imports them all, once, when the first
configuration is read."""

from __future__ import annotations

import importlib

from core.calibrate.registry import ALGORITHMS, Algorithm

FILES: tuple[str, ...] = (
  "builtin_scaling",
  "builtin_weights",
  "builtin_gptq",
  "builtin_distill",
  "builtin_activations",
  "builtin_relations",
)


def load() -> None:
  """Make every built-in algorithm known."""
  for file in FILES:
    importlib.import_module(f"core.calibrate.{file}")


def find(name: str, backend: str) -> Algorithm:
  """The algorithm of that name.

  Raises:
    ValueError: it is registered for another backend only.
  """
  load()
  if name not in ALGORITHMS:
    raise ValueError(
      f"algorithm {name!r} is registered for another backend, not for {backend}; register it with {backend}.register_algorithm, or for "
      f"both with core.calibrate.register_algorithm; known here are max, {', '.join(ALGORITHMS)}"
    )
  return ALGORITHMS[name]
