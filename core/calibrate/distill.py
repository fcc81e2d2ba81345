"""End-to-end tuning: scales, norms and low-rank factors of a quantized model move so that it returns what the float model returned.

minimise the mean over calibration tokens of KL(p_float || p_quantized) by Adam on few, smooth parameters; codes stay. Gradients are the
backends'; every step of the parameters is taken here, on the host, so that both take the same one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import numpy as np

import core
from core import blocks, rounding
from core.calibrate.adam import Adam, cosine
from core.calibrate.adaround import levels_and_steps
from core.calibrate.layer import Change, Layer

LOSSES = ("kl", "mse")
PARTS = ("scales", "norms", "low_rank", "rounding")


class Student(Protocol):
  """A quantized model beside the outputs of its float self."""

  def batches(self) -> int:
    """Number of calibration batches."""
    ...

  def norms(self) -> dict[str, np.ndarray]:
    """Weights [K] of the norms, by name."""
    ...

  def low_rank(self) -> dict[str, np.ndarray]:
    """Low-rank factors, by name."""
    ...

  def set(self, values: dict[str, np.ndarray]) -> None:
    """Replace norms and low-rank factors."""
    ...

  def gradient(self, batch: int, values: dict[str, np.ndarray], loss: str) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of one batch and its gradients by these values: "<layer>.weight" (taken as it is, in torch's layout), norms, factors."""
    ...


class Moving:
  """A tensor r that starts at zero and steps against its gradient, at most about `lr` at first and ever less."""

  def __init__(self, shape: tuple[int, ...], lr: float, steps: int) -> None:
    self.value = np.zeros(shape, np.float32)
    self._adam = Adam(shape)
    self._lr, self._steps, self._done = lr, steps, 0

  def step(self, gradient: np.ndarray) -> None:
    """One step against the gradient."""
    self.value -= np.float32(cosine(self._lr, self._done, self._steps)) * self._adam.direction(gradient)
    self._done += 1


def tunes_scales(layer: Layer) -> bool:
  """Whether the scales of a layer's weight are free numbers: one static, symmetric format with a float32 scale per group."""
  if len(layer.specs) != 1 or layer.amax is None:
    return False
  spec = layer.spec
  return not (spec.dynamic or spec.two_level or spec.is_mx or spec.zero_point) and spec.scale_format is None


class TunedWeight:
  """One weight as levels times scales; the scales move by a factor exp(r), and on request the levels with their latent positions.

  Args:
    layer: the layer; its weight is quantized as it stands.
    steps: number of steps to come.
    scale_lr: relative change of a scale in a step; 0 keeps them.
    rounding_lr: change of a latent position in a step, in levels; 0 keeps the levels.
    latent: [N, K] float weight; where it lies between two levels decides which levels are close to changing.
  """

  def __init__(self, layer: Layer, steps: int, scale_lr: float, rounding_lr: float = 0.0, latent: np.ndarray | None = None) -> None:
    self.layer = layer
    self._tiling = blocks.tiling(layer.weight.shape, layer.spec)
    amax = self._amax = np.asarray(layer.amax, np.float32)
    stored = core.quantize(layer.weight, layer.spec, amax)
    self._level, step = levels_and_steps(stored)
    self._step = np.asarray(core.scales(amax, layer.spec).step, np.float32)
    self._scales = Moving(self._step.shape, scale_lr, steps) if scale_lr else None
    self._moves = Moving(layer.weight.shape, rounding_lr, steps) if rounding_lr else None
    source = layer.weight if latent is None else latent
    scaled = source / np.where(step == 0, 1, step)
    self._start = np.clip(scaled, self._level - np.float32(0.499), self._level + np.float32(0.499)).astype(np.float32)

  def value(self) -> np.ndarray:
    """[N, K] float32: the weight now."""
    return self._levels() * self._spread(self._steps())

  def _levels(self) -> np.ndarray:
    if self._moves is None:
      return self._level
    return rounding.to_level(self._start + self._moves.value, self.layer.spec.element)

  def _steps(self) -> np.ndarray:
    return self._step if self._scales is None else self._step * np.exp(self._scales.value)

  def _spread(self, values: np.ndarray) -> np.ndarray:
    tiles = np.broadcast_to(blocks.expand(values, self._tiling), self._tiling.tiles)
    return blocks.from_blocks(np.ascontiguousarray(tiles), self._tiling)

  def step(self, gradient: np.ndarray) -> None:
    """One step, from the gradient by the weight."""
    steps = self._steps()
    if self._moves is not None:
      self._moves.step(gradient * self._spread(steps))
    if self._scales is not None:
      tiles = blocks.to_blocks(gradient * self._levels(), self._tiling)
      total = np.sum(tiles, axis=self._tiling.reduce, dtype=np.float64).reshape(steps.shape)
      self._scales.step((total * steps).astype(np.float32))

  def finish(self, report: dict[str, Any]) -> Change:
    """The weight on its grid, at the amax whose scales are the tuned ones."""
    amax = (self._steps() * np.float32(self.layer.spec.element_bound)).astype(np.float32).reshape(self._amax.shape)
    exact = np.asarray(core.scales(amax, self.layer.spec).step, np.float32)
    weight = self._levels() * self._spread(exact)
    return Change(weight=core.fake_quantize(weight, self.layer.spec, amax), amax=amax, report=report)


