"""amax of activations from histograms: entropy, percentile and mse, by algorithm or by the quantizers' own `calibrator`; NVFP4 headroom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import core
from core.calibrate import histogram
from core.calibrate.driver import decide_each
from core.calibrate.headroom import BlockAmaxHistogram, headroom_amax
from core.calibrate.histogram import Histogram
from core.calibrate.host import Host
from core.calibrate.registry import ALGORITHMS, register_algorithm
from core.spec import QuantSpec

METHODS = ("entropy", "percentile", "mse", "max")
DEFAULT_METHOD = "entropy"


def takes_histogram(spec: QuantSpec) -> str:
  """Why a format's amax cannot come from one histogram, or ""."""
  if spec.dynamic:
    return "its scales are taken from each input"
  if spec.axis is not None or spec.blocks is not None:
    return "it has more than one scale; a histogram knows one"
  return "a zero point needs a range" if spec.zero_point else ""


def _calibrate(host: Host, chosen: Mapping[str, Mapping[str, Any]], report: list[dict[str, Any]], method_name: str) -> None:
  """amax of these activation quantizers, from one run of the forward loop.

  Args:
    host: the model.
    chosen: quantizer name -> {"method", "num_bins", "skip_zeros", options of the method}.
    report: gets one dict per quantizer.
    method_name: what the report calls the algorithm.
  """
  specs = host.activation_specs()
  held: dict[str, Histogram] = {}
  for name, options in chosen.items():
    reason = takes_histogram(specs[name])
    if reason:
      report.append({"layer": name, "method": method_name, "kept": f"max calibration ({reason})"})
    else:
      held[name] = Histogram(int(options.get("num_bins", histogram.NUM_BINS)), bool(options.get("skip_zeros", False)))
  host.observe_tensors(lambda name, x: held[name].add(x), list(held))
  for name, hist in held.items():
    if not hist.total:
      report.append({"layer": name, "method": method_name, "kept": "not calibrated (no data)"})
      continue
    options = {key: value for key, value in chosen[name].items() if key not in ("method", "num_bins", "skip_zeros", "grow_method")}
    method = str(chosen[name].get("method", DEFAULT_METHOD))
    amax = histogram.amax_of(hist, specs[name], method, **options)
    host.set_amax(name, amax)
    report.append(
      {"layer": name, "method": method_name, "amax_before": hist.amax, "amax": amax, "clip": amax / hist.amax if hist.amax else 1.0}
    )


@register_algorithm("entropy", whole=True)
def entropy(
  host: Host, run: Any, *, num_bins: int = histogram.NUM_BINS, skip_zeros: bool = False, start_bin: int | None = None, stride: int = 1
) -> None:
  """amax of static per-tensor activations by least KL divergence (`core.calibrate.histogram.amax_entropy`); weights by max.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    num_bins: bins of the histogram.
    skip_zeros: leave zeros out.
    start_bin: first candidate; None is the format's number of levels.
    stride: distance of the candidates, in bins.

  References: Migacz, 2017, "8-bit inference with TensorRT".
  """
  options = {"method": "entropy", "num_bins": num_bins, "skip_zeros": skip_zeros, "stride": stride}
  options |= {} if start_bin is None else {"start_bin": start_bin}
  _calibrate(host, dict.fromkeys(host.activation_specs(), options), run.report, "entropy")


@register_algorithm("percentile", whole=True)
def percentile(host: Host, run: Any, *, percentile: float = 99.99, num_bins: int = histogram.NUM_BINS, skip_zeros: bool = False) -> None:
  """amax of static per-tensor activations that covers `percentile` % of the magnitudes; weights by max.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    percentile: share of the magnitudes within amax, in %.
    num_bins: bins of the histogram.
    skip_zeros: leave zeros out.
  """
  options = {"method": "percentile", "percentile": percentile, "num_bins": num_bins, "skip_zeros": skip_zeros}
  _calibrate(host, dict.fromkeys(host.activation_specs(), options), run.report, "percentile")


@register_algorithm("activation_mse", whole=True)
def activation_mse(host: Host, run: Any, *, num_bins: int = histogram.NUM_BINS, skip_zeros: bool = False) -> None:
  """amax of static per-tensor activations by least squared error over their histogram; weights by max.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    num_bins: bins of the histogram.
    skip_zeros: leave zeros out.
  """
  options = {"method": "mse", "num_bins": num_bins, "skip_zeros": skip_zeros}
  _calibrate(host, dict.fromkeys(host.activation_specs(), options), run.report, "activation_mse")


def by_calibrators(host: Host, report: list[dict[str, Any]] | None) -> None:
  """Give the activation quantizers whose attribute says `"calibrator": "histogram"` their amax; nothing happens without any.

  Raises:
    ValueError: an unknown method or option, or a format that one histogram cannot serve.
  """
  chosen = {name: options for name, (kind, options) in host.calibrators().items() if kind == "histogram"}
  specs = host.activation_specs()
  for name in chosen:
    reason = takes_histogram(specs[name])
    if reason:
      raise ValueError(
        f"quantizer {name!r} ({specs[name].element.name}) asks for calibrator 'histogram', but {reason}; use one scale per tensor, or "
        "calibrator 'max'"
      )
  if chosen:
    _calibrate(host, chosen, [] if report is None else report, "histogram")


@register_algorithm("nvfp4_act_headroom", whole=True)
def nvfp4_act_headroom(
  host: Host,
  run: Any,
  *,
  anchor_percentile: float = 1.0,
  upper_percentile: float = 99.99,
  rho: float = 16384.0,
  weight_scale_algorithm: Any = None,
) -> None:
  """Tensor amax of dynamic NVFP4 activations with room above what calibration saw: max(rho * P1, P99.99) of the block amax.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    anchor_percentile: the low percentile of block amax.
    upper_percentile: the high one.
    rho: ratio that E4M3 block scales span, below 28672.
    weight_scale_algorithm: how weights get their scales: "max", "mse", "local_hessian", or a mapping with options.

  References: ModelOpt 0.47, nvfp4_act_headroom.
  """
  specs = {name: spec for name, spec in host.activation_specs().items() if spec.two_level and spec.dynamic}
  held = {name: BlockAmaxHistogram() for name in specs}
  host.observe_tensors(lambda name, x: held[name].add(core.block_amax(x, specs[name])), list(held))
  for name, hist in held.items():
    if not hist.counts.any():
      run.report.append({"layer": name, "method": "nvfp4_act_headroom", "kept": "not calibrated (no data)"})
      continue
    amax = headroom_amax(hist, rho, anchor_percentile, upper_percentile)
    host.set_amax(name, float(np.float32(amax)))
    run.report.append({"layer": name, "method": "nvfp4_act_headroom", "amax": amax})
  config = {"method": weight_scale_algorithm} if isinstance(weight_scale_algorithm, str) else dict(weight_scale_algorithm or {})
  method = config.pop("method", "max")
  if method in (None, "max"):
    return
  if method not in ("mse", "local_hessian"):
    raise ValueError(f"weight_scale_algorithm {method!r} is unknown; allowed are max, mse, local_hessian")
  decide_each(host, ALGORITHMS[method], config, run.report)
