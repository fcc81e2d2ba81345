"""Every algorithm runs in PyTorch and in JAX, and from the same statistics both end with the same bits."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.calibrate import algorithms, registry
from core.calibrate.layer import Change, Layer
from experiments.models import load_jax, load_torch_twin
from tests.calibrate import twins
from tests.calibrate.twins import FORMATS, OFF, Jax, Torch
from tests.experiments import tiny

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
  """Weights, formats and amax of weights have the same bits; what comes from inputs went through matmuls and only agrees.

  Float32 products before a layer make 1e-4 of the largest; inputs that were quantized in another layer or here may fall to the other side
  of a code, which moves them by a step.
  """
  assert layer.specs == other.specs and layer.input_specs == other.input_specs and layer.linear == other.linear
  for field in ("weight", "amax", "tensor_amax", "bias"):
    assert_same_array(getattr(layer, field), getattr(other, field), f"{layer.name}.{field}")
  assert layer.statistics.keys() == other.statistics.keys() and layer.tokens == other.tokens in (0, 120)
  tolerance = 5e-2 if layer.input_specs else 1e-4
  assert (layer.input_amax is None) == (other.input_amax is None)
  if layer.input_amax is not None:
    np.testing.assert_allclose(layer.input_amax, other.input_amax, rtol=tolerance)
  for name, value in layer.statistics.items():
    np.testing.assert_allclose(value, other.statistics[name], atol=tolerance * np.abs(value).max(), rtol=0, err_msg=f"{layer.name} {name}")


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
  check_both(RUNS[run], FORMATS[form], Torch(), Jax(), monkeypatch, 2e-5 if form == "int4" else 0.1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
  """Two layers, four heads over two, biases, tied embeddings."""
  sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
  return tiny.llama_folder(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **sizes)


@pytest.mark.parametrize("form", ["int4", "nvfp4_static"])
@pytest.mark.parametrize("run", ["smoothquant", "awq_full", "svdquant", "mse", "bias_correction", "gptq signed", "gptq true_sequential"])
def test_llama_of_one_checkpoint(run, form, llama, monkeypatch):
  """The tied table stays the checkpoint's in both: head and embedding are not quantized."""
  data = [tiny.tokens(2, 20, seed).astype(np.int64) for seed in range(3)]
  module, variables, _ = load_jax(llama)
  one, two = Torch(data, load_torch_twin(llama)[0]), Jax(data, module, variables)
  table = np.array(variables["params"]["model"]["embed_tokens"]["embedding"])
  check_both(RUNS[run], {**FORMATS[form], "*lm_head*": OFF, "*embed*": OFF}, one, two, monkeypatch, 1e-4 if form == "int4" else 0.1)
  assert one.model.lm_head.weight is one.model.model.embed_tokens.weight
  np.testing.assert_array_equal(one.model.lm_head.weight.detach().numpy(), table)
  np.testing.assert_array_equal(two.variables["params"]["model"]["embed_tokens"]["embedding"], table)
  np.testing.assert_array_equal(two.variables["params"]["lm_head"]["kernel"].T, table)


def check_both(options: dict[str, Any], quant_cfg: dict[str, Any], one: Torch, two: Jax, monkeypatch, tolerance: float) -> None:
  """Calibrate in torch, replay in JAX, compare.

  Both models then compute with the same numbers, their products summed in another order: `tolerance`, of the largest output, is that of
  float32 where inputs are not quantized; with them a value on the edge between two codes may fall to the other side.
  """
  algorithm = registry.ALGORITHMS[options["method"]]
  recorder = Recorder(algorithm)
  monkeypatch.setitem(registry.ALGORITHMS, algorithm.name, dataclasses.replace(algorithm, function=recorder))
  one.quantize(options, quant_cfg)
  replayer = Replayer(recorder)
  monkeypatch.setitem(registry.ALGORITHMS, algorithm.name, dataclasses.replace(algorithm, function=replayer))
  two.quantize(options, quant_cfg)

  assert sorted(replayer.met) == sorted(replayer.calls) and len(replayer.met) == len(recorder.calls)
  twins.assert_same(twins.state(one.host()), twins.state(two.host()))
  assert one.report == two.report
  assert {row["layer"] for row in one.report} == set(one.host().layers())
  for row in one.report:
    assert row.get("error", 0) <= row.get("error_before", 0) * (1 + 1e-6) or "kept" in row, row
  outputs = [twin.output() for twin in (one, two)]
  assert np.isfinite(outputs).all()
  np.testing.assert_allclose(*outputs, atol=tolerance * np.abs(outputs[0]).max(), rtol=0)


@pytest.mark.parametrize("backend", twins.BACKENDS)
@pytest.mark.parametrize("form", [name for name in FORMATS if not name.startswith("nvfp4")])
def test_four_over_six_names_the_format_it_wants(backend, form):
  with pytest.raises(ValueError, match="four_over_six"):
    twins.BACKENDS[backend]().quantize("four_over_six", FORMATS[form])
