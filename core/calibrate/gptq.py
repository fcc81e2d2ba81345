"""GPTQ: columns are rounded in order, and the error of each is made up for by the columns after it.

With H = E[x x^T] = (I + U) D (I + U)^T, U strictly upper triangular and D diagonal, the output error of a row is

  d H d^T = sum over k of D_k (d_k + sum over j < k of d_j U_jk)^2,     d = Q - W,

so q_k = Q(w_k + sum over j < k of (w_j - q_j) U_jk) makes every square as small as rounding can: sum(D) / 12 in units of the step, where
rounding each weight to its nearest value makes trace(H) / 12.

The papers write the same numbers in two ways. GPTQ spreads the error by the Cholesky factor of H's inverse; LDLQ feeds it back by U, which
needs no inverse. This is LDLQ's form: errors are those of the original weight, so a column can be set to any value at any time.

References: Frantar et al., 2022, arXiv:2210.17323 (GPTQ); Chee et al., 2023, arXiv:2307.13304 (LDLQ, and that the two are one); Li et al.,
2025, arXiv:2504.02692 (GPTAQ, the correction).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import core
from core.calibrate.gptq_scales import Grid, Plan
from core.calibrate.layer import output_error
from core.spec import QuantSpec

SETTLE_ROUNDS = 16


@dataclasses.dataclass(frozen=True)
class Factor:
  """A factored Hessian: H[order][:, order] + damping = (I + feedback) diag(diagonal) (I + feedback)^T.

  Layers that read one input (q, k, v) share it.

  Attributes:
    order: [K] columns in the order in which they are quantized.
    feedback: [K, K] float64, strictly upper triangular, in that order.
    diagonal: [K] float64, in that order. Its sum over trace(H) is what GPTQ can gain.
    damping: what was added to the diagonal, over its mean.
  """

  order: np.ndarray
  feedback: np.ndarray
  diagonal: np.ndarray
  damping: float


@dataclasses.dataclass
class GptqResult:
  """A weight on its format's grid.

  Attributes:
    weight: [N, K] float32; `core.fake_quantize(weight, spec, amax, tensor_amax=tensor_amax)` is the same bits.
    amax: what the quantizer is to hold, as `core.amax(weight, spec)` shapes it; None where it takes amax from the weight.
    tensor_amax: [] float32 of static two-level formats; else None.
    report: "error_before" (round to nearest at the plain amax) and "error", means over outputs of the mean squared output error;
      "damping" as used; "settled", the share of weights that had to be rounded once more; "note" where something asked for did not apply.
  """

  weight: np.ndarray
  amax: np.ndarray | None
  tensor_amax: np.ndarray | None
  report: dict[str, Any]


def factor(hessian: np.ndarray, damping: float = 0.01, act_order: bool = False) -> Factor:
  """Factors a Hessian in float64.

  Inputs that were always zero get the mean diagonal and nothing beside it: their weights are rounded to nearest. (ModelOpt treats columns
  of zero weights so, which need nothing.) `damping` times the mean of the other diagonal entries is added to the diagonal; where that is
  not enough for a Cholesky factor it is raised tenfold, up to 1 (ModelOpt rounds to nearest instead, silently).

  Args:
    hessian: [K, K] mean over tokens of x x^T.
    damping: 0 to 1.
    act_order: quantize the columns of largest mean square first.

  Raises:
    ValueError: not square, not finite, damping out of range, or not positive definite even at damping 1.
  """
  hessian = _square(hessian, "hessian")
  if not 0 <= damping <= 1:
    raise ValueError(f"damping is {damping}; a share of the mean diagonal from 0 to 1 is needed, for example 0.01")
  diagonal = np.diagonal(hessian)
  dead = diagonal <= 0
  order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(hessian))
  if dead.all():
    return Factor(order, np.zeros(hessian.shape), np.ones(len(hessian)), damping)
  hessian = np.where(dead[:, None] | dead, 0.0, hessian)
  mean = float(diagonal[~dead].mean())
  hessian[dead, dead] = mean
  used = damping
  while True:
    try:
      upper = _upper_cholesky((hessian + np.diag(np.full(len(hessian), used * mean)))[np.ix_(order, order)])
      break
    except np.linalg.LinAlgError:
      if used >= 1:
        raise ValueError(
          f"the Hessian is not positive definite with {used:g} times its mean diagonal {mean:g} added; its least eigenvalue is "
          f"{np.linalg.eigvalsh(hessian)[0]:g}; gather it as the mean of x x^T over finite inputs"
        ) from None
      used = min(max(used * 10, 1e-6), 1.0)
  scale = np.diagonal(upper).copy()
  return Factor(order, np.triu(upper / scale, 1), scale**2, used)


def gptq(
  weight: np.ndarray,
  hessian: np.ndarray,
  spec: QuantSpec,
  *,
  amax: np.ndarray | None = None,
  tensor_amax: np.ndarray | None = None,
  act_order: bool = False,
  damping: float = 0.01,
  block: int = 128,
  scale_search: str | bool = False,
  signed: bool = False,
  cross: np.ndarray | None = None,
  correction: float = 0.0,
  ridge: float = 0.1,
  factored: Factor | None = None,
) -> GptqResult:
  """Quantizes a weight by GPTQ.

  Scales are taken when the first column of their group is reached, from the weights as they are then, each earlier error made up for.
  They are taken beforehand from the weight as given where `amax` says so, under act_order ("static groups": a group's columns come at
  different times) and for double-quantized scales. Formats that take their scales from the quantized weight itself (dynamic) keep the
  elements from which a scale is taken at their nearest value, so that the same scale comes out again; what still changes when it is
  quantized once more (a float32 product that rounds) is replaced by what it changes to. That is the invariant of the result.

  Args:
    weight: [N, K] float32, finite.
    hessian: [K, K] mean over tokens of x x^T of the layer's (quantized) input. All zero: round to nearest.
    spec: specification; stochastic rounding becomes nearest.
    amax: scales to use, as `core.amax(weight, spec)` shapes them; for dynamic two-level formats the tensor amax. None takes them from the
      weight. With `scale_search` only a tensor amax counts; a dynamic format has no other.
    tensor_amax: [] for two-level formats; None takes the largest amax.
    act_order: columns of largest mean square first.
    damping: see `factor`.
    block: columns between two updates of all later ones; results agree to float64 rounding.
    scale_search: True or "hessian": each group's amax by least output error of its own columns (`gptq_scales.search_amax`).
    signed: let the search choose negative scales where the format has them (`QuantSpec.allows_signed_scale`); no effect elsewhere.
    cross: [K, K] mean of y x^T, y the float model's input at the same place.
    correction: 0 to 1, how far to move to the weight that makes W' x closest to W y; see `target`. 0.5 is what has worked.
    ridge: keeps that weight near the old one.
    factored: `factor(hessian, damping, act_order)`, made once for layers with the same input; its order is used.

  Raises:
    ValueError: shapes that do not fit, an option out of range, a weight or Hessian that is not finite, or a dynamic format in which no
      weight quantizes to itself.

  References: arXiv:2210.17323, algorithm 1; "static groups" and act_order as in its authors' code.
  """
  weight, hessian = _checked(weight, hessian, spec, block, scale_search)
  spec = spec.replace(rounding="nearest")
  original, note = weight, ""
  if correction:
    weight = target(weight, hessian, cross, correction, ridge)
  if not hessian.any():
    hessian, note = np.eye(len(hessian)), "no inputs were seen: rounded to nearest, errors are those of the weights"
  factored = factor(hessian, damping, act_order) if factored is None else factored
  if len(factored.order) != len(hessian):
    raise ValueError(f"factored is of {len(factored.order)} inputs, the Hessian of {len(hessian)}; factor this Hessian")
  plain, tensor_amax = _plain_amax(original, spec, amax, tensor_amax)
  given = None if scale_search or spec.dynamic else amax
  ordered = not np.array_equal(factored.order, np.arange(len(hessian)))
  plan = Plan(Grid(spec, original.shape, tensor_amax), weight, hessian, given, bool(scale_search), signed, ordered)
  with np.errstate(over="ignore", under="ignore", invalid="ignore"):
    values = _quantize_columns(np.ascontiguousarray(weight.T), factored, plan, block)
  amax = plan.amax if not spec.dynamic else (tensor_amax if spec.two_level else None)
  tensor_amax = None if spec.dynamic else tensor_amax
  values, settled = settle(values, spec, amax, tensor_amax)
  before = core.fake_quantize(original, spec, plain, tensor_amax=tensor_amax)
  report: dict[str, Any] = {
    "error_before": float(output_error(before - weight, hessian).mean()),
    "error": float(output_error(values - weight, hessian).mean()),
    "damping": factored.damping,
    "settled": settled,
  }
  return GptqResult(values, amax, tensor_amax, report | ({"note": note} if note else {}))


def target(weight: np.ndarray, hessian: np.ndarray, cross: np.ndarray | None, correction: float, ridge: float = 0.1) -> np.ndarray:
  """A weight that makes up for the error of the layer's inputs: W + correction * (W* - W).

  W* = W + W (C - H) (H + ridge mean(diag H) I)^-1, with C = E[y x^T] and H = E[x x^T], is the minimum over W' of
  E |W' x - W y|^2 + ridge mean(diag H) |W' - W|^2: x is what the quantized layers before it deliver, y what the float model does.

  GPTAQ and Qronos fold this term into the order of columns, at full strength and without a ridge. Here it is solved once, before the
  first column: with real calibration sets (fewer than 10^5 tokens) full strength fits noise, and half strength was better than either end.

  Args:
    weight: [N, K].
    hessian: [K, K].
    cross: [K, K].
    correction: 0 to 1.
    ridge: above 0, or 0 for a Hessian that is positive definite.

  Returns:
    [N, K] float64.

  Raises:
    ValueError: no cross, one that does not fit, or a strength or ridge out of range.

  References: Li et al., 2025, arXiv:2504.02692 (GPTAQ); Zhang et al., 2025, arXiv:2505.11695 (Qronos).
  """
  if cross is None:
    raise ValueError(f"correction is {correction} but there is no cross; gather the statistic 'cross', or leave correction at 0")
  if not 0 <= correction <= 1 or not ridge >= 0:
    raise ValueError(f"correction is {correction} and ridge {ridge}; correction is 0 to 1 (0.5 is usual), ridge at least 0 (0.1 is usual)")
  weight, hessian, cross = np.asarray(weight, np.float64), _square(hessian, "hessian"), _square(cross, "cross")
  if not hessian.any():
    return weight
  shift = weight @ (cross - hessian)
  live = np.diagonal(hessian) > 0
  system = hessian + np.diag(np.where(live, ridge * np.diagonal(hessian).mean(), 1.0))
  try:
    moved = np.linalg.solve(system, shift.T).T
  except np.linalg.LinAlgError:
    raise ValueError(f"the Hessian is singular with ridge {ridge}; use a ridge above 0, for example 0.1") from None
  return weight + correction * moved


def settle(weight: np.ndarray, spec: QuantSpec, amax: np.ndarray | None, tensor_amax: np.ndarray | None) -> tuple[np.ndarray, float]:
  """(the weight quantized until it no longer changes, the share of elements that changed).

  Raises:
    ValueError: it keeps changing: a format whose peak is not mapped to itself, such as dynamic INT8 with bound 127.5.
  """
  first = weight
  for _ in range(SETTLE_ROUNDS):
    again = core.fake_quantize(weight, spec, amax, tensor_amax=tensor_amax)
    if np.array_equal(again.view(np.int32), weight.view(np.int32)):
      return weight, float(np.mean(weight != first)) if weight.size else 0.0
    weight = again
  raise ValueError(
    f"a weight in {spec} still changes when it is quantized for the {SETTLE_ROUNDS}th time: its scales are taken from the weight (dynamic) "
    "and do not map a peak to itself; use a static format, or the format's own bound"
  )


def _quantize_columns(wanted: np.ndarray, factored: Factor, plan: Plan, block: int) -> np.ndarray:
  """The loop over columns. wanted: [K, N] float64 (each column of the weight is contiguous). Returns [N, K] float32."""
  order, feedback, grid = factored.order, factored.feedback, plan.grid
  wanted = wanted[order].astype(np.float64)
  error, values = np.zeros_like(wanted), np.empty(wanted.shape, np.float32)
  for start, stop in _segments(len(wanted), grid.width if plan.lazy else len(wanted), block):
    current = wanted[start:stop] + feedback[:start, start:stop].T @ error[:start]
    if plan.lazy and start % grid.width == 0:
      plan.fix(start // grid.width, _compensated(wanted, feedback, error, grid.columns(start // grid.width)).T)
    local = np.ascontiguousarray(feedback[start:stop, start:stop].T)
    for k in range(start, stop):
      column = current[k - start] + local[k - start, : k - start] @ error[start:k]
      values[k] = plan.values(order[k], column.astype(np.float32))
      error[k] = wanted[k] - values[k]
  result = np.empty_like(values)
  result[order] = values
  return np.ascontiguousarray(result.T)


def _segments(columns: int, width: int, block: int) -> list[tuple[int, int]]:
  """Stretches of at most `block` columns, none of which lies in two groups of that width."""
  starts = [s for group in range(0, columns, width) for s in range(group, min(group + width, columns), block)]
  return list(zip(starts, [*starts[1:], columns], strict=True))


def _compensated(wanted: np.ndarray, feedback: np.ndarray, error: np.ndarray, columns: slice) -> np.ndarray:
  """Where the weights of these columns are best put, the earlier ones being what they are: w + e_P U_PB (I + U_BB)^-1, transposed."""
  if columns.start == 0:
    return wanted[columns]
  pull = feedback[: columns.start, columns].T @ error[: columns.start]
  own = feedback[columns, columns]
  return wanted[columns] + np.linalg.solve(np.eye(len(own)) + own.T, pull)


def _plain_amax(weight, spec: QuantSpec, amax, tensor_amax) -> tuple[np.ndarray | None, np.ndarray | None]:
  """(amax with which `fake_quantize` rounds to nearest, tensor amax of two-level formats)."""
  if not spec.two_level:
    return (None if spec.dynamic else core.amax(weight, spec)), None
  plain = core.amax(weight, spec)
  if tensor_amax is None:
    tensor_amax = plain.max() if amax is None else np.max(amax)
  tensor_amax = np.asarray(tensor_amax, np.float32).reshape(())
  return (tensor_amax if spec.dynamic else plain), tensor_amax


def _upper_cholesky(hessian: np.ndarray) -> np.ndarray:
  """R, upper triangular, with R R^T = H."""
  return np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]


def _square(matrix: np.ndarray, name: str) -> np.ndarray:
  matrix = np.asarray(matrix, np.float64)
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise ValueError(f"{name} has shape {list(matrix.shape)}; it is [K, K], K the inputs of the layer")
  if not np.isfinite(matrix).all():
    raise ValueError(f"{name} has entries that are not finite; look for infinite inputs in calibration")
  return matrix


def _checked(weight, hessian, spec: QuantSpec, block: int, scale_search: str | bool) -> tuple[np.ndarray, np.ndarray]:
  weight, hessian = np.asarray(weight, np.float32), _square(hessian, "hessian")
  if weight.ndim != 2 or weight.shape[1] != len(hessian):
    raise ValueError(f"a weight of shape {list(weight.shape)} does not fit a Hessian of {len(hessian)} inputs; it is [N, {len(hessian)}]")
  if not np.isfinite(weight).all():
    raise ValueError("the weight has entries that are not finite; GPTQ would spread them over every later column")
  if block < 1:
    raise ValueError(f"block is {block}; a positive number of columns is needed, for example 128")
  if scale_search not in (False, True, "hessian"):
    raise ValueError(f"scale_search {scale_search!r} is unknown; allowed are False, True and 'hessian' (the same)")
  return weight, hessian
