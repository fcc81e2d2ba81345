"""Figures that compare a tensor with its quantized self, and what storing it costs. Host side, numpy float64."""

from __future__ import annotations

import math

import numpy as np

from core import blocks
from core.arrays import Array, to_numpy
from core.spec import QuantSpec


def sqnr_db(x: Array, y: Array) -> float:
  """Signal to quantization noise ratio, 10 log10(sum x^2 / sum (x - y)^2), pooled over all elements.

  Args:
    x: [...] reference.
    y: [...] approximation.

  Returns:
    dB; infinity where nothing differs, NaN for an all-zero reference that differs.
  """
  x64, y64 = _pair(x, y)
  noise, signal = float(np.sum((x64 - y64) ** 2)), float(np.sum(x64**2))
  if noise == 0:
    return math.inf
  return 10 * math.log10(signal / noise) if signal > 0 else math.nan


def cosine(x: Array, y: Array) -> float:
  """Cosine of the angle between two tensors, taken as vectors; 1.0 for two zero tensors."""
  x64, y64 = _pair(x, y)
  norm = float(np.sqrt(np.sum(x64**2) * np.sum(y64**2)))
  return float(np.sum(x64 * y64)) / norm if norm > 0 else float(np.array_equal(x64, y64))


def kl_divergence(logits: Array, quantized_logits: Array) -> np.ndarray:
  """KL(p || q) of two categorical distributions given by logits, in nats.

  Args:
    logits: [..., V] of the reference p.
    quantized_logits: [..., V] of q.

  Returns:
    [...] float64.
  """
  p, q = _log_softmax(to_numpy(logits)), _log_softmax(to_numpy(quantized_logits))
  return np.sum(np.exp(p) * (p - q), axis=-1)


def negative_log_likelihood(logits: Array, targets: Array) -> np.ndarray:
  """-log p(target), in nats.

  Args:
    logits: [..., V].
    targets: [...] integers.

  Returns:
    [...] float64.
  """
  log_p = _log_softmax(to_numpy(logits))
  return -np.take_along_axis(log_p, to_numpy(targets)[..., None].astype(np.int64), axis=-1)[..., 0]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """Mean and its standard error (0 for fewer than two values)."""
  values = np.asarray(values, np.float64).ravel()
  error = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0
  return float(values.mean()), error


def effective_bits(spec: QuantSpec, shape: tuple[int, ...], accounting: str = "stored") -> float:
  """Bits per element with everything that is stored.

  Args:
    spec: specification.
    shape: tensor shape.
    accounting: "stored" counts codes, scales, tensor scales and zero points; "modelopt" counts what the peer's auto_quantize does
      (element bits, 4.5 for dynamic NVFP4 with block 16).

  Raises:
    ValueError: unknown accounting, or a shape that the specification does not fit.
  """
  if accounting == "modelopt":
    nvfp4 = spec.two_level and spec.dynamic and spec.blocks == ((-1, 16),)
    return spec.element.bits + (0.5 if nvfp4 else 0.0)
  if accounting != "stored":
    raise ValueError(f'accounting {accounting!r} is unknown; allowed are "stored" and "modelopt"')
  tiling = blocks.tiling(shape, spec)
  numel, groups = math.prod(shape), math.prod(tiling.scales)
  total = numel * spec.element.bits + groups * (32 if spec.scale_format is None else spec.scale_format.bits)
  if spec.two_level:
    total += 32
  if spec.scale_block is not None:
    last = tiling.scales[-1]
    total += 32 * (groups // last) * -(-last // min(spec.scale_block, last))
  if spec.zero_point:
    total += groups * spec.element.bits
  return total / numel


def _pair(x: Array, y: Array) -> tuple[np.ndarray, np.ndarray]:
  x64, y64 = to_numpy(x).astype(np.float64), to_numpy(y).astype(np.float64)
  if x64.shape != y64.shape:
    raise ValueError(f"shapes {list(x64.shape)} and {list(y64.shape)} differ; compare tensors of one shape")
  return x64, y64


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
