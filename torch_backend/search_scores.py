"""Scores of layers in candidate formats, on one batch of a torch model: gradients, KL divergence, traces of the Hessian."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.search import errors
from core.search.host import Choices, Scores
from torch_backend.modules import QuantWeight

Twins = Mapping[str, Mapping[str, QuantWeight]]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ROWS = 256  # positions whose softmax is taken at once in float64


def gradient_scores(
  model: nn.Module,
  twins: Twins,
  choices: Choices,
  number: int,
  step: Callable[[nn.Module], Tensor | None],
  by_position: bool = False,
) -> Scores:
  """sum (g (Q(Y) - Y))^2 of every layer and format, from one forward and one backward pass.

  Args:
    model: the float model, without parameters that take gradients.
    twins: format -> layer -> its quantized twin.
    choices: what to score.
    number: of the batch, for messages.
    step: runs the model and returns the loss, or runs it backward itself and returns None.
    by_position: sum over the outputs of a position before squaring.

  Raises:
    ValueError: loss or gradients are not finite, or the loss does not depend on these layers.
  """
  taps = _Taps(twins, choices, number, by_position)
  with taps.on(model), torch.enable_grad():
    try:
      loss = step(model)
      if loss is not None:
        _differentiable(loss, number).backward()
    except RuntimeError as error:
      if "does not require grad" in str(error):
        raise errors.loss_is_independent(number) from error
      raise
  if taps.error is not None:
    raise taps.error
  if not taps.calls:
    raise errors.loss_is_independent(number)
  return taps.scores


def _differentiable(loss: Any, number: int) -> Tensor:
  """The loss, checked."""
  if not isinstance(loss, Tensor) or loss.numel() != 1:
    what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ValueError(f"loss_func returned {what}; a scalar tensor is needed")
  if not loss.requires_grad:
    raise errors.loss_is_independent(number)
  if not bool(torch.isfinite(loss)):
    raise errors.loss_is_not_finite(number, float(loss.detach()))
  return loss


class _Taps:
  """Hooks on the outputs of layers. In the backward pass a layer's twins compute its output anew from its input, and the gradient weighs
  the difference. Inputs are kept until then; weights take no gradient, which saves a third of the backward pass."""

  def __init__(self, twins: Twins, choices: Choices, number: int, by_position: bool) -> None:
    self._twins, self._choices, self._number, self._by_position = twins, choices, number, by_position
    self._silent = False
    self.scores: Scores = {layer: dict.fromkeys(names, 0.0) for layer, names in choices.items()}
    self.calls = 0
    self.error: ValueError | None = None

  @contextlib.contextmanager
  def on(self, model: nn.Module) -> Iterator[None]:
    handles = [model.get_submodule(layer).register_forward_hook(self._hook(layer), with_kwargs=True) for layer in self._choices]
    try:
      yield
    finally:
      for handle in handles:
        handle.remove()

  def _hook(self, layer: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
      y = first_of(output)
      if self._silent or not torch.is_grad_enabled() or not y.is_floating_point():
        return None  # a checkpoint's first pass, which the backward pass repeats
      if not y.requires_grad:
        # Nothing before this layer takes a gradient. A clone, because models may write into the output in place.
        y = y.requires_grad_().clone()
      inputs = _Kept(args, kwargs, y.device.type)
      before, version = y.detach(), y._version
      y.register_hook(lambda g: self._weigh(layer, module, inputs, before, version, g))
      return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook

  @torch.no_grad()
  def _weigh(self, layer: str, module: nn.Module, inputs: _Kept, y: Tensor, version: int, g: Tensor) -> None:
    """Add the scores of one call. Errors are kept, to be raised when the backward pass is over."""
    self.calls += 1
    if self.error is not None:
      return
    if inputs.changed:
      self.error = errors.input_changed(layer)
      return
    if y._version != version:
      self._silent = True
      y = inputs.through(module)
      self._silent = False
    g = _wide(g)
    for name in self._choices[layer]:
      difference = _wide(inputs.through(self._twins[name][layer])) - _wide(y)
      changes = difference.mul_(g)
      if self._by_position:
        changes = changes.sum(1 if isinstance(module, CONVOLUTIONS) else -1)
      score = float(torch.linalg.vector_norm(changes, dtype=torch.float64)) ** 2
      if not math.isfinite(score):
        self.error = self._not_finite(layer, name, g)
        return
      self.scores[layer][name] += score

  def _not_finite(self, layer: str, name: str, g: Tensor) -> ValueError:
    count = g.numel() - int(torch.isfinite(g).sum())
    if count:
      return errors.gradient_is_not_finite(self._number, layer, count, g.numel())
    return errors.quantized_output_is_not_finite(self._number, layer, name)


class _Kept:
  """Arguments of a call, without their graph, and whether somebody has written into them since."""

  def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> None:
    self._args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    self._kwargs = {key: a.detach() if isinstance(a, Tensor) else a for key, a in kwargs.items()}
    self._versions = self._now()
    # The backward pass runs outside of the autocast region that the layer ran in.
    self._autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None

  def through(self, module: nn.Module) -> Tensor:
    """What a module makes of them."""
    if self._autocast is None:
      return first_of(module(*self._args, **self._kwargs))
    device, dtype = self._autocast
    with torch.autocast(device, dtype):
      return first_of(module(*self._args, **self._kwargs))

  def _now(self) -> list[int]:
    return [a._version for a in (*self._args, *self._kwargs.values()) if isinstance(a, Tensor) and not a.is_inference()]

  @property
  def changed(self) -> bool:
    return self._now() != self._versions


def first_of(output: Any) -> Tensor:
  """A layer's output; of several the first."""
  return output[0] if isinstance(output, tuple) else output


