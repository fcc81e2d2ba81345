"""A model in JAX and Flax, as the experiments see it: numpy in, numpy out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import core
import jax_backend
from core.config.matching import canonical_name
from experiments import models
from experiments.quantities import Codes, Leaf, Weight
from jax_backend import layouts, tree, weights
from jax_backend.attention import is_bmm
from jax_backend.capture import observing


def _result(output: Any) -> jax.Array:
  return getattr(output, "last_hidden_state", output)


def _next_token_loss(logits: jax.Array, ids: Any) -> jax.Array:
  chosen = jax.nn.log_softmax(logits[:, :-1])
  return -jnp.take_along_axis(chosen, jnp.asarray(ids)[:, 1:, None], -1).mean()


class Model:
  """A float model.

  Attributes:
    module: the linen module.
    variables: {"params": ..., "quant": ...}.
    jit: compile the whole model; otherwise it runs operation by operation.
  """

  backend = "jax"

  def __init__(self, module: Any, variables: Mapping[str, Any], jit: bool = False) -> None:
    self.module, self.variables, self.jit = module, variables, jit
    self.parts: dict[str, Any] = {}
    self._compiled = jax.jit(lambda variables, ids: _result(module.apply(variables, ids)))

  @classmethod
  def load(cls, source: str, dtype: str = "float32", twin: bool = False, jit: bool = False) -> Model:
    """From a name or folder. There is one Flax model for every dtype, so `twin` changes nothing."""
    del twin
    module, variables, _ = models.load_jax(source, dtype)
    return cls(module, variables, jit)

  def nbytes(self) -> int:
    """Bytes of all parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.variables["params"]))

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    if self.jit:
      return np.asarray(self._compiled(self.variables, ids))
    return np.asarray(_result(self.module.apply(self.variables, jnp.asarray(ids))))

  def quantize(
    self,
    config: Mapping[str, Any],
    batches: Sequence[np.ndarray],
    group_rules: Sequence[str] | None = None,
    report: list[dict[str, Any]] | None = None,
  ) -> Quantized:
    """A quantized version, calibrated on these batches; `report` gets what calibration says of each layer."""
    # One compilation per batch shape: a shorter last batch would cost a second one.
    full = max(len(ids) for ids in batches)
    whole = [ids for ids in batches if len(ids) == full]
    rest = [ids[i : i + 1] for ids in batches if len(ids) != full for i in range(len(ids))]

    def loop(model: Any) -> None:
      for ids in whole + rest:
        model(ids)

    quantized = jax_backend.quantize(self.module, self.variables, config, loop, group_rules=group_rules, report=report)
    return Quantized(*quantized, self.jit)

  def auto_quantize(self, batches: Sequence[np.ndarray], constraints: Mapping[str, Any], formats: Any, **options: Any) -> Any:
    """As `on_torch.Model.auto_quantize`."""
    steps = {"num_calib_steps": len(batches), "num_score_steps": len(batches), **options}
    step = {"forward_step": lambda model, ids: _result(model(jnp.asarray(ids))), "loss_func": _next_token_loss}
    quantized, state = jax_backend.auto_quantize(self.module, self.variables, constraints, formats, list(batches), **step, **steps)
    return Quantized(*quantized, self.jit), state

  def restored(self, directory: str | Path) -> Quantized:
    """As `on_torch.Model.restored`; this model stays as it is."""
    return Quantized(*jax_backend.restore(self.module, self.variables, directory), self.jit)

  def _run(self, ids: np.ndarray) -> np.ndarray:
    return np.asarray(_result(self.module.apply(self.variables, jnp.asarray(ids))))

  def layer_io(self, ids: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, dict[str, tuple[Any, Any]]]:
    """As `on_torch.Model.layer_io`, operation by operation."""
    found: dict[str, tuple[Any, Any]] = {}
    self.parts = {}

    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
      output = next_fun(*args, **kwargs)
      name = canonical_name("/".join(context.module.path))
      if context.method_name == "__call__" and name in names:
        found[name] = (args[0], output)
        self.parts[name] = (tuple(context.module.path), context.module.clone(parent=None, name=None))
      return output

    with nn.intercept_methods(watch):
      return self._run(ids), found


