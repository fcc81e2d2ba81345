"""End-to-end tuning: the arithmetic of its steps, and both backends on one tiny Llama."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import formats
from core.calibrate.distill import Moving, TunedWeight, tune, tunes_scales
from core.calibrate.layer import Layer
from core.spec import QuantSpec
from tests.experiments import tiny

INT4 = {"num_bits": 4, "block_sizes": {-1: 8}}
CONFIG = {"default": {"enable": False}, "*weight_quantizer": INT4, "*lm_head*": {"enable": False}, "nn.Embedding": {"*": {"enable": False}}}
GPTQ = {"method": "gptq", "act_order": True, "scale_search": "signed"}


def layer_of(weight: np.ndarray, spec: QuantSpec) -> Layer:
  amax = core.amax(weight, spec)
  return Layer("x", core.fake_quantize(weight, spec, amax), (spec,), amax=amax)


def test_adam_steps_by_lr_against_the_sign_at_first():
  moving = Moving((3,), 0.1, 10)
  moving.step(np.array([2.0, -5.0, 0.0], np.float32))
  np.testing.assert_allclose(moving.value, [-0.1, 0.1, 0.0], rtol=1e-5)


def test_an_untouched_weight_ends_as_it_began():
  spec = QuantSpec(formats.INT4, blocks=((-1, 8),))
  layer = layer_of(np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32), spec)
  change = TunedWeight(layer, 10, 1e-3).finish({})
  np.testing.assert_array_equal(core.quantize(change.weight, spec, change.amax).codes, core.quantize(layer.weight, spec, layer.amax).codes)
  np.testing.assert_allclose(change.weight, layer.weight, rtol=1e-6)  # amax / bound * bound may differ in the last bit


def test_result_lies_on_its_grid_after_steps():
  spec = QuantSpec(formats.INT4, blocks=((-1, 8),))
  rng = np.random.default_rng(1)
  layer = layer_of(rng.normal(size=(6, 16)).astype(np.float32), spec)
  weight = TunedWeight(layer, 5, 1e-2, rounding_lr=0.2)
  for _ in range(5):
    weight.step(rng.normal(size=(6, 16)).astype(np.float32))
  change = weight.finish({})
  np.testing.assert_array_equal(core.fake_quantize(change.weight, spec, change.amax), change.weight)
  assert np.any(core.quantize(change.weight, spec, change.amax).codes != core.quantize(layer.weight, spec, layer.amax).codes)


def test_only_free_scales_are_tuned():
  weight = np.ones((4, 32), np.float32)
  assert tunes_scales(layer_of(weight, QuantSpec(formats.INT8, axis=(0,))))
  for name in ("mxfp4", "nvfp4"):
    assert not tunes_scales(Layer("x", weight, (QuantSpec.named(name),), amax=np.ones((), np.float32)))


class Quadratic:
  """A student whose loss is the squared distance of its norm to a target."""

  def __init__(self) -> None:
    self.value = {"norm.weight": np.array([1.0, 2.0], np.float32)}

  def batches(self) -> int:
    return 4

  def norms(self) -> dict[str, np.ndarray]:
    return dict(self.value)

  def low_rank(self) -> dict[str, np.ndarray]:
    return {}

  def set(self, values: dict[str, np.ndarray]) -> None:
    self.value |= values

  def gradient(self, batch: int, values: dict[str, np.ndarray], loss: str) -> tuple[float, dict[str, np.ndarray]]:
    difference = values["norm.weight"] - np.array([1.01, 1.98], np.float32)
    return float(np.sum(difference**2)), {"norm.weight": 2 * difference}


def test_tuning_descends_and_is_reproducible():
  found = []
  for _ in range(2):
    student = Quadratic()
    _, losses = tune(student, [], epochs=5, norm_lr=2e-3)
    found.append(student.value["norm.weight"])
    assert losses[-1] < 0.2 * losses[0]
  np.testing.assert_array_equal(found[0], found[1])


def test_errors_name_the_value():
  with pytest.raises(ValueError, match=r"parts \['codes'\].*scales, norms"):
    tune(Quadratic(), [], parts=("codes",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.llama_folder(tmp_path_factory.mktemp("llama"))


def run_torch(folder, algorithm):
  import torch

  import torch_backend as tq
  from experiments import models

  model, _ = models.load_torch(folder)
  batches = [torch.from_numpy(tiny.tokens(2, 12, seed)).long() for seed in range(3)]
  report: list = []
  tq.quantize(model, {"quant_cfg": CONFIG, "algorithm": algorithm}, lambda m: [m(b) for b in batches], report=report)
  return model, report


def run_jax(folder, algorithm):
  import jax.numpy as jnp

  import jax_backend as jq
  from experiments import models

  module, variables, _ = models.load_jax(folder)
  batches = [jnp.asarray(tiny.tokens(2, 12, seed)) for seed in range(3)]
  report: list = []
  _, qvariables = jq.quantize(
    module, variables, {"quant_cfg": CONFIG, "algorithm": algorithm}, lambda m: [m(b) for b in batches], report=report
  )
  return qvariables, report


def test_both_backends_tune_alike(folder):
  """The first step starts from equal codes; gradients come through matmuls, so losses agree to 1e-3 and norms to 1e-3 of themselves."""
  algorithm = ["max", {"method": "distill", "epochs": 3, "norm_lr": 2e-3, "scale_lr": 2e-3}]
  model, torch_report = run_torch(folder, algorithm)
  qvariables, jax_report = run_jax(folder, algorithm)
  losses = [report[-1]["loss_by_epoch"] for report in (torch_report, jax_report)]
  assert losses[0][-1] < 0.9 * losses[0][0]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
  norm = model.model.layers[0].input_layernorm.weight.detach().numpy()
  twin = np.asarray(qvariables["params"]["model"]["layers_0"]["input_layernorm"]["scale"])
  np.testing.assert_allclose(norm, twin, rtol=1e-3)
  for name in ("q_proj", "o_proj"):
    kernel = np.asarray(qvariables["params"]["model"]["layers_0"]["self_attn"][name]["kernel"]).T
    np.testing.assert_allclose(getattr(model.model.layers[0].self_attn, name).stored_weight.detach().numpy(), kernel, rtol=5e-3, atol=1e-6)


def test_low_rank_factors_are_tuned_in_both(folder):
  algorithm = [
    {"method": "svdquant", "lowrank": 2},
    {"method": "distill", "epochs": 3, "low_rank_lr": 2e-3, "parts": ["norms", "low_rank"]},
  ]
  _, torch_report = run_torch(folder, algorithm)
  _, jax_report = run_jax(folder, algorithm)
  losses = [report[-1]["loss_by_epoch"] for report in (torch_report, jax_report)]
  assert losses[0][-1] < losses[0][0]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)  # the factors of the SVD agree to a sign of each pair


def test_codes_stay_where_only_scales_move(folder):
  import torch_backend as tq

  before, _ = run_torch(folder, GPTQ)
  after, _ = run_torch(folder, [GPTQ, {"method": "distill", "epochs": 1}])
  kept, moved = (tq.weight_quantization(m) for m in (before, after))
  for name, (weight, config, amax) in kept.items():
    new, _, new_amax = moved[name]
    codes = core.quantize(weight.numpy(), config.spec, amax.numpy()).codes
    np.testing.assert_array_equal(codes, core.quantize(new.numpy(), config.spec, new_amax.numpy()).codes)
    assert not np.array_equal(amax.numpy(), new_amax.numpy())
