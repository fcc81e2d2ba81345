"""The experiments on calibration: recipes, ptq with algorithms, the study and the error of each layer, on a tiny Llama."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from core.config import read_algorithm
from experiments import algorithm_study, calibration_runs, layer_error, ptq, recipes, setup
from tests.experiments import tiny

TEXT = " ".join(f"w{i % tiny.VOCABULARY}" for i in np.random.default_rng(0).integers(0, tiny.VOCABULARY, 4000))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tiny.llama_folder(tmp_path_factory.mktemp("llama"))
  (folder / "text.txt").write_text(TEXT, encoding="utf-8")
  return folder


def options(kind, source, out, **changes):
  sizes = {"calib_samples": 2, "calib_tokens": 16, "eval_samples": 2, "eval_tokens": 16, "batch_samples": 2}
  return dataclasses.replace(kind(), model=str(source), text_file=str(source / "text.txt"), out=str(out), **sizes, **changes)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_valid(name):
  assert read_algorithm(recipes.RECIPES[name])


@pytest.mark.parametrize("name", recipes.FORMATS)
def test_formats_are_valid(name):
  assert recipes.config(name, "max")["quant_cfg"]["*weight_quantizer"]


def test_algorithms_with_options_and_in_sequence():
  found = recipes.algorithms(["gptq:act_order=true:perc_damp=0.1", "svdquant:lowrank=8+gptq", "gptq_best", "max"])
  assert found["gptq:act_order=true:perc_damp=0.1"] == {"method": "gptq", "act_order": True, "perc_damp": 0.1}
  assert found["svdquant:lowrank=8+gptq"] == [{"method": "svdquant", "lowrank": 8}, "gptq"]
  assert found["gptq_best"] == recipes.RECIPES["gptq_best"] and found["max"] == "max"
  with pytest.raises(ValueError, match=r"gptqq.*gptq"):
    recipes.algorithms(["gptqq"])
  with pytest.raises(ValueError, match="method:key=value"):
    recipes.algorithms(["gptq:act_order"])


def test_configs_cross_algorithms():
  configs = calibration_runs.with_algorithms(setup.read_configs(["INT8_WEIGHT_ONLY_CFG"]), ["max", "mse"], checkpoint_dir="x")
  assert [c.name for c in configs] == ["INT8_WEIGHT_ONLY_CFG / max", "INT8_WEIGHT_ONLY_CFG / mse"]
  assert configs[1].full["algorithm"] == {"method": "mse", "checkpoint_dir": "x"}


def test_ptq_runs_every_algorithm(source, tmp_path):
  rows = ptq.run(options(ptq.Options, source, tmp_path, configs=("INT8_DEFAULT_CFG",), algorithm=("max", "smoothquant:alpha=0.5")))
  assert {(r["algorithm"], r["backend"]) for r in rows if r["config"] != "float"} == {
    (a, b) for a in ("max", "smoothquant:alpha=0.5") for b in ("torch", "jax")
  }
  layers = (tmp_path / "ptq_layers.csv").read_text()
  assert "model.layers.0.self_attn.q_proj" in layers and "smoothquant" in layers


def test_study_writes_everything_and_both_backends_agree(source, tmp_path):
  asked = options(
    algorithm_study.Options, source, tmp_path, backend="both", formats=("int4_g32",), algorithms=("max", "mse", "gptq"),
    second_text_file=str(source / "text.txt"),
  )  # fmt: skip
  rows, layers = algorithm_study.run(asked)
  by = {(r["backend"], r.get("algorithm")): r for r in rows}
  for algorithm in ("max", "mse"):  # weights only and no statistics: the same codes in both; logits differ by float32's summation order
    assert by["torch", algorithm]["perplexity"] == pytest.approx(by["jax", algorithm]["perplexity"], rel=1e-4)
  assert by["torch", "max"]["kl_second"] == pytest.approx(by["torch", "max"]["kl"])  # the same text twice
  for row in rows[1:]:
    assert row.get("algorithm") is None or (row["cpu_seconds"] > 0 and row["kl"] > 0)
  assert all(row["error"] <= row["error_before"] for row in layers if row["algorithm"] == "mse")
  assert (tmp_path / "algorithm_study.png").read_bytes()[:4] == b"\x89PNG"
  facts = json.loads((tmp_path / "algorithm_study.json").read_text())
  assert facts["texts"][0]["sha256"] and "experiments.algorithm_study" in facts["command"]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_layer_error(source, tmp_path, backend):
  rows, whole = layer_error.run(options(layer_error.Options, source, tmp_path, backend=backend, config="INT8_DEFAULT_CFG"))
  layers = [row["layer"] for row in rows]
  assert "model.layers.0.self_attn.q_proj" in layers and layers.index("model.layers.0.mlp.down_proj") < layers.index(
    "model.layers.1.mlp.down_proj"
  )
  first = next(row for row in rows if row["layer"] == "model.layers.0.self_attn.q_proj")
  # nothing is quantized before it: alone and accumulated are the same
  assert first["alone_error"] == pytest.approx(first["accumulated_error"], rel=1e-3)
  assert 0 < first["alone_error"] < 1e-2 and first["alone_cosine"] > 0.99 and first["weight_sqnr_db"] > 30
  assert whole["kl"] > 0


def test_layer_error_of_weights_alone_equals_a_direct_computation(source, tmp_path):
  import torch

  import core
  from experiments import models

  asked = options(layer_error.Options, source, tmp_path, config="INT8_WEIGHT_ONLY_CFG")
  rows, _ = layer_error.run(asked)
  model, _ = models.load_torch(source)
  ids = setup.open_text(str(source), "python-docs", asked.text_file).cut("evaluation", 2, 16)
  seen = {}
  model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
  with torch.no_grad():
    model(torch.from_numpy(ids).long())
  weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
  quantized = core.fake_quantize(weight, core.QuantSpec.named("int8", axis=(0,)))
  y = seen["y"].numpy().astype(np.float64)
  z = seen["x"].numpy().astype(np.float64) @ quantized.T.astype(np.float64)
  row = next(row for row in rows if row["layer"] == "model.layers.1.mlp.down_proj")
  assert row["alone_error"] == pytest.approx(np.sum((y - z) ** 2) / np.sum(y**2), rel=1e-3)  # float32 outputs against float64 ones
