"""Tables of the rotary position embedding, from numpy: the Flax model and its torch twin take the same numbers."""

from __future__ import annotations

import numpy as np

from experiments.models.configs import Rope


def inverse_frequencies(rope: Rope, head_dim: int, dtype: type[np.floating]) -> np.ndarray:
  """Angle per position of each pair of channels, [head_dim / 2].

  1 / theta**(2i / head_dim); "linear" divides by `factor`; "llama3" divides wavelengths longer than
  original_max_position_embeddings / low_freq_factor, keeps those shorter than .../high_freq_factor, and interpolates between them.

  References: Su et al., 2021, arXiv:2104.09864; Llama 3.1 as in Hugging Face transformers, `_compute_llama3_parameters`.
  """
  exponents = np.arange(0, head_dim, 2).astype(dtype) / dtype(head_dim)
  frequencies = dtype(1) / dtype(rope.theta) ** exponents
  if rope.rope_type == "linear":
    return frequencies / dtype(rope.factor)
  if rope.rope_type != "llama3":
    return frequencies
  low, high = dtype(rope.low_freq_factor), dtype(rope.high_freq_factor)
  turns = dtype(rope.original_max_position_embeddings) * frequencies / dtype(2 * np.pi)
  smooth = np.clip((turns - low) / (high - low), dtype(0), dtype(1))
  return (dtype(1) - smooth) * frequencies / dtype(rope.factor) + smooth * frequencies


def tables(rope: Rope, head_dim: int, tokens: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines, each [tokens, head_dim], of positions 0 .. tokens - 1.

  float64 for dtype "float64", otherwise float32: the angles of transformers are float32 in every type, and rounded in bfloat16 they
  would be useless after a few hundred positions.
  """
  kind = np.float64 if dtype == "float64" else np.float32
  angles = np.outer(np.arange(tokens).astype(kind), inverse_frequencies(rope, head_dim, kind))
  angles = np.concatenate([angles, angles], axis=-1)
  return np.cos(angles), np.sin(angles)
