"""Histogram calibrators and NVFP4 headroom through the configuration, in both backends."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

import core
from core.calibrate import histogram
from core.calibrate.headroom import BlockAmaxHistogram, headroom_amax
from core.calibrate.histogram import Histogram

RNG = np.random.default_rng(0)
BATCHES = [(RNG.standard_t(4, size=(16, 32))).astype(np.float32) for _ in range(3)]
WEIGHTS = [RNG.normal(size=(24, 32)).astype(np.float32), RNG.normal(size=(16, 24)).astype(np.float32)]
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


def config(inputs, algorithm, weights=None):
  weights = weights or {"num_bits": 8, "axis": 0}
  return {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": weights, "*input_quantizer": inputs}, "algorithm": algorithm}


def run_torch(inputs, algorithm, batches=BATCHES, report=None, weights=None):
  import torch
  from torch import nn

  import torch_backend as tq

  model = nn.Sequential(nn.Linear(32, 24, bias=False), nn.ReLU(), nn.Linear(24, 16, bias=False)).eval()
  for module, weight in zip((model[0], model[2]), WEIGHTS, strict=True):
    module.weight.data = torch.from_numpy(weight.copy())
  tq.quantize(model, config(inputs, algorithm, weights), lambda m: [m(torch.from_numpy(b)) for b in batches], report=report)
  found: Any = tq.quantizers(model)
  return [float(found[f"{i}.input_quantizer"].amax) for i in (0, 2)]


def run_jax(inputs, algorithm, batches=BATCHES, report=None, weights=None):
  import flax.linen as nn
  import jax.numpy as jnp

  import jax_backend as jq

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Dense(24, use_bias=False, name="a")(x))
      return nn.Dense(16, use_bias=False, name="b")(x)

  variables = {"params": {name: {"kernel": jnp.asarray(w.T)} for name, w in zip("ab", WEIGHTS, strict=True)}}
  _, qvariables = jq.quantize(
    Net(), variables, config(inputs, algorithm, weights), lambda m: [m(jnp.asarray(b)) for b in batches], report=report
  )
  found = jq.quantizers(qvariables)
  return [float(found[f"{name}.input_quantizer"].amax) for name in "ab"]


RUNS = {"torch": run_torch, "jax": run_jax}
INT8 = {"num_bits": 8, "axis": None}


def expected(method, batches=BATCHES, **options):
  hist = Histogram()
  for batch in batches:
    hist.add(batch)
  return np.float32(histogram.amax_of(hist, core.QuantSpec.named("int8"), method, **options))


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize(
  ("algorithm", "method", "options"),
  [
    ("entropy", "entropy", {}),
    ({"method": "percentile", "percentile": 99.0}, "percentile", {"percentile": 99.0}),
    ("activation_mse", "mse", {}),
  ],
)
def test_algorithms_take_amax_from_the_histogram(backend, algorithm, method, options):
  report: list = []
  first, second = RUNS[backend](INT8, algorithm, report=report)
  assert first == expected(method, **options)
  assert second > 0 and len(report) == 2 and report[0]["amax"] <= report[0]["amax_before"]


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("method", ["entropy", "percentile", "mse"])
def test_the_calibrator_attribute_takes_effect(backend, method):
  calibrator = ["histogram", {"method": method, "num_bins": 2048}]
  first, _ = RUNS[backend]({**INT8, "calibrator": calibrator}, "max")
  assert first == expected(method)
  assert first <= RUNS[backend](INT8, "max")[0]


def test_default_method_is_entropy():
  assert run_torch({**INT8, "calibrator": "histogram"}, "max")[0] == expected("entropy")


@pytest.mark.parametrize("backend", RUNS)
def test_both_layers_agree_and_order_does_not_matter(backend):
  """The second layer's input comes through a matmul, whose additions may round differently: 1e-6 (a bin is wider)."""
  forwards = RUNS[backend](INT8, "entropy")
  assert forwards == RUNS[backend](INT8, "entropy", batches=BATCHES[::-1])
  np.testing.assert_allclose(forwards, run_torch(INT8, "entropy"), rtol=1e-6)


@pytest.mark.parametrize("backend", RUNS)
def test_formats_with_more_than_one_scale(backend):
  per_channel = {"num_bits": 8, "axis": -1}
  report: list = []
  with contextlib.suppress(TypeError, ValueError):  # amax is no scalar; what counts is the report
    RUNS[backend](per_channel, "entropy", report=report)
  assert "more than one scale" in report[0]["kept"]
  with pytest.raises(ValueError, match=r"input_quantizer.*more than one scale.*calibrator 'max'"):
    RUNS[backend]({**per_channel, "calibrator": "histogram"}, "max")


@pytest.mark.parametrize("backend", RUNS)
def test_headroom(backend):
  hist = BlockAmaxHistogram()
  for batch in BATCHES:
    hist.add(core.block_amax(batch, core.QuantSpec.named("nvfp4")))
  report: list = []
  algorithm = {"method": "nvfp4_act_headroom", "weight_scale_algorithm": "mse"}
  first, _ = RUNS[backend](NVFP4, algorithm, report=report, weights={**NVFP4, "block_sizes": {**NVFP4["block_sizes"], "type": "static"}})
  assert first == np.float32(headroom_amax(hist))
  assert any(row["method"] == "nvfp4_act_headroom" for row in report) and len(report) == 4
  with pytest.raises(ValueError, match=r"weight_scale_algorithm is 'awq'"):
    RUNS[backend](NVFP4, {"method": "nvfp4_act_headroom", "weight_scale_algorithm": "awq"})


def test_unknown_options_are_named():
  with pytest.raises(ValueError, match=r"algorithm 'percentile'.*'percent'"):
    run_torch(INT8, {"method": "percentile", "percent": 99})
