"""Search of a weight's amax by the output error that each block makes: d_b^T H_b d_b, H_b the Hessian's diagonal block.

The same candidates and guarantees as `core.calibrate.weight_search`; only the error of a group differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from core import blocks
from core.blocks import Tiling
from core.calibrate.weight_search import SearchResult, mse_search, squared_error
from core.spec import QuantSpec


def block_hessians(hessian: np.ndarray, block_size: int = 16) -> np.ndarray:
  """Diagonal blocks of a Hessian.

  Args:
    hessian: [K, K] mean over tokens of x x^T.
    block_size: B; a last block that is not full is padded with zeros.

  Returns:
    [ceil(K / B), B, B], the Hessian's dtype.

  Raises:
    ValueError: not square, or a block size below 1.
  """
  hessian = np.asarray(hessian)
  if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
    raise ValueError(f"a Hessian of shape {list(hessian.shape)} is not square; it is [K, K], K the inputs of the layer")
  if block_size < 1:
    raise ValueError(f"block_size is {block_size}; a positive number of inputs is needed")
  count = -(-len(hessian) // block_size)
  padded = np.pad(hessian, [(0, count * block_size - len(hessian))] * 2)
  index = np.arange(count)
  return padded.reshape(count, block_size, count, block_size)[index, :, index, :]


def local_hessian_search(
  weight: np.ndarray, spec: QuantSpec, hessian: np.ndarray, *, block_size: int | None = 16, **options: Any
) -> SearchResult:
  """The amax of least d_b^T H_b d_b of every group.

  A group wider than H_b sums over its blocks, as in ModelOpt; one whose width `block_size` does not divide takes its own width. A format
  block that does not divide K is padded with zeros (ModelOpt falls back to the squared error).

  Args:
    weight: [N, K] float32; [N, ...] where the Hessian is that of the flattened inputs.
    spec: specification; where blocks are on the last axis only they meet the Hessian's blocks.
    hessian: [K, K].
    block_size: inputs of each H_b; None takes the format's block (the whole row for formats without blocks): more of the Hessian, and work.
    options: see `mse_search` (fp8_scale_sweep, start_multiplier, amax, ...).

  Raises:
    ValueError: a Hessian that does not fit, or a scale shared by other than whole rows or blocks of the last axis.

  References: ModelOpt 0.47, local_hessian_calibrate.
  """
  width = weight.size // max(len(weight), 1)
  if np.shape(hessian) != (width, width):
    raise ValueError(
      f"a Hessian of shape {list(np.shape(hessian))} does not fit a weight of shape {list(weight.shape)}; need [{width}, {width}]"
    )
  size = hessian_block(weight.shape, spec, block_size)
  return mse_search(weight, spec, error=hessian_error(block_hessians(hessian, size)), **options)


def hessian_block(shape: tuple[int, ...], spec: QuantSpec, block_size: int | None = 16) -> int:
  """Width of the Hessian blocks for a weight: `block_size` where it divides the inputs that share a scale, else their number.

  Raises:
    ValueError: inputs of one row share a scale in another way than as blocks of the last axis or as the whole row.
  """
  width = int(np.prod(shape[1:]))
  if spec.blocks is None:
    if spec.axis is not None and any(blocks.normalize_axis(a, shape) for a in spec.axis):
      raise ValueError(f"axis {spec.axis} gives the inputs of a row scales of their own; local_hessian needs blocks; use mse")
    group = width
  else:
    sizes = {blocks.normalize_axis(a, shape): n for a, n in spec.blocks}
    last = len(shape) - 1
    if set(sizes) - {0, last} or (len(shape) > 2 and sizes.get(last, 1) is not None):
      raise ValueError(f"blocks {dict(spec.blocks)} of a weight of shape {list(shape)} are not blocks of its last axis; use mse")
    group = sizes.get(last, 1) or shape[last]
  if block_size is None:
    return group
  return block_size if group % block_size == 0 or group == width else group


def hessian_error(hessians: np.ndarray) -> Callable[[np.ndarray, Tiling], np.ndarray]:
  """The `error` hook of `mse_search`: sum of |d_b R_b|^2 with R_b R_b = H_b. As a sum of squares it is never negative.

  R_b is the symmetric square root, which leaves padding (zero rows of H_b) at zero; eigenvalues below 0, which rounding makes, count as 0.

  Args:
    hessians: [K/B, B, B].
  """
  values, vectors = np.linalg.eigh(np.asarray(hessians, np.float64))
  root = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]) @ np.swapaxes(vectors, 1, 2)
  root = np.ascontiguousarray(root, np.float32)
  count, size = root.shape[:2]

  def error(difference: np.ndarray, tiling: Tiling) -> np.ndarray:
    rows = difference.reshape(int(np.prod(tiling.padded[:1])), -1)
    width = rows.shape[1]
    if width != count * size:  # a format's padding, or none where the Hessian's blocks need some
      rows = np.pad(rows, [(0, 0), (0, max(count * size - width, 0))])[:, : count * size]
    out = np.empty_like(rows)
    split = [a.reshape(len(rows), count, size).swapaxes(0, 1) for a in (rows, out)]
    np.matmul(split[0], root, out=split[1])
    if width != count * size:
      out = np.pad(out, [(0, 0), (0, max(width - count * size, 0))])[:, :width]
    return squared_error(out.reshape(difference.shape), tiling)

  return error
