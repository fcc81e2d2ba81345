"""The attention mask of a call, however it was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NAME = "attention_mask"


def mask_argument(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
  """The argument `attention_mask` [B, T] of a call, by keyword or by position; None where there is none of that name and rank.

  Args:
    function: what is called.
    args: of the call; `self` is the first where the function is an unbound method.
    kwargs: of the call.
  """
  mask = kwargs.get(NAME)
  if NAME not in kwargs:
    try:
      mask = inspect.signature(function).bind_partial(*args).arguments.get(NAME)
    except (TypeError, ValueError):  # no signature, or arguments that do not fit: the call itself will say so
      return None
  return mask if getattr(mask, "ndim", 0) == 2 else None
