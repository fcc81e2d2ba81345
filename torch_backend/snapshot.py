"""Leaving a model as it was: after an error, and after calibration in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_CONTAINERS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
  """Put classes, attributes, parameters and buffers of every module back if the body raises.

  Attributes are kept by reference: the body may replace tensors, as everything in this package does, not write into them.
  """
  kept = [(module, type(module), _attributes(module)) for module in model.modules()]
  try:
    yield
  except BaseException:
    for module, cls, attributes in kept:
      module.__class__ = cls
      module.__dict__.clear()
      module.__dict__.update(attributes)
    raise


def _attributes(module: nn.Module) -> dict[str, Any]:
  attributes = dict(module.__dict__)
  for name in _CONTAINERS:
    attributes[name] = attributes[name].copy()
  return attributes


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
  """The model in evaluation mode; afterwards every module has its own training flag again."""
  flags = [(module, module.training) for module in model.modules()]
  model.eval()
  try:
    yield
  finally:
    for module, flag in flags:
      module.training = flag
