"""Watching the activation quantizers of a running model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

Observer = Callable[[str, Any, Any, Any], None]
_watching = threading.local()


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
  """Call `observer(name, quantizer, x, y)` for every tensor that an activation quantizer of this thread turns from x into y.

  Run the model eagerly (not under jit) to be handed arrays; under jit the observer sees tracers, once, at tracing time.

  Args:
    observer: gets the quantizer's dotted name in torch's spelling, the quantizer, its input and its output.
  """
  before = getattr(_watching, "observers", ())
  _watching.observers = (*before, observer)
  try:
    yield
  finally:
    _watching.observers = before


def observe(name: Callable[[], str], quantizer: Any, x: Any, y: Any) -> None:
  """Tell the observers; `name` is called only where there are any."""
  for observer in getattr(_watching, "observers", ()):
    observer(name(), quantizer, x, y)
