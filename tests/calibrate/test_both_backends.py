"""Every algorithm runs in PyTorch and in JAX, and from the same statistics both end with the same bits."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

from core.calibrate import algorithms, registry
from core.calibrate.layer import Change, Layer
from tests.calibrate import twins
from tests.calibrate.twins import FORMATS, Jax, Torch

algorithms.load()
LAYERWISE = {"layerwise": True}
RUNS: dict[str, dict[str, Any]] = {
  "smoothquant": {"method": "smoothquant", "alpha": 0.5},
  "smoothquant search": {"method": "smoothquant", "alpha": "search"},
  "awq_lite": {"method": "awq_lite"},
  "awq_clip": {"method": "awq_clip"},
  "awq_full": {"method": "awq_full"},
  "svdquant": {"method": "svdquant", "lowrank": 4},
  "svdquant weighted": {"method": "svdquant", "lowrank": 4, "weighted": True},
  "mse": {"method": "mse"},
  "mse sweep": {"method": "mse", "fp8_scale_sweep": True},
  "local_hessian": {"method": "local_hessian"},
  "four_over_six": {"method": "four_over_six"},
  "hqq": {"method": "hqq", "iterations": 3},
  "lsq": {"method": "lsq", "steps": 5},
  "dual_lsq": {"method": "dual_lsq", "steps": 5},
  "adaround": {"method": "adaround", "steps": 5, "sweeps": 1},
  "bias_correction": {"method": "bias_correction"},
  "gptq": {"method": "gptq"},
  "gptq act_order": {"method": "gptq", "act_order": True},
  "gptq signed": {"method": "gptq", "act_order": True, "scale_search": "signed"},
  "gptq layerwise": {"method": "gptq", "correction": 0.5, **LAYERWISE},
  "gptq true_sequential": {"method": "gptq", "true_sequential": True, **LAYERWISE},
}
WHOLE = (  # test_distill.py, test_relations.py, test_activations.py
  "distill", "fold_pre_quant_scale", "cross_layer_equalization", "rotate", "entropy", "percentile", "activation_mse", "nvfp4_act_headroom",
)  # fmt: skip
CASES = [(run, name) for run in RUNS for name in FORMATS if run != "four_over_six" or name == "nvfp4_static"]


def test_no_algorithm_is_forgotten():
  """Those that drive the whole model have tests of their own."""
  builtin = {name for name, a in registry.ALGORITHMS.items() if a.function.__module__.startswith("core.") and not a.whole}
  assert builtin == {str(run["method"]) for run in RUNS.values()}


class Recorder:
  """Puts itself in an algorithm's place: keeps what it is given and what it returns."""

  def __init__(self, algorithm: registry.Algorithm) -> None:
    self.algorithm = algorithm
    self.calls: list[tuple[list[Layer], list[Change | None]]] = []

  def __call__(self, layers: Any, **options: Any) -> Any:
    given = list(layers) if self.algorithm.grouped else [layers]
    result = self.algorithm.function(layers, **options)
    found = list(result) if self.algorithm.grouped else [result]
    self.calls.append((copy.deepcopy(given), copy.deepcopy(found)))
    return result


class Replayer:
  """Puts itself in an algorithm's place: runs it on the recorded layers instead of those it is given, and checks both."""

  def __init__(self, recorder: Recorder) -> None:
    self.algorithm = recorder.algorithm
    self.calls = {tuple(layer.name for layer in layers): (layers, changes) for layers, changes in recorder.calls}
    self.met: list[tuple[str, ...]] = []

  def __call__(self, layers: Any, **options: Any) -> Any:
    given = list(layers) if self.algorithm.grouped else [layers]
    names = tuple(layer.name for layer in given)
    self.met.append(names)
    recorded, before = self.calls[names]
    for layer, other in zip(given, recorded, strict=True):
      assert_same_layer(layer, other)
    result = self.algorithm.function(recorded if self.algorithm.grouped else recorded[0], **options)
    for change, other in zip(result if self.algorithm.grouped else [result], before, strict=True):
      assert_same_change(change, other)
    return result


