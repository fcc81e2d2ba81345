"""SmoothQuant, AWQ and SVDQuant as algorithms of a configuration. Layers that read one input come together and may share a scale."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from core.calibrate import awq, smoothquant, svdquant
from core.calibrate.layer import Change, Layer, output_error
from core.calibrate.registry import register_algorithm
from core.calibrate.scale_search import ScaleSearch, compensated, input_amax, scaled_hessian
from core.calibrate.weight_search import SearchResult

_AWQ_STATISTICS = ("mean_abs", "hessian", "samples", "amax")


@register_algorithm("smoothquant", ("amax", "samples"), grouped=True, calibrated_inputs=False)
def smooth(layers: Sequence[Layer], *, alpha: float | str = 1.0) -> list[Change | None]:
  """SmoothQuant: p_j = max|W_j|^(1 - alpha) / max|X_j|^alpha goes onto the input, 1 / p into the weights.

  Where it leaves ModelOpt: dead channels keep p = 1; layers with one input share p; any format with quantized inputs takes part.

  Args:
    layers: layers that read one input.
    alpha: 0 (all by the weight) to 1 (all by the activation; ModelOpt's default), or "search": the one whose layers' outputs err least.

  Raises:
    ValueError: another alpha.

  References: Xiao et al., 2022, arXiv:2211.10438.
  """
  first = layers[0]
  if not first.input_specs:
    return [Change(report={"kept": "max calibration (inputs are not quantized)"}) for _ in layers]
  act_amax = first.statistics["amax"]
  weights = [layer.weight for layer in layers]
  if alpha == "search":
    specs = [layer.specs for layer in layers]
    found = smoothquant.search_alpha(weights, specs, act_amax, samples=first.statistics["samples"], input_specs=first.input_specs)
    return [_scaled(layer, found.pre_quant_scale, act_amax, _figures(found)) for layer in layers]
  if isinstance(alpha, str | bool):
    raise ValueError(f"smoothquant alpha is {alpha!r}; allowed are a number from 0 to 1 and 'search'")
  scale = smoothquant.smooth_scale(act_amax, smoothquant.weight_amax(weights), alpha)
  return [_scaled(layer, scale, act_amax, {"alpha": alpha}) for layer in layers]


def _scaled(layer: Layer, scale: np.ndarray, act_amax: np.ndarray, report: dict[str, Any]) -> Change:
  """A layer with a pre_quant_scale, and the amax that its static input then has."""
  given = input_amax(layer.input_specs[0], act_amax * scale) if layer.input_specs else None
  return Change(weight=compensated(layer.weight, scale), pre_quant_scale=scale, input_amax=given, report=report)


def _figures(found: ScaleSearch) -> dict[str, Any]:
  return {"alpha": found.alpha, "error_before": found.error_before, "error": found.error}


def _awq(layers: Sequence[Layer], alpha_step: float, shared: bool) -> list[ScaleSearch]:
  """The scale of every layer: one for all of them, or each its own."""
  if shared:
    return [_search(layers, alpha_step)] * len(layers)
  return [_search([layer], alpha_step) for layer in layers]


def _search(layers: Sequence[Layer], alpha_step: float) -> ScaleSearch:
  seen = layers[0].statistics
  return awq.search(
    [layer.weight for layer in layers],
    [layer.specs for layer in layers],
    seen["mean_abs"],
    seen["hessian"],
    alpha_step=alpha_step,
    samples=seen["samples"],
    act_amax=seen["amax"],
    input_specs=layers[0].input_specs,
  )


@register_algorithm("awq_lite", _AWQ_STATISTICS, grouped=True, calibrated_inputs=False, also=("debug",))
def awq_lite(layers: Sequence[Layer], *, alpha_step: float = 0.1, shared: bool = False) -> list[Change | None]:
  """AWQ's search of a scale per input channel, s = mean|X|^alpha / w^(1 - alpha), by the error of the layers' outputs.

  Where it leaves ModelOpt: the loss is over every calibration token, from the Hessian of one pass; no scale at all is a candidate; the
  normalisation leaves dead channels out.

  Args:
    layers: layers that read one input.
    alpha_step: distance of the alphas.
    shared: one scale for all of them, as folding it into the layer before needs; a little worse than a scale each.

  References: Lin et al., 2023, arXiv:2306.00978.
  """
  scales = _awq(layers, alpha_step, shared)
  return [_scaled(layer, f.pre_quant_scale, layer.statistics["amax"], _figures(f)) for layer, f in zip(layers, scales, strict=True)]


@register_algorithm("awq_clip", ("hessian",), also=("max_co_batch_size", "max_tokens_per_batch", "debug"))
def awq_clip(layer: Layer, *, min_clip_ratio: float = 0.5, shrink_step: float = 0.05) -> Change:
  """AWQ's search of a clipped amax per block: the ratio of least output error, 1 included (`core.calibrate.awq.clip_search`).

  References: Lin et al., 2023, arXiv:2306.00978, and its code.
  """
  return _clipped(layer, Change(), layer.statistics["hessian"], min_clip_ratio, shrink_step)


def _clipped(layer: Layer, change: Change, hessian: np.ndarray, min_clip_ratio: float, shrink_step: float) -> Change:
  weight = layer.weight if change.weight is None else change.weight
  start = layer.amax if change.weight is None else None
  tensor = layer.tensor_amax if change.weight is None else None
  found = awq.clip_search(
    weight, layer.spec, hessian, min_clip_ratio=min_clip_ratio, shrink_step=shrink_step, amax=start, tensor_amax=tensor
  )
  change.amax, change.tensor_amax = found.amax, found.tensor_amax
  change.report |= search_figures(found, "clip")
  return change


def search_figures(found: SearchResult, name: str = "multiplier") -> dict[str, Any]:
  """The report of a search over amax: error before and after, and the mean of the chosen multipliers."""
  if found.amax is None or found.error is None or found.error_before is None or found.multiplier is None:
    return {"kept": found.note}
  figures = {name: float(np.mean(found.multiplier)), "error_before": float(found.error_before.sum()), "error": float(found.error.sum())}
  return figures | ({"note": found.note} if found.note else {})


@register_algorithm(
  "awq_full", _AWQ_STATISTICS, grouped=True, calibrated_inputs=False, also=("max_co_batch_size", "max_tokens_per_batch", "debug")
)
def awq_full(
  layers: Sequence[Layer], *, alpha_step: float = 0.1, shared: bool = False, min_clip_ratio: float = 0.5, shrink_step: float = 0.05
) -> list[Change | None]:
  """awq_lite, then awq_clip on the scaled weights.

  References: Lin et al., 2023, arXiv:2306.00978.
  """
  changes: list[Change | None] = []
  for layer, found in zip(layers, _awq(layers, alpha_step, shared), strict=True):
    hessian = scaled_hessian(layer.statistics["hessian"], found.pre_quant_scale)
    change = _scaled(layer, found.pre_quant_scale, layer.statistics["amax"], {"alpha": found.alpha})
    changes.append(_clipped(layer, change, hessian, min_clip_ratio, shrink_step))
  return changes


@register_algorithm("svdquant", _AWQ_STATISTICS, grouped=True, calibrated_inputs=False)
def svd(
  layers: Sequence[Layer],
  *,
  lowrank: int = 32,
  skip_layers: Sequence[str] = (),
  alpha_step: float = 0.1,
  shared: bool = False,
  weighted: bool = False,
) -> list[Change | None]:
  """SVDQuant: awq_lite's scale, then the scaled weight's rank-r part in float beside the quantized rest.

  Args:
    layers: layers that read one input.
    lowrank: r.
    skip_layers: patterns of layer names that only get the scale.
    alpha_step: of the scale's search.
    shared: one scale for all layers with one input.
    weighted: take the low-rank part that leaves the least output error rather than the least weight error.

  References: Li et al., 2024, arXiv:2411.05007.
  """
  changes: list[Change | None] = []
  for layer, found in zip(layers, _awq(layers, alpha_step, shared), strict=True):
    hessian = scaled_hessian(layer.statistics["hessian"], found.pre_quant_scale)
    change = _scaled(layer, found.pre_quant_scale, layer.statistics["amax"], {"alpha": found.alpha})
    if not any(fnmatchcase(layer.name, pattern) for pattern in skip_layers):
      assert change.weight is not None
      plain = layer.quantized(change.weight) - change.weight
      rest, a, b = svdquant.low_rank(change.weight, lowrank, hessian, weighted=weighted)
      change.weight, change.low_rank = rest, (a, b)
      left = layer.quantized(rest) - rest
      change.report |= {
        "rank": len(a),
        "error_before": float(output_error(plain, hessian).sum()),
        "error": float(output_error(left, hessian).sum()),
      }
    changes.append(change)
  return changes
