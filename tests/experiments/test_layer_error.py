"""experiments.layer_error on a tiny Llama: facts that hold exactly, and what it refuses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from experiments import cli, layer_error, manifest
from tests.experiments import tiny

EXACT = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A Llama in which INT8 with one scale per row loses nothing of one weight: integers, and 127 in every row."""
  import torch
  from transformers import AutoModelForCausalLM

  folder = tiny.llama_folder(tmp_path_factory.mktemp("llama"))
  model = AutoModelForCausalLM.from_pretrained(str(folder))
  weight = model.get_parameter(f"{EXACT}.weight")
  with torch.no_grad():
    codes = torch.from_numpy(np.random.default_rng(0).integers(-127, 128, tuple(weight.shape)))
    codes[:, 0] = 127
    weight.copy_(codes / 512)  # scale 127 / 512 / 127: a power of two
  model.save_pretrained(str(folder))
  words = np.random.default_rng(0).integers(0, tiny.VOCABULARY, 2000)
  (folder / "text.txt").write_text(" ".join(f"w{i}" for i in words))
  return folder


def options(source, **changes):
  sizes = {"calib_samples": 2, "calib_tokens": 16, "eval_samples": 2, "eval_tokens": 16, "batch_samples": 2}
  given = {"config": "INT8_WEIGHT_ONLY_CFG", "out": "", **sizes, **changes}
  return layer_error.Options(model=str(source), text_file=str(source / "text.txt"), **given)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_layer_that_loses_nothing_errs_only_by_what_comes_before(source, backend):
  rows, whole = layer_error.run(options(source, backend=backend))
  by = {row["layer"]: row for row in rows}
  exact = by.pop(EXACT)
  assert exact["alone_error"] == 0 and exact["alone_sqnr_db"] is None and exact["alone_cosine"] == pytest.approx(1, abs=1e-12)
  assert exact["accumulated_error"] > 1e-6 and np.isposinf(exact["weight_sqnr_db"])
  assert len(by) == 13 and all(row["alone_error"] > 0 for row in by.values())
  first = by["model.layers.0.self_attn.k_proj"]  # nothing before it is quantized: the same input, the same operations
  assert first["alone_error"] == first["accumulated_error"]
  assert whole["kl"] > 0
  for row in by.values():
    assert row["alone_sqnr_db"] == pytest.approx(-10 * np.log10(row["alone_error"]))


def test_both_backends_measure_the_same(source):
  one, other = (layer_error.run(options(source, backend=backend))[0] for backend in ("torch", "jax"))
  assert [row["layer"] for row in one] == [row["layer"] for row in other]
  for a, b in zip(one, other, strict=True):
    assert a["weight_sqnr_db"] == pytest.approx(b["weight_sqnr_db"], rel=1e-9)  # equal codes, float64 sums
    # Errors of 1e-5 of outputs that float32 matmuls round to 1e-7.
    assert a["alone_error"] == pytest.approx(b["alone_error"], rel=0.02) and a["accumulated_error"] == pytest.approx(
      b["accumulated_error"], rel=0.02
    )


def test_files_and_the_command_that_repeats_them(source, tmp_path):
  chosen = options(source, out=str(tmp_path), algorithm="mse")
  rows, whole = layer_error.run(chosen)
  document = json.loads((tmp_path / "layer_error.json").read_text())
  assert document["rows"] == manifest.plain(rows) and document["model_figures"] == manifest.plain(whole)
  assert cli.parse(layer_error.Options, document["command"].split()[2:]) == chosen
  with (tmp_path / "layer_error.csv").open(newline="") as file:
    assert [line["layer"] for line in csv.DictReader(file)] == [row["layer"] for row in rows]
  assert (tmp_path / "layer_error.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("algorithm", ["rotate", "cross_layer_equalization", "awq_lite:shared=true+fold_pre_quant_scale"])
def test_algorithms_that_give_layers_another_function_are_refused(source, algorithm):
  with pytest.raises(ValueError, match=f"{algorithm.rpartition('+')[2]}.*another function.*algorithm_study"):
    layer_error.run(options(source, algorithm=algorithm))
