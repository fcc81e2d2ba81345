"""The packages of the `onnx` extra, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def package(name: str) -> Any:
  """The module of that name.

  Raises:
    ImportError: it is not installed; the message names the extra that brings it.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
      raise
    message = f'ONNX export needs the package {name!r}, which is not installed; run pip install -c constraints.txt -e ".[onnx]"'
    raise ImportError(message, name=name) from error