def assert_same_layer(layer: Layer, other: Layer) -> None:
  """Weights, formats and amax of weights have the same bits; statistics come through matmuls and only agree."""
  assert layer.specs == other.specs and layer.input_specs == other.input_specs and layer.linear == other.linear
  for field in ("weight", "amax", "tensor_amax", "bias"):
    assert_same_array(getattr(layer, field), getattr(other, field), f"{layer.name}.{field}")
  assert layer.statistics.keys() == other.statistics.keys() and layer.tokens == other.tokens in (0, 120)
  for name, value in layer.statistics.items():
    # float32 products of blocks before: 1e-4 of the largest; a quantized input that falls on the other side of a code moves further
    tolerance = (5e-2 if layer.name.startswith("layers.0.down") or not layer.name.startswith("layers.0") else 1e-4) * np.abs(value).max()
    np.testing.assert_allclose(value, other.statistics[name], atol=tolerance, rtol=0, err_msg=f"{layer.name} {name}")


def assert_same_change(change: Change | None, other: Change | None) -> None:
  assert change is not None and other is not None
  for field in ("weight", "amax", "tensor_amax", "pre_quant_scale", "input_amax", "bias"):
    assert_same_array(getattr(change, field), getattr(other, field), field)
  for one, two in zip(change.low_rank or (), other.low_rank or (), strict=True):
    assert_same_array(one, two, "low_rank")
  assert repr(change.report) == repr(other.report)


def assert_same_array(a: Any, b: Any, what: str) -> None:
  assert (a is None) == (b is None), what
  if a is not None:
    assert np.array_equal(a, b), what


@pytest.mark.parametrize(("run", "form"), CASES)
def test_same_statistics_give_the_same_bits(run, form, monkeypatch):
  """The function runs on what torch gave it in both backends; then weights, amax, scales and factors are equal bit for bit."""
  options = RUNS[run]
  algorithm = registry.ALGORITHMS[options["method"]]
  recorder = Recorder(algorithm)
  monkeypatch.setitem(registry.ALGORITHMS, algorithm.name, dataclasses.replace(algorithm, function=recorder))
  torch_twin = Torch().quantize(options, FORMATS[form])
  replayer = Replayer(recorder)
  monkeypatch.setitem(registry.ALGORITHMS, algorithm.name, dataclasses.replace(algorithm, function=replayer))
  jax_twin = Jax().quantize(options, FORMATS[form])

  assert sorted(replayer.met) == sorted(replayer.calls) and len(replayer.met) == len(recorder.calls)
  assert any(change is not None for _, changes in recorder.calls for change in changes)
  twins.assert_same(twins.state(torch_twin.host()), twins.state(jax_twin.host()))
  assert torch_twin.report == jax_twin.report or run.startswith("gptq")
  for twin in (torch_twin, jax_twin):
    assert np.isfinite(twin.output()).all()
    assert {row["layer"] for row in twin.report} == set(twin.host().layers())
    for row in twin.report:
      assert row["error"] <= row["error_before"] * (1 + 1e-6) if "error" in row and run not in ("bias_correction",) else True
  # both compute with the same numbers, products summed in another order; an input near the edge of a code may fall to the other side
  spread = np.abs(torch_twin.output()).max()
  np.testing.assert_allclose(torch_twin.output(), jax_twin.output(), atol=(2e-5 if form == "int4" else 0.1) * spread, rtol=0)


@pytest.mark.parametrize("backend", twins.BACKENDS)
@pytest.mark.parametrize("form", [name for name in FORMATS if not name.startswith("nvfp4")])
def test_four_over_six_names_the_format_it_wants(backend, form):
  with pytest.raises(ValueError, match="four_over_six"):
    twins.BACKENDS[backend]().quantize("four_over_six", FORMATS[form])
