"""The attribute "calibrator": "histogram" in both backends: weights, sequences, rotation, padding, stacks, siblings, wrong options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import core
from core.calibrate import calibrators, histogram
from core.calibrate.histogram import Histogram
from core.config import ConfigWarning
from tests.calibrate.test_activations import BATCHES, NVFP4, RUNS, WEIGHTS, expected, run_torch

OFF = {"default": {"enable": False}}
FP8 = {"num_bits": (4, 3)}
FIRST = ["histogram", {"method": "percentile", "percentile": 99.0}]


def quantize_torch(model, quant_cfg, algorithm, loop, report=None) -> dict[str, Any]:
  import torch_backend as tq

  tq.quantize(model, {"quant_cfg": {**OFF, **quant_cfg}, "algorithm": algorithm}, loop, report=report)
  return tq.quantizers(model)


def quantize_jax(module, variables, quant_cfg, algorithm, loop, report=None) -> dict[str, Any]:
  import jax_backend as jq

  _, qvariables = jq.quantize(module, variables, {"quant_cfg": {**OFF, **quant_cfg}, "algorithm": algorithm}, loop, report=report)
  return jq.quantizers(qvariables)


@pytest.fixture
def dense():
  """One layer in both backends: function of (quant_cfg, algorithm, data) -> its quantizers."""
  import flax.linen as nn
  import jax.numpy as jnp
  import torch

  def run_torch(quant_cfg, algorithm, data):
    model = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False)).eval()
    model[0].weight.data = torch.from_numpy(WEIGHTS[0].copy())
    found = quantize_torch(model, quant_cfg, algorithm, lambda m: [m(torch.from_numpy(b)) for b in data])
    return found["0.input_quantizer"], found["0.weight_quantizer"]

  def run_jax(quant_cfg, algorithm, data):
    variables = {"params": {"kernel": jnp.asarray(WEIGHTS[0].T)}}
    loop = lambda m: [m(jnp.asarray(b)) for b in data]  # noqa: E731
    found = quantize_jax(nn.Dense(24, use_bias=False), variables, quant_cfg, algorithm, loop)
    return found["input_quantizer"], found["weight_quantizer"]

  return {"torch": run_torch, "jax": run_jax}


@pytest.mark.parametrize("backend", RUNS)
def test_a_weight_quantizer_may_have_a_histogram(backend, dense):
  """Per tensor; per channel is refused by name, as is whatever else one histogram cannot serve."""
  held = Histogram()
  held.add(WEIGHTS[0])
  calibrator = ["histogram", {"method": "mse"}]
  _, weight = dense[backend]({"*weight_quantizer": {"num_bits": 4, "calibrator": calibrator}}, "max", BATCHES)
  assert float(weight.amax) == histogram.amax_of(held, core.QuantSpec(core.formats.INT4), "mse") < np.abs(WEIGHTS[0]).max()
  with pytest.raises(ValueError, match=r"weight_quantizer' \(INT4 axis 0\).*more than one scale"):
    dense[backend]({"*weight_quantizer": {"num_bits": 4, "axis": 0, "calibrator": calibrator}}, "max", BATCHES)


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize(
  ("attributes", "message"),
  [
    ({"type": "dynamic"}, "taken from each input"),
    ({"bias": {-1: None}}, "affine bias"),
    ({"zero_point": True}, "zero point"),
    ({"format": "nf4", "block_sizes": None}, "codebook"),
  ],
)
def test_what_one_histogram_cannot_serve(backend, dense, attributes, message):
  with pytest.raises(ValueError, match=rf"input_quantizer'.*calibrator 'histogram'.*{message}"):
    dense[backend]({"*input_quantizer": {**attributes, "calibrator": "histogram"}}, "max", BATCHES)


@pytest.mark.parametrize("backend", RUNS)
def test_of_a_sequence_each_sees_what_the_one_before_returns(backend, dense):
  """Quantizers of a sequence calibrate on what the one before makes of each batch with the batch's own amax."""
  inputs, _ = dense[backend]({"*input_quantizer": [{"num_bits": 4, "calibrator": FIRST}, {**FP8, "calibrator": FIRST}]}, "max", BATCHES)
  int4 = core.QuantSpec(core.formats.INT4)
  seen = [BATCHES, [core.fake_quantize(batch, int4) for batch in BATCHES]]
  leaves = inputs.quantizers if backend == "torch" else inputs.leaves
  for leaf, batches in zip(leaves, seen, strict=True):
    assert float(leaf.amax) == expected("percentile", batches, percentile=99.0)