@dataclasses.dataclass
class _Free:
  """A tensor that moves: value * (1 + r) for norms, value + r * size for factors."""

  start: np.ndarray
  unit: np.ndarray
  moving: Moving

  def value(self) -> np.ndarray:
    return self.start + self.unit * self.moving.value

  def step(self, gradient: np.ndarray) -> None:
    self.moving.step(gradient * self.unit)


def tune(
  student: Student,
  layers: list[Layer],
  *,
  parts: tuple[str, ...] = ("scales", "norms", "low_rank"),
  epochs: int = 4,
  scale_lr: float = 1e-3,
  norm_lr: float = 1e-3,
  low_rank_lr: float = 5e-4,
  rounding_lr: float = 0.0,
  latents: dict[str, np.ndarray] | None = None,
  loss: str = "kl",
  seed: int = 0,
  tell: Any = None,
) -> tuple[dict[str, Change], list[float]]:
  """Tune a model.

  Args:
    student: the model beside its teacher.
    layers: its quantized layers; those whose scales are no free numbers keep them.
    parts: what moves: "scales", "norms", "low_rank", "rounding".
    epochs: passes over the calibration batches.
    scale_lr: largest relative change of a scale in a step.
    norm_lr: the same of a norm's weight.
    low_rank_lr: largest change of a factor in a step, over the factor's own root mean square.
    rounding_lr: with "rounding": largest change of a latent position in a step, in levels.
    latents: float weights by layer name, for "rounding".
    loss: "kl" for logits, "mse" for hidden states.
    seed: of the order of the batches.
    tell: called with a text before every step.

  Returns:
    (changes of the layers' weights by name, mean loss of each epoch).

  Raises:
    ValueError: an unknown part or loss, or no calibration batches.
  """
  unknown = sorted(set(parts) - set(PARTS))
  if unknown or loss not in LOSSES:
    raise ValueError(f"parts {list(parts)} and loss {loss!r}: allowed are {', '.join(PARTS)} and {', '.join(LOSSES)}")
  count = student.batches()
  if not count:
    raise ValueError("tuning needs calibration data; the forward loop never called the model")
  steps = epochs * count
  moving = scale_lr if "scales" in parts else 0.0
  rounding_lr = rounding_lr if "rounding" in parts else 0.0
  weights = {
    f"{layer.name}.weight": TunedWeight(layer, steps, moving, rounding_lr, (latents or {}).get(layer.name))
    for layer in layers
    if (moving or rounding_lr) and tunes_scales(layer)
  }
  free: dict[str, _Free] = {}
  if "norms" in parts:
    free |= {n: _Free(v, np.maximum(np.abs(v), np.abs(v).mean()), Moving(v.shape, norm_lr, steps)) for n, v in student.norms().items()}
  if "low_rank" in parts:
    free |= {n: _Free(v, np.full_like(v, _size(v)), Moving(v.shape, low_rank_lr, steps)) for n, v in student.low_rank().items()}
  rng, losses = np.random.default_rng(seed), []
  for epoch in range(epochs):
    total = 0.0
    for batch in rng.permutation(count):
      if tell is not None:
        tell(f"epoch {epoch + 1}" + (f", loss {losses[-1]:.4f}" if losses else ""))
      values = {name: weight.value() for name, weight in weights.items()} | {name: f.value() for name, f in free.items()}
      found, gradients = student.gradient(int(batch), values, loss)
      if not math.isfinite(found):
        raise ValueError(f"the loss of calibration batch {batch} is {found} in epoch {epoch + 1}; lower scale_lr, norm_lr and low_rank_lr")
      total += found
      for name, gradient in gradients.items():
        (weights[name] if name in weights else free[name]).step(gradient)
    losses.append(total / count)
  student.set({name: f.value() for name, f in free.items()})
  return {w.layer.name: w.finish({}) for w in weights.values()}, losses


def _size(value: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))) or 1.0
