"""A model in PyTorch, as the experiments see it: numpy in, numpy out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import core
import torch_backend
from core import hadamard
from experiments import models
from experiments.quantities import Codes, Leaf, Weight
from torch_backend.capture import observing
from torch_backend.modules import QuantAttention, QuantModule, QuantWeight
from torch_backend.sequential import tensor_quantizers


def numpy_of(x: torch.Tensor) -> np.ndarray:
  return x.detach().cpu().numpy()


def _result(output: Any) -> torch.Tensor:
  """Logits of a language model, last hidden state of an encoder, or the tensor itself."""
  for name in ("logits", "last_hidden_state"):
    if hasattr(output, name):
      return getattr(output, name)
  return output


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
  return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Model:
  """A float model.

  Attributes:
    model: the torch module.
  """

  backend = "torch"

  def __init__(self, model: nn.Module) -> None:
    self.model = model.eval()

  @classmethod
  def load(cls, source: str, dtype: str = "float32", twin: bool = False, jit: bool = False) -> Model:
    """From a name or folder; `twin` takes the plain torch Llama in place of that of transformers. `jit` is for the JAX side."""
    del jit
    return cls((models.load_torch_twin if twin else models.load_torch)(source, dtype)[0])

  def nbytes(self) -> int:
    """Bytes of all parameters; one that is shared counts once."""
    return sum(p.numel() * p.element_size() for p in self.model.parameters())

  @torch.no_grad()
  def __call__(self, ids: np.ndarray) -> np.ndarray:
    return numpy_of(_result(self.model(torch.from_numpy(ids).long())))

  def quantize(
    self,
    config: Mapping[str, Any],
    batches: Sequence[np.ndarray],
    group_rules: Sequence[str] | None = None,
    report: list[dict[str, Any]] | None = None,
  ) -> Quantized:
    """A quantized copy, calibrated on these batches; `report` gets what calibration says of each layer."""

    def loop(model: nn.Module) -> None:
      for ids in batches:
        model(torch.from_numpy(ids).long())

    return Quantized(torch_backend.quantize(copy.deepcopy(self.model), config, loop, group_rules=group_rules, report=report))

  def auto_quantize(self, batches: Sequence[np.ndarray], constraints: Mapping[str, Any], formats: Any, **options: Any) -> Any:
    """(a copy quantized by `torch_backend.auto_quantize`, its search_state); the loss is that of the next token.

    Args:
      batches: token ids [B, T], for calibration and for the scores.
      constraints: as there.
      formats: as there.
      **options: as there.
    """
    data = [torch.from_numpy(ids).long() for ids in batches]
    steps = {"num_calib_steps": len(data), "num_score_steps": len(data), **options}
    step = {"forward_step": lambda model, ids: _result(model(ids)), "loss_func": _next_token_loss}
    model, state = torch_backend.auto_quantize(copy.deepcopy(self.model), constraints, formats, data, **step, **steps)
    return Quantized(model), state

  def restored(self, directory: str | Path) -> Quantized:
    """The quantized model that `save` of either backend wrote; this model's parameters are replaced."""
    return Quantized(torch_backend.restore(self.model, directory))

  @torch.no_grad()
  def layer_io(self, ids: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, dict[str, tuple[Any, Any]]]:
    """Run one batch: (the model's result, layer name -> (input, output), the backend's own arrays)."""
    found: dict[str, tuple[Any, Any]] = {}
    handles = [
      self.model.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: found.__setitem__(name, (args[0], output)))
      for name in names
    ]
    try:
      return self(ids), found
    finally:
      for handle in handles:
        handle.remove()


