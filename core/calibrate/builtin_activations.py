"""amax of activations from histograms as algorithms of a configuration: entropy, percentile, activation_mse, and NVFP4 headroom.

The quantizer attribute `"calibrator": "histogram"` does the same for single quantizers: `core.calibrate.calibrators`.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

import core
from core.calibrate import histogram
from core.calibrate.driver import NO_TOKENS, Run, decide_each
from core.calibrate.headroom import RHO, BlockAmaxHistogram, headroom_amax
from core.calibrate.histogram import Histogram
from core.calibrate.host import Host
from core.calibrate.progress import progress
from core.calibrate.registry import ALGORITHMS, register_algorithm
from core.config import ConfigWarning
from core.config.frozen import check_choice
from core.spec import QuantSpec

WEIGHT_ALGORITHMS = ("max", "mse", "local_hessian")


def _calibrate(host: Host, run: Run, method: str, num_bins: int, skip_zeros: bool, **options: Any) -> None:
  """amax of every static per-tensor activation quantizer, from one run of the forward loop; the others are reported and stay."""
  _try_out(method, num_bins, options)
  configs = {name: config for name, config in host.activation_configs().items() if run.includes(name)}
  held: dict[str, Histogram] = {}
  for name, config in configs.items():
    reason = config.why_no_histogram(method)
    if reason:
      run.note(name, None, f"max calibration ({reason})")
    else:
      held[name] = Histogram(num_bins, skip_zeros)
  if held:
    host.observe_tensors(lambda name, x: held[name].add(x), list(held))
  with progress(len(held), run.algorithm.name) as step:
    for name, hist in held.items():
      step(name)
      if hist.amax is None:
        run.note(name, None, f"max calibration ({NO_TOKENS})")
        continue
      amax = histogram.amax_of(hist, configs[name].spec, method, **options)
      _set(host, run, name, amax, {"clip": amax / hist.amax if hist.amax else 1.0})


def _set(host: Host, run: Run, name: str, amax: float, figures: dict[str, Any]) -> None:
  before = host.activation_amax(name)
  host.set_amax(name, amax)
  row = {"layer": name, "method": run.algorithm.name, "amax_before": None if before is None else float(before), "amax": amax}
  run.report.append({**row, **figures})


def _try_out(method: str, num_bins: int, options: dict[str, Any]) -> None:
  """Options on a histogram of one value: a wrong one is refused before any data runs."""
  Histogram(num_bins)
  probe = Histogram(2)
  probe.add(np.ones(1, np.float32))
  histogram.amax_of(probe, QuantSpec.named("int8"), method, **options)


@register_algorithm("entropy", whole=True, includes=True)
def entropy(
  host: Host, run: Run, *, num_bins: int = histogram.NUM_BINS, skip_zeros: bool = False, start_bin: int | None = None, stride: int = 1
) -> None:
  """amax of static per-tensor activations by least KL divergence (`core.calibrate.histogram.amax_entropy`); weights by max.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    num_bins: bins of the histogram.
    skip_zeros: leave zeros out.
    start_bin: smallest amax tried, in bins; None is the format's number of magnitudes.
    stride: distance of the candidates, in bins.

  References: Migacz, 2017, "8-bit inference with TensorRT".
  """
  _calibrate(host, run, "entropy", num_bins, skip_zeros, start_bin=start_bin, stride=stride)


@register_algorithm("percentile", whole=True, includes=True)
def percentile(host: Host, run: Run, *, percentile: float = 99.99, num_bins: int = histogram.NUM_BINS, skip_zeros: bool = False) -> None:
  """amax of static per-tensor activations that covers `percentile` % of the magnitudes; weights by max.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    percentile: share of the magnitudes within amax, in %.
    num_bins: bins of the histogram.
    skip_zeros: leave zeros out.
  """
  _calibrate(host, run, "percentile", num_bins, skip_zeros, percentile=percentile)


@register_algorithm("activation_mse", whole=True, includes=True)
def activation_mse(host: Host, run: Run, *, num_bins: int = histogram.NUM_BINS, skip_zeros: bool = False) -> None:
  """amax of static per-tensor activations by least squared error over their histogram; weights by max.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    num_bins: bins of the histogram.
    skip_zeros: leave zeros out.
  """
  _calibrate(host, run, "mse", num_bins, skip_zeros)


@register_algorithm("nvfp4_act_headroom", whole=True, includes=True)
def nvfp4_act_headroom(
  host: Host,
  run: Run,
  *,
  anchor_percentile: float = 1.0,
  upper_percentile: float = 99.99,
  rho: float = RHO,
  weight_scale_algorithm: Any = None,
) -> None:
  """Tensor amax of dynamic NVFP4 activations with room above what calibration saw: max(rho * P1, P99.99) of the block amax.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    anchor_percentile: the low percentile of block amax.
    upper_percentile: the high one.
    rho: ratio that E4M3 block scales span, below 28672.
    weight_scale_algorithm: how weights get their scales: "mse", "local_hessian", or a mapping with "method" and options; None and "max"
      leave them as they are, which is max calibration where nothing ran before.

  Raises:
    ValueError: an option out of range, or an unknown algorithm for the weights; before any data runs.

  References: nvidia-modelopt 0.47, nvfp4_act_headroom.
  """
  config = {"method": weight_scale_algorithm} if not isinstance(weight_scale_algorithm, dict) else dict(weight_scale_algorithm)
  method = check_choice("weight_scale_algorithm", config.pop("method", None) or "max", WEIGHT_ALGORITHMS)
  percentiles = {"anchor_percentile": anchor_percentile, "upper_percentile": upper_percentile}
  _headroom(_one_block(), rho, percentiles)
  configs = {name: c for name, c in host.activation_configs().items() if c.spec.two_level and c.spec.dynamic and run.includes(name)}
  held = {name: BlockAmaxHistogram() for name in configs}
  if held:
    host.observe_tensors(lambda name, x: held[name].add(core.block_amax(x, configs[name].spec)), list(held))
  tight = []
  for name, hist in held.items():
    if hist.amax is None:
      run.note(name, None, f"max calibration ({NO_TOKENS})")
      continue
    amax, has_room = _headroom(hist, rho, percentiles)
    tight += [] if has_room else [name]
    _set(host, run, name, amax, {"headroom": amax / hist.amax if hist.amax else 1.0})
  if tight:
    shown = ", ".join(tight[:8]) + (f" and {len(tight) - 8} more" if len(tight) > 8 else "")
    warnings.warn(
      f"no headroom at rho={rho:g} for {len(tight)} of {len(held)} quantizers, whose block amax span more than that: {shown}; raise "
      "anchor_percentile, or rho (below 28672), or smooth the outliers first",
      ConfigWarning,
      stacklevel=2,
    )
  if method != "max":
    decide_each(host, ALGORITHMS[method], config, run)


def _headroom(hist: BlockAmaxHistogram, rho: float, percentiles: dict[str, float]) -> tuple[float, bool]:
  """(amax, whether it lies above what was seen)."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    amax = headroom_amax(hist, rho, **percentiles)
  return amax, not caught


def _one_block() -> BlockAmaxHistogram:
  probe = BlockAmaxHistogram()
  probe.add(np.ones(1, np.float32))
  return probe
