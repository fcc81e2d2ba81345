"""Watching the activation quantizers of a running model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from torch_backend.names import walk
from torch_backend.sequential import Quantizer

Observer = Callable[[str, Quantizer, Tensor, Tensor], None]


@contextlib.contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
  """Call `observer(name, quantizer, x, y)` for every tensor that an enabled activation quantizer of the model turns from x into y.

  Args:
    model: a quantized model.
    observer: gets the quantizer's dotted name, the quantizer, its input and its output.
  """

  def hook(name: str) -> Callable[..., None]:
    def tell(quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
      observer(name, quantizer, inputs[0], output)

    return tell

  handles = []
  try:
    for name, quantizer, _ in walk(model):
      if quantizer.is_enabled and name.endswith(("input_quantizer", "output_quantizer", "_bmm_quantizer")):
        handles.append(quantizer.register_forward_hook(hook(name)))
    yield
  finally:
    for handle in handles:
      handle.remove()
