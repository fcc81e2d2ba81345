"""SVDQuant's low-rank branch: the weight's leading rank-r part stays in high precision, and only what remains is quantized.

W = residual + B A with A [r, K], B [N, r]; the layer computes Q(x) Q(residual)^T + (x A^T) B^T.

Whatever is minimised, the best B A is U U^T W, U [N, r] the leading left singular vectors: of W for |W - B A|, of W L (L L^T = H, the mean
of x x^T) for the outputs' |(W - B A) X|. U comes from the eigenvectors of the smaller Gram matrix, 2 to 4 times faster than an SVD: in
float64 their error costs at most about 1e-16 |W|^2 of residual energy, less than rounding the weight itself to float32 does.

References: Li et al., 2024, arXiv:2411.05007 (B = U S, A = V^T); Eckart and Young, 1936.
"""

from __future__ import annotations

import numpy as np


def low_rank(
  weight: np.ndarray, rank: int, hessian: np.ndarray | None = None, *, weighted: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Splits a weight into a residual and a low-rank part.

  Plain: |residual|^2 = sum of s_i^2 over i > r, s the singular values of W. Weighted: the same of W L, for residual L: the least mean
  squared output error of leaving the residual out. A rank above min(N, K) becomes that (ModelOpt pads with zeros).

  Args:
    weight: [N, K] float32, after its pre_quant_scale.
    rank: r, at least 1.
    hessian: [K, K] mean of x x^T of the scaled input; used where weighted. It may be singular: no ridge is added.
    weighted: minimise the outputs' error in place of the weight's.

  Returns:
    (residual [N, K], a [r, K], b [N, r]) float32; a has rows of length 1 (orthogonal ones in the plain case), b holds the singular values,
    and residual is what is left of the weight by the rounded a and b.

  Raises:
    ValueError: rank below 1, a weight that is no matrix, or weighted without a Hessian that fits.
  """
  if weight.ndim != 2 or rank < 1:
    raise ValueError(f"weight of shape {list(weight.shape)} and rank {rank}; low_rank needs a matrix [N, K] and a rank of at least 1")
  count = weight.shape[1]
  if weighted and (hessian is None or hessian.shape != (count, count)):
    got = "None" if hessian is None else list(hessian.shape)
    raise ValueError(f"weighted low_rank needs a Hessian of shape [{count}, {count}]; got {got}")
  w = np.asarray(weight, np.float64)
  left = _leading_left(w, np.asarray(hessian, np.float64) if weighted else None, min(rank, *w.shape))
  a = left.T @ w
  length = np.linalg.norm(a, axis=1)
  a = (a / np.where(length > 0, length, 1)[:, None]).astype(np.float32)
  b = (left * length).astype(np.float32)
  residual = w - b.astype(np.float64) @ a.astype(np.float64)
  return residual.astype(np.float32), a, b


def _leading_left(weight: np.ndarray, hessian: np.ndarray | None, rank: int) -> np.ndarray:
  """[N, r] leading left singular vectors of W (of W L with a Hessian), orthonormal."""
  if weight.shape[0] <= weight.shape[1]:
    gram = weight @ (weight if hessian is None else weight @ hessian).T
    return _leading(gram, rank)
  scaled = weight if hessian is None else weight @ _root(hessian)
  return np.linalg.qr(scaled @ _leading(scaled.T @ scaled, rank))[0]


def _leading(symmetric: np.ndarray, rank: int) -> np.ndarray:
  """Eigenvectors of the `rank` largest eigenvalues, largest first."""
  return np.linalg.eigh(symmetric)[1][:, : -rank - 1 : -1]


def _root(hessian: np.ndarray) -> np.ndarray:
  """L with L L^T = H; eigenvalues below 0, which rounding makes, count as 0."""
  values, vectors = np.linalg.eigh(hessian)
  return vectors * np.sqrt(np.maximum(values, 0))