def _wide(x: Tensor) -> Tensor:
  return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


@torch.no_grad()
def kl_scores(
  model: nn.Module,
  twins: Twins,
  choices: Choices,
  groups: Mapping[str, Sequence[str]],
  number: int,
  step: Callable[[nn.Module], Any],
) -> Scores:
  """KL(p || q) over the vocabulary, summed over positions, of every group and format. See `core.search.host`."""
  reference = _log_probabilities(logits_of(step(model)), number, "the float model")
  found: Scores = {}
  for group, members in groups.items():
    names = dict.fromkeys(name for member in members for name in choices.get(member, ()))
    for name in names:
      with swapped(model, {member: twins[name][member] for member in members if name in choices.get(member, ())}):
        logits = logits_of(step(model))
      found.setdefault(group, {})[name] = _kl(reference, logits, number, f"the model with {group!r} in format {name!r}")
  return found


@contextlib.contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
  """The model with some layers computed by others."""
  handles = [
    model.get_submodule(name).register_forward_hook(lambda _, args, kwargs, output, other=other: other(*args, **kwargs), with_kwargs=True)
    for name, other in replacements.items()
  ]
  try:
    yield
  finally:
    for handle in handles:
      handle.remove()


def logits_of(output: Any) -> Tensor:
  """[positions, V] logits of what a forward step returned: a tensor, or a mapping with "logits".

  Raises:
    ValueError: anything else.
  """
  if isinstance(output, Mapping) and "logits" in output:
    output = output["logits"]
  if not isinstance(output, Tensor) or output.ndim < 1 or not output.is_floating_point():
    raise errors.no_logits(type(output).__name__)
  return output.reshape(-1, output.shape[-1])


def _log_probabilities(logits: Tensor, number: int, what: str) -> list[Tensor]:
  if not bool(torch.isfinite(logits).all()):
    raise errors.output_is_not_finite(number, what)
  return [torch.log_softmax(rows.double(), dim=-1) for rows in logits.split(ROWS)]


def _kl(reference: Sequence[Tensor], logits: Tensor, number: int, what: str) -> float:
  total = 0.0
  for p, rows in zip(reference, logits.split(ROWS), strict=True):
    q = torch.log_softmax(rows.double(), dim=-1)
    total += float(torch.sum(p.exp() * (p - q)))
  if not math.isfinite(total):
    raise errors.output_is_not_finite(number, what)
  return max(total, 0.0)


def hessian_traces(
  model: nn.Module,
  layers: Mapping[str, QuantWeight],
  number: int,
  step: Callable[[nn.Module], Tensor],
  probes: Sequence[Mapping[str, Callable[[], np.ndarray]]],
) -> dict[str, float]:
  """Mean over probes of v . (H v) for every layer's weight, by differentiating twice. See `core.search.host`."""
  from torch.nn.attention import SDPBackend, sdpa_kernel

  weights = [model.get_submodule(name)._parameters["weight"] for name in layers]
  held = [weight for weight in weights if weight is not None]
  if len(held) < len(weights):
    raise ValueError("method 'hessian' needs weights that are parameters; layers with a parametrization have none")
  totals = dict.fromkeys(layers, 0.0)
  try:
    for weight in held:
      weight.requires_grad_(True)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels cannot be differentiated twice
      loss = _differentiable(step(model), number)
      gradients = torch.autograd.grad(loss, held, create_graph=True, allow_unused=True)
      if all(g is None for g in gradients):
        raise errors.loss_is_independent(number)
      _check_gradients(layers, gradients, number)
      for probe in probes:
        for name, value in _products(layers, held, gradients, probe).items():
          totals[name] += value / len(probes)
  finally:
    for weight in held:
      weight.requires_grad_(False)
  return totals


def _check_gradients(layers: Mapping[str, QuantWeight], gradients: Sequence[Tensor | None], number: int) -> None:
  for name, gradient in zip(layers, gradients, strict=True):
    if gradient is not None and not bool(torch.isfinite(gradient).all()):
      bad = gradient.numel() - int(torch.isfinite(gradient).sum())
      raise errors.gradient_is_not_finite(number, name, bad, gradient.numel())


def _products(
  layers: Mapping[str, QuantWeight],
  weights: Sequence[Tensor],
  gradients: Sequence[Tensor | None],
  probe: Mapping[str, Callable[[], np.ndarray]],
) -> dict[str, float]:
  """v . (H v), layer by layer, for the vector of all layers together."""
  vectors = [
    module.stored(torch.from_numpy(probe[name]())).to(weight.device, weight.dtype)
    for (name, module), weight in zip(layers.items(), weights, strict=True)
  ]
  inner = sum(torch.sum(g * v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad)
  if not isinstance(inner, Tensor):
    return dict.fromkeys(layers, 0.0)  # a loss that is linear in every weight
  products = torch.autograd.grad(inner, list(weights), retain_graph=True, allow_unused=True)
  return {
    name: 0.0 if product is None else float(torch.sum(v.double() * product.double()))
    for name, v, product in zip(layers, vectors, products, strict=True)
  }
