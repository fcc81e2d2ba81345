"""Rotations that are folded into weights: the residual stream turned by an orthogonal matrix R, the values of every head by R2.

h' = h R. Whatever writes into the stream gets R on its output side (W' = R^T W, b' = b R; an embedding E' = E R), whatever reads from it
gets R on its input side (W' = W R): (h R)(W R)^T = h W^T. In between stand RMSNorms, which commute with R once their weight g is 1, so g
goes into the readers first: W g. The outliers of single channels are then spread over all channels of a block, and quantize better.

R is a random Hadamard matrix: random signs, then blocks of Hadamard matrices whose size is the largest power of two that divides the
width; or a random orthogonal matrix. Everything is computed in float64 and rounded once, so both backends get the same bits.

References: Ashkboos et al., 2024, arXiv:2404.00456 (QuaRot); Liu et al., 2024, arXiv:2405.16406 (SpinQuant, R1 and R2). Where we leave
them: widths that are no power of two get blocks (QuaRot builds Hadamard matrices of size 12 2^k and the like); nothing is rotated
online (QuaRot's rotation of down_proj's input; `rotate` of a quantizer does that).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from core import hadamard

KINDS = ("hadamard", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Rotation:
  """x -> x R, R = diag(signs) blockdiag(block, block, ...).

  Attributes:
    signs: [K] of 1 and -1.
    block: [B, B] orthogonal, float64; B divides K.
  """

  signs: np.ndarray
  block: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """[..., K] times R. float64."""
    turned = (np.asarray(x, np.float64) * self.signs).reshape(-1, len(self.block)) @ self.block
    return turned.reshape(x.shape)

  def inputs(self, weight: np.ndarray, norm: np.ndarray | None = None) -> np.ndarray:
    """W diag(g) R: [N, K] of a layer that reads the rotated stream behind a norm of weight g [K]. float64."""
    weight = np.asarray(weight, np.float64)
    return self(weight if norm is None else weight * np.asarray(norm, np.float64))

  def outputs(self, weight: np.ndarray) -> np.ndarray:
    """R^T W: [K, M] of a layer that writes into the stream; a bias [K] is `self(bias)`. float64."""
    return np.ascontiguousarray(self(np.ascontiguousarray(weight.T)).T)


def rotation(length: int, kind: str = "hadamard", block_size: int | None = None, seed: int = 0) -> Rotation:
  """A random rotation.

  Args:
    length: K.
    kind: "hadamard" or "orthogonal" (the QR decomposition of a normal matrix with the signs of R's diagonal taken out: Haar measure).
    block_size: B; None is the largest power of two that divides K for "hadamard", and K for "orthogonal".
    seed: of the signs or of the matrix.

  Raises:
    ValueError: another kind, or a block size that does not fit (a power of two, for "hadamard").
  """
  if kind == "hadamard":
    size = hadamard.block_size(length, block_size)
    signs = np.asarray(hadamard.rotate(np.ones(length, np.float32), 1, seed), np.float64)
    return Rotation(signs, np.sign(hadamard.rotate(np.eye(size, dtype=np.float32), size)).astype(np.float64) / np.sqrt(size))
  if kind != "orthogonal":
    raise ValueError(f"kind of rotation is {kind!r}; allowed are {', '.join(map(repr, KINDS))}")
  size = length if block_size is None else block_size
  if size < 1 or length % size:
    raise ValueError(f"block size {size} does not divide the width {length}; give a divisor, or None for one block")
  q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
  return Rotation(np.ones(length), q * np.sign(np.diag(r)))
