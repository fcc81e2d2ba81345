"""What the rest needs to know about Flax's own machinery."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax.linen import transforms

_TRANSFORMS = transforms.__file__


def is_lifted(context: nn.module.InterceptorContext) -> bool:
  """Whether this is the outside of a transformed method (nn.remat(Dense).__call__); the module itself is called inside."""
  code = getattr(getattr(context.orig_method, "func", None), "__code__", None)
  return code is not None and code.co_filename == _TRANSFORMS


def with_params(mutable: Any) -> Any:
  """The filter `mutable` of `Module.apply`, with `params` let change as well."""
  if mutable is False or mutable is None:
    return ["params"]
  if mutable is True:
    return True
  return ["params", *([mutable] if isinstance(mutable, str) else mutable)]


def asks_for_params(mutable: Any) -> bool:
  """Whether the filter lets `params` change."""
  if isinstance(mutable, bool) or mutable is None:
    return bool(mutable)
  return "params" in ([mutable] if isinstance(mutable, str) else mutable)
