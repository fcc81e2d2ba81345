"""Searches of a weight's scales, learned scales and learned rounding as algorithms of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from core.calibrate import weight_search
from core.calibrate.adaround import adaround
from core.calibrate.bias_correction import corrected_bias
from core.calibrate.builtin_scaling import search_figures
from core.calibrate.hqq import hqq_search
from core.calibrate.layer import Change, Layer, output_error
from core.calibrate.local_hessian import local_hessian_search
from core.calibrate.lsq import lsq, not_learned
from core.calibrate.registry import register_algorithm
from core.calibrate.weight_search import SearchResult, mse_search


def _searched(found: SearchResult) -> Change:
  return Change(amax=found.amax, tensor_amax=found.tensor_amax, report=search_figures(found))


@register_algorithm("mse")
def mse(
  layer: Layer, *, start_multiplier: float = 0.25, stop_multiplier: float = 4.0, step_size: float = 0.05, fp8_scale_sweep: bool = False
) -> Change:
  """amax of least squared weight error, group by group; `core.calibrate.weight_search.mse_search` says what is tried.

  The grid always holds 1, so no group gets worse (ModelOpt's misses it).
  """
  return _searched(
    mse_search(
      layer.weight,
      layer.spec,
      amax=layer.amax,
      tensor_amax=layer.tensor_amax,
      start_multiplier=start_multiplier,
      stop_multiplier=stop_multiplier,
      step_size=step_size,
      fp8_scale_sweep=fp8_scale_sweep,
    )
  )


@register_algorithm("local_hessian", ("hessian",))
def local_hessian(
  layer: Layer,
  *,
  block_size: int | None = 16,
  start_multiplier: float = 0.25,
  stop_multiplier: float = 4.0,
  step_size: float = 0.1,
  fp8_scale_sweep: bool = False,
) -> Change:
  """As mse, by d_b^T H_b d_b with the Hessian of `block_size` neighbouring inputs; None takes the format's own block."""
  return _searched(
    local_hessian_search(
      layer.weight,
      layer.spec,
      layer.statistics["hessian"],
      block_size=block_size,
      amax=layer.amax,
      tensor_amax=layer.tensor_amax,
      start_multiplier=start_multiplier,
      stop_multiplier=stop_multiplier,
      step_size=step_size,
      fp8_scale_sweep=fp8_scale_sweep,
    )
  )


@register_algorithm("four_over_six")
def four_over_six(layer: Layer) -> Change:
  """Per block of a static NVFP4 weight, amax to 6 or to 4, whichever errs less.

  References: Cook et al., 2025, arXiv:2512.02010.
  """
  return _searched(weight_search.four_over_six(layer.weight, layer.spec, amax=layer.amax))


@register_algorithm("hqq")
def hqq(layer: Layer, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20) -> Change:
  """Half-quadratic quantization: scales (and ranges) of small |W - Q(W)|^p, without data (`core.calibrate.hqq`).

  References: Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
  """
  options = {"p": p, "beta": beta, "kappa": kappa, "iterations": iterations}
  return _searched(hqq_search(layer.weight, layer.spec, amax=layer.amax, tensor_amax=layer.tensor_amax, **options))


def _start(layer: Layer, scale_algorithm: Mapping[str, Any] | str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
  """amax that learning starts from: as calibrated, or by another algorithm first.

  Raises:
    ValueError: an algorithm that cannot be it.
  """
  config = {"method": scale_algorithm} if isinstance(scale_algorithm, str) else dict(scale_algorithm or {"method": None})
  method = config.pop("method", None)
  searches = {"mse": mse, "local_hessian": local_hessian}
  if method in (None, "max"):
    return layer.amax, layer.tensor_amax
  if method not in searches:
    raise ValueError(f"scale_algorithm {method!r} is unknown; allowed are max, {', '.join(searches)}")
  found = searches[method](layer, **config)
  return (layer.amax, layer.tensor_amax) if found.amax is None else (found.amax, found.tensor_amax)


def _learned(layer: Layer, tied: bool, learn: str, scale_algorithm: Any, steps: int, lr: float) -> Change:
  reason = not_learned(layer.spec)
  if reason:
    return Change(report={"kept": f"max calibration ({reason})"})
  amax, tensor_amax = _start(layer, scale_algorithm)
  found = lsq(
    layer.weight,
    layer.spec,
    layer.statistics["hessian"],
    amax=amax,
    tensor_amax=tensor_amax,
    steps=steps,
    lr=lr,
    learn=learn,
    tied_amax=tied,
  )
  report = {"error_before": float(found.error_before.sum()), "error": float(found.error.sum())}
  return Change(weight=found.weight, amax=found.amax, tensor_amax=found.tensor_amax, report=report)


@register_algorithm("lsq", ("hessian",), also=("quantize_pre_scale",))
def learned_step(
  layer: Layer,
  *,
  scale_algorithm: Any = "mse",
  tied_amax: bool = True,
  learnable_amax: str = "post",
  steps: int = 100,
  lr: float = 0.02,
) -> Change:
  """Learned scales: gradient descent on the layer's output error (`core.calibrate.lsq.lsq`).

  Args:
    layer: the layer.
    scale_algorithm: where to start: "max", "mse", "local_hessian", or a mapping with its options.
    tied_amax: one scale before and after rounding.
    learnable_amax: without tied_amax: "post", "pre" or "both".
    steps: descents.
    lr: relative change of a scale in the first one.

  References: Esser et al., 2020, arXiv:1902.08153.
  """
  return _learned(layer, tied_amax, learnable_amax, scale_algorithm, steps, lr)


@register_algorithm("dual_lsq", ("hessian",), also=("quantize_pre_scale", "tied_amax"))
def dual_learned_step(
  layer: Layer, *, scale_algorithm: Any = "mse", learnable_amax: str = "both", steps: int = 100, lr: float = 0.02
) -> Change:
  """As lsq with scales of their own before and after rounding; what is stored has the latter (`core.calibrate.lsq.dual_lsq`)."""
  return _learned(layer, False, learnable_amax, scale_algorithm, steps, lr)


@register_algorithm("adaround", ("hessian",))
def learned_rounding(layer: Layer, *, steps: int = 100, lr: float = 0.1, sweeps: int = 4, seed: int | None = None) -> Change:
  """Learned rounding of a weight by the layer's output error: signed gradient steps, then coordinate descent (`core.calibrate.adaround`).

  Args:
    layer: the layer.
    steps: gradient steps.
    lr: their length.
    sweeps: passes of coordinate descent.
    seed: of the start; None starts at the weight.

  References: Nagel et al., 2020, arXiv:2004.10568; Cheng et al., 2023, arXiv:2309.05516.
  """
  found = adaround(
    layer.weight,
    layer.spec,
    layer.statistics["hessian"],
    amax=layer.amax,
    tensor_amax=layer.tensor_amax,
    steps=steps,
    lr=lr,
    sweeps=sweeps,
    seed=seed,
  )
  report = {"changed": found.changed, "error_before": float(found.error_before.sum()), "error": float(found.error.sum())}
  return Change(weight=found.weight, amax=found.amax, tensor_amax=found.tensor_amax, report=report)


@register_algorithm("bias_correction", ("mean", "hessian"))
def bias_correction(layer: Layer) -> Change:
  """bias - (Q(W) - W) E[x]: the mean of every output is the float layer's again. Layers without a bias stay as they are.

  References: Nagel et al., 2019, arXiv:1906.04721, section 4.2.
  """
  if layer.bias is None:
    return Change(report={"kept": "no bias to correct"})
  quantized = layer.quantized(amax=layer.amax, tensor_amax=layer.tensor_amax)
  mean, hessian = layer.statistics["mean"], layer.statistics["hessian"]
  difference = quantized - layer.weight
  before = float(output_error(difference, hessian).sum())
  shift = difference.astype(np.float64) @ mean
  report = {"error_before": before, "error": before - float(np.sum(shift**2))}
  return Change(bias=corrected_bias(layer.bias, layer.weight, quantized, mean), report=report)
