"""Calibration at its edges, in both backends: transforms, padding, lengths, NaN, interruption, experts without tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import core
from core.calibrate import Change, register_algorithm, registry, unregister_algorithm
from core.calibrate.statistics import Accumulator
from core.config import read_algorithm
from tests.experiments import tiny

INT4 = {"num_bits": 4, "block_sizes": {-1: 8}}
INT8 = {"num_bits": 8, "axis": 0}
BATCHES = [tiny.tokens(2, 12, seed) for seed in range(3)]


def config(algorithm, weights=INT4):
  rules = {"default": {"enable": False}, "*weight_quantizer": weights}
  return {"quant_cfg": {**rules, "*lm_head*": {"enable": False}, "nn.Embedding": {"*": {"enable": False}}}, "algorithm": algorithm}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.llama_folder(tmp_path_factory.mktemp("llama"))


def run_torch(folder, cfg, batches=BATCHES, report=None, loop=None):
  import torch

  import torch_backend as tq
  from experiments import models

  model, _ = models.load_torch(folder)
  tq.quantize(model, cfg, loop or (lambda m: [m(torch.from_numpy(b).long()) for b in batches]), report=report)
  return model


def run_jax(folder, cfg, batches=BATCHES, report=None, loop=None, **options):
  import jax.numpy as jnp

  import jax_backend as jq
  from experiments import models

  module, variables, _ = models.load_jax(folder, **options)
  return jq.quantize(module, variables, cfg, loop or (lambda m: [m(jnp.asarray(b)) for b in batches]), report=report)


RUNS = {"torch": run_torch, "jax": run_jax}


def test_gptq_result_lies_on_its_grid_in_the_model(folder):
  import torch_backend as tq

  model = run_torch(folder, config({"method": "gptq", "act_order": True, "scale_search": "signed"}))
  negative = []
  for name, (weight, quantizer, amax) in tq.weight_quantization(model).items():
    np.testing.assert_array_equal(core.fake_quantize(weight.numpy(), quantizer.spec, amax.numpy()), weight.numpy(), err_msg=name)
    negative.append(float((amax < 0).float().mean()))
  assert 0 < np.mean(negative) < 1  # both signs are used


@pytest.mark.parametrize("method", ["awq_lite", "gptq", {"method": "svdquant", "lowrank": 4}])
def test_scanned_stack_equals_the_unrolled_model(folder, method):
  """Statistics come through differently compiled matmuls, so a code may flip by one INT8 step: 1 % of the largest logit."""
  import jax.numpy as jnp

  outputs = []
  for scan in (False, True):
    qmodule, qvariables = run_jax(folder, config(method, INT8), scan_layers=scan)
    outputs.append(np.asarray(qmodule.apply(qvariables, jnp.asarray(BATCHES[0]))))
  np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-2 * np.abs(outputs[0]).max())


def test_layerwise_needs_separate_blocks(folder):
  with pytest.raises(ValueError, match=r"layerwise calibration needs a chain of equal blocks.*nn.scan"):
    run_jax(folder, config({"method": "gptq", "layerwise": True}), scan_layers=True)


@pytest.fixture
def tokens_seen():
  """An algorithm that notes how many tokens each layer saw, and their mean square."""
  seen: dict[str, tuple[int, float]] = {}

  @register_algorithm("count_tokens", statistics=("hessian",))
  def count(layer, *, factor=1.0):
    seen[layer.name] = (layer.tokens, float(np.trace(layer.statistics["hessian"])))
    return Change(report={"tokens": layer.tokens, "factor": factor})

  yield seen
  unregister_algorithm("count_tokens")


def test_padding_is_left_out_where_asked_for(folder, tokens_seen):
  import jax.numpy as jnp
  import torch

  ids = tiny.tokens(2, 12)
  mask = np.ones((2, 12), np.int64)
  mask[1, 5:] = 0
  found = {}
  for exclude in (False, True):
    cfg = config({"method": "count_tokens", "exclude_padding": exclude})
    run_torch(folder, cfg, loop=lambda m: m(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)))
    found["torch", exclude] = dict(tokens_seen)
    run_jax(folder, cfg, loop=lambda m: m(jnp.asarray(ids), attention_mask=jnp.asarray(mask)))
    found["jax", exclude] = dict(tokens_seen)
  for backend in RUNS:
    assert {n for n, _ in found[backend, False].values()} == {24} and {n for n, _ in found[backend, True].values()} == {17}
  name = "model.layers.0.self_attn.q_proj"
  assert found["torch", True][name][1] == pytest.approx(found["jax", True][name][1], rel=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("layerwise", [False, True])
def test_variable_lengths_one_token_and_used_outputs(folder, tokens_seen, layerwise):
  import jax.numpy as jnp
  import torch

  lengths = (12, 1, 5)
  cfg = config({"method": "count_tokens", "layerwise": layerwise})
  batches = [tiny.tokens(1, n) for n in lengths]
  run_torch(folder, cfg, loop=lambda m: [m(torch.from_numpy(b).long()).logits.sum().item() for b in batches])
  assert {n for n, _ in tokens_seen.values()} == {sum(lengths)}
  tokens_seen.clear()
  run_jax(folder, cfg, loop=lambda m: [float(m(jnp.asarray(b)).sum()) for b in batches])
  assert {n for n, _ in tokens_seen.values()} == {sum(lengths)}


def test_a_loop_that_never_calls_the_model(folder):
  report: list = []
  run_torch(folder, config("gptq"), report=report, loop=lambda m: None)
  assert len(report) == 14 and all("no tokens" in row["kept"] for row in report)
  with pytest.raises(ValueError, match="never called the model"):  # in JAX nothing is known of its layers then
    run_jax(folder, config("gptq"), loop=lambda m: None)


def test_nan_is_named_and_the_model_stays(folder):
  import torch

  import torch_backend as tq
  from experiments import models

  model, _ = models.load_torch(folder)
  with torch.no_grad():
    model.model.layers[1].input_layernorm.weight[0] = float("nan")
  before = {name: p.detach().clone() for name, p in model.named_parameters()}
  with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj.*NaN"):
    tq.quantize(model, config({"method": "gptq", "layerwise": True}), lambda m: m(torch.from_numpy(BATCHES[0]).long()))
  assert not tq.is_quantized(model)
  for name, p in model.named_parameters():
    np.testing.assert_array_equal(p.detach().numpy(), before[name].numpy())


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("backend", RUNS)
def test_interrupted_runs_go_on(folder, tmp_path, monkeypatch, backend, layerwise):
  run = RUNS[backend]
  algorithm = {"method": "gptq", "layerwise": layerwise, "checkpoint_dir": str(tmp_path)}
  whole, parts, calls = [], [], []
  run(folder, config({**algorithm, "checkpoint_dir": str(tmp_path / "whole")}), report=whole)
  original = registry.ALGORITHMS["gptq"]

  def counting(layers, **options):
    calls.append(layers[0].name)
    if len(calls) == stop:
      raise KeyboardInterrupt
    return original.function(layers, **options)

  monkeypatch.setitem(registry.ALGORITHMS, "gptq", dataclasses.replace(original, function=counting))
  stop = 6
  with pytest.raises(KeyboardInterrupt):
    run(folder, config(algorithm))
  assert list(tmp_path.glob("step-*.npz")) and not list(tmp_path.glob("*.part"))
  with pytest.raises(ValueError, match="interrupted run with another options"):
    run(folder, config({**algorithm, "act_order": True}))
  calls, stop = [], 0
  run(folder, config(algorithm), report=parts)
  assert len(calls) < 8  # four groups in each of two blocks, some of them finished before
  assert [(r["layer"], r["error"]) for r in parts] == [(r["layer"], r["error"]) for r in whole]
  assert not list(tmp_path.glob("step-*.npz")) and not (tmp_path / "run.json").exists()


def test_order_of_batches_changes_nothing_but_rounding(folder, tokens_seen):
  found = []
  for batches in (BATCHES, BATCHES[::-1]):
    run_torch(folder, config("count_tokens"), batches=batches)
    found.append(dict(tokens_seen))
  for name, (tokens, trace) in found[0].items():
    assert found[1][name][0] == tokens and found[1][name][1] == pytest.approx(trace, rel=1e-5)  # float32 sums in another order


def test_statistics_are_those_of_one_batch_or_of_many():
  x = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
  one, many = (Accumulator(("hessian", "amax", "mean_abs", "mean", "samples"), samples=100) for _ in range(2))
  one.add(x)
  for part in np.array_split(x, 7):
    many.add(part)
  a, b = one.result(), many.result()
  assert a["tokens"] == b["tokens"] == 1000 and len(a["samples"]) <= 100
  np.testing.assert_array_equal(a["amax"], b["amax"])
  np.testing.assert_allclose(a["hessian"], b["hessian"], atol=1e-5)  # float32 sums
  np.testing.assert_allclose(a["mean_abs"], b["mean_abs"], rtol=1e-12)


def test_experts_without_tokens_keep_max():
  import torch
  from torch import nn

  import torch_backend as tq

  class Experts(nn.Module):
    def __init__(self):
      super().__init__()
      self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
      return self.experts[0](x[:4]).sum() + self.experts[1](x[4:]).sum()  # nothing is routed to the third

  torch.manual_seed(0)
  model = Experts().eval()
  before = model.experts[2].weight.detach().clone()
  report: list = []
  tq.quantize(model, config("gptq"), lambda m: m(torch.randn(8, 16)), report=report)
  kept = {row["layer"]: row.get("kept") for row in report}
  assert kept["experts.2"] == "max calibration (no tokens)" and kept["experts.0"] is None
  assert torch.equal(model.experts[2].stored_weight, before) and model.experts[2].weight_quantizer.amax is not None


def test_unknown_options_name_the_algorithm_and_its_options():
  with pytest.raises(ValueError, match=r"algorithm 'gptq'.*'act_ordr'.*act_order"):
    read_algorithm({"method": "gptq", "act_ordr": True})