class Quantized(Model):
  """A quantized model."""

  @torch.no_grad()
  def alone(self, name: str, x: Any) -> Any:
    """What one layer makes of an input."""
    return self.model.get_submodule(name)(x)

  def leaves(self) -> dict[str, tuple[Leaf, ...]]:
    found = {name: _leaves(q) for name, q in torch_backend.quantizers(self.model).items() if q.is_enabled}
    return dict(sorted(found.items()))

  def quantizers(self) -> dict[str, Any]:
    return torch_backend.quantizers(self.model)

  @torch.no_grad()
  def weights(self) -> Iterator[Weight]:
    for name, module in sorted(self.model.named_modules(), key=lambda entry: f"{entry[0]}.weight_quantizer"):
      if isinstance(module, QuantWeight) and module.weight_quantizer.is_enabled:
        before = module.canonical(module.stored_weight.detach())
        after = module.canonical(module.compute_weight().detach())
        yield Weight(f"{name}.weight_quantizer", before, after, _leaves(module.weight_quantizer))

  def export(self, directory: str | Path, **options: Any) -> None:
    """Write a folder that serving engines load; options as `torch_backend.export` takes them."""
    torch_backend.export(self.model, directory, **options)

  def verify(self, artefact: str | Path, controls: bool = False, **options: Any) -> Any:
    """What clients find in an exported folder or ONNX file, or with `controls` in faulty copies too; options as `torch_backend.verify`."""
    return (torch_backend.verify_controls if controls else torch_backend.verify)(self.model, artefact, **options)

  def fold(self) -> None:
    torch_backend.fold_weight(self.model)

  @torch.no_grad()
  def run(self, ids: np.ndarray, on_quantizer: Callable[..., None], on_layer: Callable[[str, Any], None]) -> np.ndarray:
    """Run one batch.

    Args:
      ids: [B, T].
      on_quantizer: called with (name, quantizer, x, y) of every activation quantizer.
      on_layer: called with (name, output) of every quantized layer.

    Returns:
      Logits.
    """
    handles = []
    for name, module in self.model.named_modules():
      if isinstance(module, QuantModule) and not isinstance(module, QuantAttention):  # attention is no layer of its own
        handles.append(module.register_forward_hook(lambda _, __, output, name=name: on_layer(name, output)))
    try:
      with observing(self.model, on_quantizer):
        return self(ids)
    finally:
      for handle in handles:
        handle.remove()


def _leaves(quantizer: Any) -> tuple[Leaf, ...]:
  leaves = []
  for one in tensor_quantizers(quantizer):
    amax = None if one.amax is None else numpy_of(one.amax)
    given = one.spec.two_level and not one.spec.dynamic and one.tensor_amax is not None
    leaves.append(Leaf(one.config, amax, numpy_of(one.tensor_amax) if given else None))
  return tuple(leaves)


def prepare(quantizer: Any, x: torch.Tensor) -> torch.Tensor:
  """The tensor whose codes are taken: x times pre_quant_scale, rotated, less the bias, of the first of a sequence.

  Raises:
    ValueError: the bias is taken from each input, so there are no codes of a calibrated state.
  """
  first = tensor_quantizers(quantizer)[0]
  if first.pre_quant_scale is not None:
    x = (x.float() * first.pre_quant_scale).to(x.dtype)
  if first.config.rotate is not None:
    x = hadamard.rotate(x, first.config.rotate.block_size, first.config.rotate.seed).to(x.dtype)
  if first.config.bias is not None:
    if first.bias_value is None:
      raise ValueError(f"quantizer {first.name!r} takes its bias from each input; compare a configuration without a dynamic bias")
    x = x.float() - first.bias_value
  return x


def encode(x: Any, leaves: Sequence[Leaf]) -> Codes:
  """Codes of the last of these quantizers, by `core` on torch tensors.

  Args:
    x: torch tensor or numpy array.
    leaves: quantizers, one after the other.
  """
  x = torch.as_tensor(x)
  for before in leaves[:-1]:
    x = core.fake_quantize(x, before.spec, _tensor(before.amax_for(tuple(x.shape))), tensor_amax=_tensor(before.tensor_amax))
  leaf = leaves[-1]
  q = core.quantize(x, leaf.spec, _tensor(leaf.amax_for(tuple(x.shape))), tensor_amax=_tensor(leaf.tensor_amax))
  return Codes(*(None if part is None else numpy_of(part) for part in (q.codes, q.scale, q.tensor_scale, q.zero_point)))


def decode(codes: Codes, spec: core.QuantSpec, like: torch.Tensor) -> torch.Tensor:
  """The values of codes and scales, in the type of `like`."""
  parts = (_tensor(codes.codes), _tensor(codes.scale), _tensor(codes.tensor_scale), _tensor(codes.zero_point))
  return core.dequantize(core.QuantizedTensor(*parts, spec, tuple(codes.codes.shape))).to(like.dtype)


def amax_of(x: Any, spec: core.QuantSpec) -> np.ndarray:
  """`core.amax` on a torch tensor."""
  return numpy_of(core.amax(torch.as_tensor(x), spec))


def _tensor(value: np.ndarray | None) -> torch.Tensor | None:
  return None if value is None else torch.from_numpy(np.array(value))  # a copy: broadcast views are not writable