@pytest.mark.parametrize("backend", RUNS)
def test_a_rotated_input_is_counted_as_it_is_rounded(backend, dense):
  rotated = {"num_bits": 8, "rotate": {"enable": True, "mode": "rotate_back"}}
  largest, _ = dense[backend]({"*input_quantizer": rotated}, "max", BATCHES)
  found, _ = dense[backend]({"*input_quantizer": rotated}, {"method": "percentile", "percentile": 100}, BATCHES)
  assert float(found.amax) == float(largest.amax) != np.abs(np.concatenate(BATCHES)).max()


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("algorithm", ["max", "mse", "awq_lite", {"method": "smoothquant", "alpha": 0.5}])
def test_the_calibrator_holds_under_every_algorithm(backend, dense, algorithm):
  """Where an algorithm scales the input, the histogram is that of the scaled one."""
  inputs, _ = dense[backend](
    {"*input_quantizer": {"num_bits": 8, "calibrator": FIRST}, "*weight_quantizer": {"num_bits": 8, "axis": 0}}, algorithm, BATCHES
  )
  scale = np.float32(1) if inputs.pre_quant_scale is None else np.asarray(inputs.pre_quant_scale)
  assert float(inputs.amax) == expected("percentile", [batch * scale for batch in BATCHES], percentile=99.0)


@pytest.mark.parametrize("backend", RUNS)
def test_no_algorithm_leaves_everything_as_it_is(backend, dense):
  with pytest.warns(ConfigWarning, match="no amax"):
    inputs, _ = dense[backend]({"*input_quantizer": {"num_bits": 8, "calibrator": "histogram"}}, None, BATCHES)
  assert inputs.amax is None


@pytest.mark.parametrize("backend", RUNS)
def test_without_data_the_quantizers_are_named(backend, dense):
  for attributes, algorithm in (({"calibrator": "histogram"}, "max"), ({}, "entropy")):
    with pytest.warns(ConfigWarning, match="input_quantizer"):
      inputs, _ = dense[backend]({"*input_quantizer": {"num_bits": 8, **attributes}}, algorithm, [np.zeros((0, 32), np.float32)])
    assert inputs.amax is None


@pytest.mark.parametrize("backend", RUNS)
def test_padding_is_not_counted(backend):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 8, 64)).astype(np.float32)
  mask = np.ones((2, 8), np.int32)
  mask[:, 5:] = 0
  x[:, 5:] *= 100
  algorithm = {"method": "percentile", "percentile": 99.0, "exclude_padding": True}
  first = masked(backend, x, mask, algorithm)
  assert first == expected("percentile", [x[mask.astype(bool)]], percentile=99.0)
  assert masked(backend, x, mask, {**algorithm, "exclude_padding": False}) == expected("percentile", [x], percentile=99.0)


@pytest.mark.parametrize("backend", RUNS)
def test_max_leaves_padding_out(backend):
  x = np.random.default_rng(1).normal(size=(2, 8, 64)).astype(np.float32)
  mask = np.ones((2, 8), np.int32)
  mask[:, 5:] = 0
  x[:, 5:] *= 100
  assert masked(backend, x, mask, {"method": "max", "exclude_padding": True}) == np.abs(x[:, :5]).max()
  assert masked(backend, x, mask, {"method": "max"}) == np.abs(x).max()
  nvfp4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
  assert masked(backend, x, mask, {"method": "max", "exclude_padding": True}, nvfp4) == np.abs(x[:, :5]).max()
  with pytest.warns(ConfigWarning, match="one amax per tensor; 1 others .* a.input_quantizer"):
    masked(backend, x, mask, {"method": "max", "exclude_padding": True}, {"num_bits": 8, "axis": -1})


