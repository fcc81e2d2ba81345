"""The chain of equal blocks of a torch model, such as its decoder layers, and running one of them alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.calibrate.host import PREPARED, Visit
from torch_backend.inputs import InputWatch, Padding
from torch_backend.modules import QuantWeight
from torch_backend.sequential import tensor_quantizers

_CACHES = ("past_key_values", "past_key_value", "layer_past")  # running a block twice would append to a key/value cache twice


@dataclasses.dataclass
class Call:
  """Arguments of one block in one batch besides its hidden states, and the padding mask of that batch."""

  args: tuple[Any, ...]
  kwargs: dict[str, Any]
  keyword: str | None
  mask: Tensor | None


@dataclasses.dataclass
class Chain:
  """Blocks of which each reads what the one before returns.

  Attributes:
    blocks: in order; empty where the model has no such chain.
    hidden: what enters the first one, per batch.
  """

  blocks: list[TorchBlock]
  hidden: list[Tensor]

  @classmethod
  def find(cls, model: nn.Module, loop: Callable[[nn.Module], Any] | None, layers: Mapping[str, QuantWeight], padding: Padding) -> Chain:
    """Find the chain and record what its blocks are called with, for every batch of the forward loop.

    The first batch runs through the blocks and shows whether they are a chain; for the others the blocks are passed over, so that only
    what stands around them is computed. Without data, equal siblings are taken for a chain.
    """
    name, parts = _candidate(model, layers)
    if len(parts) < 2:
      return cls([], [])
    recorder = _Recorder(parts, padding)
    with recorder:
      if loop is not None:
        loop(model)
    if not recorder.is_chain:
      return cls([], [])
    blocks = []
    for i, part in enumerate(parts):
      prefix = f"{name}.{i}"
      own = {key: module for key, module in layers.items() if key.startswith(f"{prefix}.")}
      blocks.append(TorchBlock(prefix, tuple(own), part, own, recorder.calls[i]))
    return cls(blocks, recorder.hidden)


def _candidate(model: nn.Module, layers: Mapping[str, QuantWeight]) -> tuple[str, list[nn.Module]]:
  """The list of modules of one class that holds most of the layers."""
  best: tuple[int, str, list[nn.Module]] = (0, "", [])
  for name, module in model.named_modules():
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
      continue
    parts = list(module)
    held = [sum(key.startswith(f"{name}.{i}.") for key in layers) for i in range(len(parts))]
    if all(held) and len({type(part) for part in parts}) == 1 and sum(held) > best[0]:
      best = (sum(held), name, parts)
  return best[1], best[2]


class _Recorder:
  """Records the calls of blocks; from the second batch on, blocks return their input."""

  def __init__(self, parts: list[nn.Module], padding: Padding) -> None:
    self._parts = parts
    self._padding = padding
    self._previous: Tensor | None = None
    self._rest: list[Any] = [None] * len(parts)
    self._seen = [0] * len(parts)
    self.is_chain = True
    self.hidden: list[Tensor] = []
    self.calls: list[list[Call]] = [[] for _ in parts]

  def __enter__(self) -> None:
    for i, part in enumerate(self._parts):
      object.__setattr__(part, "forward", self._stub(i, part.forward))

  def __exit__(self, *_: Any) -> None:
    for part in self._parts:
      del part.__dict__["forward"]
    self.is_chain = self.is_chain and len(set(self._seen)) == 1

  def _stub(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
      keyword = None if args else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
      hidden = args[0] if args else kwargs.get(keyword or "")
      if not isinstance(hidden, Tensor):
        self.is_chain = False
        return forward(*args, **kwargs)
      self._note(i, hidden, args, kwargs, keyword)
      self._seen[i] += 1
      if self._seen[i] > 1 and self.is_chain:
        self._previous = hidden
        return hidden if self._rest[i] is None else (hidden, *self._rest[i])
      output = forward(*args, **kwargs)
      self._rest[i] = tuple(output[1:]) if isinstance(output, tuple) else None
      self._previous = output[0] if isinstance(output, tuple) else output
      self.is_chain = self.is_chain and isinstance(self._previous, Tensor) and self._previous.shape == hidden.shape
      return output

    return run

  def _note(self, i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str | None) -> None:
    if i == 0:
      self.hidden.append(hidden.detach())
    elif self._previous is None or (hidden is not self._previous and not torch.equal(hidden, self._previous)):
      self.is_chain = False
    kept = {key: None if key in _CACHES else value for key, value in kwargs.items() if key != keyword}
    if "use_cache" in kept:
      kept["use_cache"] = False
    self.calls[i].append(Call(args[1:], kept, keyword, self._padding()))


class TorchBlock:
  """One block (`core.calibrate.host.Block`)."""

  def __init__(self, name: str, layers: tuple[str, ...], module: nn.Module, own: dict[str, QuantWeight], calls: list[Call]) -> None:
    self.name = name
    self.layers = layers
    self._module = module
    self._own = own
    self._calls = calls

  def run(self, batch: int, hidden: Tensor, quantized: Collection[str] = (), visit: Visit | None = None, point: str = PREPARED) -> Tensor:
    call = self._calls[batch]
    with torch.no_grad(), self._switched(quantized, quantized), contextlib.ExitStack() as stack:
      if visit is not None:
        stack.enter_context(InputWatch(self._own, visit, point, lambda: call.mask))
      return self._call(call, hidden, {})

  def gradient(
    self, batch: int, hidden: Tensor, target: Tensor, values: dict[str, np.ndarray], quantized: Collection[str] = ()
  ) -> tuple[float, dict[str, np.ndarray]]:
    call = self._calls[batch]
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in values.items()}
    with torch.enable_grad(), self._switched((), quantized):
      output = self._call(call, hidden, {self._place(name): self._stored(name, leaf) for name, leaf in leaves.items()})
      difference = output.to(torch.float32) - target.to(torch.float32)
      if call.mask is not None and tuple(call.mask.shape) == tuple(difference.shape[:-1]):
        difference = difference[call.mask.to(torch.bool)]
      loss = difference.square().mean()
      found = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss), {name: gradient.numpy() for name, gradient in zip(leaves, found, strict=True)}

  def parameters(self) -> dict[str, np.ndarray]:
    return {name: p.detach().to("cpu", torch.float32).numpy().copy() for name, p in self._free().items()}

  def set_parameters(self, values: dict[str, np.ndarray]) -> None:
    held = self._free()
    for name, value in values.items():
      held[name].data = torch.from_numpy(value.copy()).to(held[name].device, held[name].dtype)

  def _free(self) -> dict[str, nn.Parameter]:
    weights = {id(module.stored_weight) for module in self._own.values()}
    return {name: p for name, p in self._module.named_parameters() if id(p) not in weights}

  def _place(self, name: str) -> str:
    """A value's name as the block knows it."""
    return name[len(self.name) + 1 :] if name.startswith(f"{self.name}.") else name

  def _stored(self, name: str, value: Tensor) -> Tensor:
    layer = self._own.get(name.removesuffix(".weight"))
    held = self._module.get_parameter(self._place(name))
    return (value if layer is None else layer.stored(value)).to(held.device, held.dtype)

  def _call(self, call: Call, hidden: Tensor, values: dict[str, Tensor]) -> Tensor:
    args = call.args if call.keyword else (hidden, *call.args)
    kwargs = {**call.kwargs, call.keyword: hidden} if call.keyword else call.kwargs
    output = torch.func.functional_call(self._module, values, args, kwargs) if values else self._module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output

  @contextlib.contextmanager
  def _switched(self, weights: Collection[str], inputs: Collection[str]) -> Iterator[None]:
    """These layers' quantizers act, those of the others let their input pass."""
    before = []
    for name, module in self._own.items():
      roles = (module.weight_quantizer, module.input_quantizer, module.output_quantizer)
      for quantizer, names in zip(roles, (weights, inputs, inputs), strict=True):
        for one in tensor_quantizers(quantizer):
          before.append((one, one.is_quantizing))
          one.enable_quant() if name in names else one.disable_quant()
    try:
      yield
    finally:
      for one, was in before:
        one.enable_quant() if was else one.disable_quant()
