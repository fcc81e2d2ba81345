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

  Attributes and the storage of parameters are kept by reference: the body may replace tensors, as everything in this package does, not
  write into them.
  """
  stored = [(p, p.data) for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)]
  kept = [(module, type(module), dict(module.__dict__), _contents(module)) for module in model.modules()]
  try:
    yield
  except BaseException:
    for parameter, data in stored:
      parameter.data = data
    for module, cls, attributes, contents in kept:
      module.__class__ = cls
      module.__dict__.clear()
      module.__dict__.update(attributes)
      for name, content in contents.items():
        container = module.__dict__[name]
        container.clear()
        container.update(content)
    raise


def _contents(module: nn.Module) -> dict[str, Any]:
  """Copies of the containers that conversion fills; the containers themselves stay the same objects."""
  return {name: module.__dict__[name].copy() for name in _CONTAINERS}


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