def masked(backend, x, mask, algorithm, attributes=None):
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import torch

  class Torch(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.a = torch.nn.Linear(64, 8)

    def forward(self, x, attention_mask=None):
      return self.a(x)

  class Flax(nn.Module):
    @nn.compact
    def __call__(self, x, attention_mask=None):
      return nn.Dense(8, name="a")(x)

  inputs = {"*input_quantizer": attributes or {"num_bits": 8}}
  if backend == "torch":
    found = quantize_torch(Torch(), inputs, algorithm, lambda m: m(torch.from_numpy(x), attention_mask=torch.from_numpy(mask)))
  else:
    variables = Flax().init(jax.random.key(0), jnp.asarray(x))
    found = quantize_jax(Flax(), variables, inputs, algorithm, lambda m: m(jnp.asarray(x), attention_mask=jnp.asarray(mask)))
  return float(np.max(np.asarray(found["a.input_quantizer"].amax)))


@pytest.fixture(scope="module")
def llama():
  import jax

  from tests.jax_backend import nets

  tokens = nets.tokens()
  return jax.jit(nets.Llama().init)(jax.random.key(0), tokens)["params"], tokens


@pytest.mark.parametrize(
  ("inputs", "algorithm"),
  [
    ({"num_bits": 8}, "percentile"),
    ({"num_bits": 8, "calibrator": FIRST}, "max"),
    ({"num_bits": 8, "calibrator": FIRST}, "awq_lite"),
    (NVFP4, "nvfp4_act_headroom"),
  ],
)
def test_layers_of_a_scanned_stack_have_histograms_of_their_own(llama, inputs, algorithm):
  """On whichever axis the stack is. Equal to the unrolled model's; deeper inputs come through matmuls in another program, 1e-5 (whoever
  falls on the other side of a bin's edge moves amax by the bin, 1/1024: none does here). Scanned layers report their index."""
  from tests.jax_backend import nets

  params, tokens = llama
  quant_cfg = {"*layers*weight_quantizer": {"num_bits": 8, "axis": 0}, "*layers*input_quantizer": inputs}
  loop = lambda model: model(tokens)  # noqa: E731
  unrolled = quantize_jax(nets.Llama(), {"params": params}, quant_cfg, algorithm, loop)
  for axis in (0, 1):
    report: list = []
    scanned = quantize_jax(nets.Llama(stack=axis), {"params": nets.stacked(params, 2, axis)}, quant_cfg, algorithm, loop, report=report)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
      both = [float(unrolled[f"model.layers.{i}.{part}.input_quantizer"].amax) for i in range(2)]
      np.testing.assert_allclose(scanned[f"model.layers.{part}.input_quantizer"].amax, both, rtol=1e-5)
    assert algorithm == "max" or any(row["layer"].startswith("model.layers.mlp.up_proj[1]") for row in report)


@pytest.mark.parametrize("algorithm", ["entropy", "max", "awq_lite"])
def test_siblings_end_with_one_scale(algorithm):
  import torch

  from tests.torch_backend.models import tiny_llama, tokens

  inputs = {**FP8, "calibrator": "histogram"}
  quant_cfg = {"*_proj.weight_quantizer": {"num_bits": 8, "axis": 0}, "*_proj.input_quantizer": inputs}
  with torch.no_grad():
    found = quantize_torch(tiny_llama(), quant_cfg, algorithm, lambda m: m(tokens()))
  assert len({float(found[f"model.layers.0.self_attn.{n}_proj.input_quantizer"].amax) for n in "qkv"}) == 1


@pytest.mark.parametrize("backend", RUNS)
def test_outputs_of_modules_with_one_input(backend):
  """Two layers that read one tensor share its observation, not that of their outputs."""
  import flax.linen as nn
  import jax.numpy as jnp
  import torch

  class Torch(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.a, self.b = (torch.nn.Linear(32, 24, bias=False) for _ in "ab")

    def forward(self, x):
      return self.a(x) + self.b(x)

  class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(24, use_bias=False, name="a")(x) + nn.Dense(24, use_bias=False, name="b")(x)

  weights = {"a": WEIGHTS[0], "b": WEIGHTS[0] / 64}
  quant_cfg = {"*put_quantizer": {"num_bits": 8}}
  if backend == "torch":
    model = Torch()
    for name, weight in weights.items():
      getattr(model, name).weight.data = torch.from_numpy(weight.copy())
    found = quantize_torch(model, quant_cfg, "percentile", lambda m: m(torch.from_numpy(BATCHES[0])))
  else:
    variables = {"params": {name: {"kernel": jnp.asarray(weight.T)} for name, weight in weights.items()}}
    found = quantize_jax(Flax(), variables, quant_cfg, "percentile", lambda m: m(jnp.asarray(BATCHES[0])))
  assert float(found["a.output_quantizer"].amax) == 64 * float(found["b.output_quantizer"].amax)  # a power of two: exact
  assert float(found["a.input_quantizer"].amax) == float(found["b.input_quantizer"].amax)


def test_a_loop_that_runs_out_of_data_is_told():
  import flax.linen as nn
  import jax.numpy as jnp

  data = iter([jnp.asarray(BATCHES[0])])
  variables = {"params": {"kernel": jnp.asarray(WEIGHTS[0].T)}}
  inputs = {"*input_quantizer": {"num_bits": 8, "calibrator": "histogram"}}
  with pytest.warns(ConfigWarning, match="second run of forward_loop"):
    quantize_jax(nn.Dense(24, use_bias=False), variables, inputs, "max", lambda m: [m(batch) for batch in data])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "foo"}, "method is 'foo'.*'entropy', 'percentile', 'mse'"),
    ({"grow_method": "append"}, "grow_method is 'append'.*doubling"),
    ({"num_bins": 2.5}, "num_bins is 2.5"),
    ({"percentile": 99.0}, "percentile is 99.0, which method 'entropy' does not use"),
    ({"method": "percentile", "percentile": 0}, "percentile is 0"),
    ({"skip_zeros": "no"}, "skip_zeros is 'no'"),
  ],
)
def test_options_of_the_calibrator_are_checked_when_they_are_read(options, message):
  from core.config import QuantizerConfig

  with pytest.raises(ValueError, match=rf"calibrator 'histogram': {message}"):
    QuantizerConfig.from_attributes({"num_bits": 8, "calibrator": ["histogram", options]})
  good = QuantizerConfig.from_attributes({"num_bits": 8, "calibrator": ["histogram", {"grow_method": "doubling", "num_bins": 64}]})
  assert calibrators.histogram(good).num_bins == 64


@pytest.mark.parametrize(
  ("algorithm", "message"),
  [
    ({"method": "percentile", "percentile": 0}, "percentile is 0"),
    ({"method": "entropy", "stride": 0}, "stride 0"),
    ({"method": "entropy", "num_bins": 1}, "num_bins is 1"),
    ({"method": "nvfp4_act_headroom", "rho": 1e6}, "rho is 1000000"),
  ],
)
def test_wrong_options_are_refused_before_data_run(algorithm, message):
  import torch

  calls = []
  with pytest.raises(ValueError, match=message):
    quantize_torch(
      torch.nn.Sequential(torch.nn.Linear(32, 24)), {"*input_quantizer": {"num_bits": 8, "axis": -1}}, [algorithm], calls.append
    )
  assert len(calls) == 1  # max calibration


def test_quantizers_without_headroom_are_named():
  report: list = []
  with pytest.warns(ConfigWarning, match=r"no headroom at rho=2 for 2 of 2 quantizers.*0.input_quantizer"):
    run_torch(NVFP4, {"method": "nvfp4_act_headroom", "rho": 2.0}, report=report)
  assert len(report) == 2