class Quantized(Model):
  """A quantized model."""

  def alone(self, name: str, x: Any) -> Any:
    """What one layer makes of an input; after `layer_io`, which finds the layers."""
    path, part = self.parts[name]
    below = {key: tree.lookup(value, path) for key, value in self.variables.items()}
    return jax_backend.QuantModule(part).apply({key: value for key, value in below.items() if value is not None}, x)

  def leaves(self) -> dict[str, tuple[Leaf, ...]]:
    found = {name: _leaves(q) for name, q in self.quantizers().items() if q.is_enabled}
    return dict(sorted(found.items()))

  def quantizers(self) -> dict[str, Any]:
    return {tree.full_name(path, name): q for path, name, q in tree.items(self.variables["quant"])}

  def weights(self) -> Iterator[Weight]:
    entries = weights.each(self.variables)
    for path, name, quantizer, weight in sorted(entries, key=lambda entry: tree.full_name(*entry[:2])):
      if quantizer.is_enabled:
        if quantizer.stack:
          raise ValueError(f"{tree.full_name(path, name)} belongs to a scanned stack; load the model with scan_layers=False to compare it")
        show = functools.partial(layouts.to_torch, layout=quantizer.layout)
        yield Weight(tree.full_name(path, name), show(weight), show(weights.quantized(quantizer, weight)), _leaves(quantizer))

  def export(self, directory: str | Path, **options: Any) -> None:
    """As `on_torch.Quantized.export`."""
    jax_backend.export(self.module, self.variables, directory, **options)

  def verify(self, artefact: str | Path, controls: bool = False, **options: Any) -> Any:
    """As `on_torch.Quantized.verify`."""
    return (jax_backend.verify_controls if controls else jax_backend.verify)(self.module, self.variables, artefact, **options)

  def fold(self) -> None:
    self.variables = jax_backend.fold_weight(self.module, self.variables)

  def map_quantizers(self, fn: Callable[[str, Any], Any]) -> None:
    """Put `fn(name, quantizer)` in the place of each quantizer."""
    entries = {(path, name): fn(tree.full_name(path, name), q) for path, name, q in tree.items(self.variables["quant"])}
    self.variables = {**self.variables, "quant": tree.build(entries)}

  def adopt(self, leaves: Mapping[str, Sequence[Leaf]]) -> None:
    """Take over the calibrated state of another backend's quantizers, by name."""
    self.map_quantizers(lambda name, q: with_amax(q, leaves[name]) if name in leaves else q)

  def run(self, ids: np.ndarray, on_quantizer: Callable[..., None], on_layer: Callable[[str, Any], None]) -> np.ndarray:
    """Run one batch, operation by operation; arguments as in `on_torch.Quantized.run`."""
    layers = {name.rpartition(".")[0] for name in self.quantizers() if not is_bmm(name)}

    def told(name: str, quantizer: Any, x: Any, y: Any) -> None:
      if is_bmm(name):  # [B, T, heads, D] here, [B, heads, T, D] in torch
        x, y = (layouts.to_torch(value, quantizer.layout) for value in (x, y))
      on_quantizer(name, quantizer, x, y)

    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
      output = next_fun(*args, **kwargs)
      name = canonical_name("/".join(context.module.path))
      if context.method_name == "__call__" and name in layers:
        on_layer(name, output)
      return output

    with nn.intercept_methods(watch), observing(told):
      return np.asarray(_result(self.module.apply(self.variables, jnp.asarray(ids))))


def _leaves(quantizer: Any) -> tuple[Leaf, ...]:
  leaves = []
  for one in quantizer.leaves:
    spec = one.config.spec
    given = spec.two_level and not spec.dynamic and one.tensor_amax is not None
    amax = None if one.amax is None else np.asarray(one.amax)
    leaves.append(Leaf(one.config, amax, np.asarray(one.tensor_amax) if given else None))
  return tuple(leaves)


array = jnp.asarray


def prepare(quantizer: Any, x: Any) -> Any:
  """As `on_torch.prepare`."""
  first = quantizer.leaves[0]
  x = first.prepare(x)
  if first.config.bias is not None:
    if first.bias is None:
      raise ValueError("a quantizer takes its bias from each input; compare a configuration without a dynamic bias")
    x = x.astype(jnp.float32) - first.bias
  return x


def encode(x: Any, leaves: Sequence[Leaf]) -> Codes:
  """As `on_torch.encode`, by `core` on JAX arrays."""
  x = jnp.asarray(x)
  for before in leaves[:-1]:
    x = _fake_quantize(before.spec, x, before.amax_for(x.shape), before.tensor_amax)
  leaf = leaves[-1]
  parts = _quantize(leaf.spec, x, leaf.amax_for(x.shape), leaf.tensor_amax)
  return Codes(*(None if part is None else np.asarray(part) for part in parts))


def decode(codes: Codes, spec: core.QuantSpec, like: Any) -> Any:
  """The values of codes and scales, in the type of `like`."""
  return _dequantize(spec, *codes).astype(like.dtype)


def amax_of(x: Any, spec: core.QuantSpec) -> np.ndarray:
  """`core.amax` on a JAX array."""
  return np.asarray(_amax(spec, jnp.asarray(x)))


def with_amax(quantizer: Any, leaves: Sequence[Leaf]) -> Any:
  """The quantizer with the state of another backend's."""
  state = iter(leaves)

  def give(one: Any) -> Any:
    leaf = next(state)
    return one.with_amax(leaf.amax, leaf.tensor_amax)

  return quantizer.map(give)


@functools.partial(jax.jit, static_argnums=0)
def _quantize(spec: core.QuantSpec, x: Any, amax: Any, tensor_amax: Any) -> tuple[Any, ...]:
  q = core.quantize(x, spec, amax, tensor_amax=tensor_amax)
  return q.codes, q.scale, q.tensor_scale, q.zero_point


@functools.partial(jax.jit, static_argnums=0)
def _dequantize(spec: core.QuantSpec, codes: Any, scale: Any, tensor_scale: Any, zero_point: Any) -> Any:
  return core.dequantize(core.QuantizedTensor(codes, scale, tensor_scale, zero_point, spec, codes.shape))


@functools.partial(jax.jit, static_argnums=0)
def _fake_quantize(spec: core.QuantSpec, x: Any, amax: Any, tensor_amax: Any) -> Any:
  return core.fake_quantize(x, spec, amax, tensor_amax=tensor_amax)


@functools.partial(jax.jit, static_argnums=0)
def _amax(spec: core.QuantSpec, x: Any) -> Any:
  return core.amax(x, spec)
