"""experiments.ptq on a tiny random Llama and a tiny BERT: rows, files, the command that repeats a run, figures, mistakes."""

from __future__ import annotations

import csv
import json
import math
import shlex

import numpy as np
import pytest

from core import config, metrics
from experiments import cli, evaluate, manifest, ptq, report, setup
from tests.experiments.tiny import VOCABULARY, bert_folder, llama_folder

PRESETS = ("INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "NVFP4_DEFAULT_CFG")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """(Llama folder, BERT folder, text file)."""
  root = tmp_path_factory.mktemp("ptq")
  words = np.random.default_rng(0).integers(0, VOCABULARY, 4000)
  (root / "text.txt").write_text(" ".join(f"w{i}" for i in words))
  return llama_folder(root / "llama"), bert_folder(root / "bert", pooler=False), root / "text.txt"


def options(model, text, out="", **changes):
  sizes = {"calib_samples": 3, "calib_tokens": 16, "eval_samples": 4, "eval_tokens": 16, "batch_samples": 2}
  return ptq.Options(model=str(model), text_file=str(text), out=str(out), **{**sizes, "configs": PRESETS, **changes})


@pytest.fixture(scope="module")
def result(places, tmp_path_factory):
  """(options, rows, folder) of one run in both backends."""
  llama, _, text = places
  chosen = options(llama, text, tmp_path_factory.mktemp("out"))
  return chosen, ptq.run(chosen), chosen.out


def _row(rows, name, backend):
  (found,) = [row for row in rows if row["config"] == name and row["backend"] == backend]
  return found


def test_one_row_per_backend_and_configuration(result):
  _, rows, _ = result
  assert [(row["config"], row["backend"]) for row in rows] == [(c, b) for c in ("float", *PRESETS) for b in ("torch", "jax")]
  for row in rows[2:]:
    assert row["seed"] == 0 and 0 <= row["top1"] <= 1 and row["kl"] >= 0 and row["delta_nll_se"] > 0
    assert row["calibrate_seconds"] > 0 and row["evaluate_seconds"] > 0 and row["peak_mib"] > 50


def test_the_backends_measure_the_same_model(result):
  _, rows, _ = result
  # Two float32 forward passes of two layers: 1e-5 is a hundred roundings.
  floats = [_row(rows, "float", b)["nll"] for b in ("torch", "jax")]
  assert floats[0] == pytest.approx(floats[1], rel=1e-5)
  for name in PRESETS:
    one, other = (_row(rows, name, b) for b in ("torch", "jax"))
    assert one["effective_bits"] == other["effective_bits"] and one["quantized_weights"] == other["quantized_weights"]
    # Equal weights, float64 sums in another order.
    assert one["weight_sqnr_db"] == pytest.approx(other["weight_sqnr_db"], rel=1e-12)
  # No activation is quantized, so nothing can flip.
  one, other = (_row(rows, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", b) for b in ("torch", "jax"))
  assert one["delta_nll"] == pytest.approx(other["delta_nll"], abs=1e-5) and one["kl"] == pytest.approx(other["kl"], abs=1e-5)


def test_files_hold_what_repeats_the_run(result, places):
  chosen, rows, out = result
  document = json.loads((setup.Path(out) / "ptq.json").read_text())
  assert document["rows"] == manifest.plain(rows)
  assert document["commit"] and document["versions"]["torch"] and document["versions"]["jax"]
  assert document["text"]["sha256"] == setup.data.load_text(text_file=places[2]).sha256
  assert config.normalize(document["configs"]["NVFP4_DEFAULT_CFG"]) == config.normalize(config.preset("NVFP4_DEFAULT_CFG"))
  words = shlex.split(document["command"])
  assert words[:3] == ["python", "-m", "experiments.ptq"]
  assert cli.parse(ptq.Options, words[2:]) == chosen
  with open(f"{out}/ptq.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert [line["config"] for line in lines] == [row["config"] for row in rows] and lines[0]["commit"] == document["commit"]
  assert (setup.Path(out) / "ptq.md").read_text().count("\n") == len(rows) + 2
  assert sorted(p.name for p in setup.Path(out).iterdir()) == ["ptq.csv", "ptq.json", "ptq.md"]


def test_files_as_configurations_seeds_and_their_spread(places, tmp_path, capsys):
  llama, _, text = places
  config.save_config(config.preset("FP8_DEFAULT_CFG"), tmp_path / "mine.yaml")
  chosen = options(llama, text, backend="torch", configs=(str(tmp_path / "mine.yaml"),), seeds=(0, 1, 2))
  rows = ptq.run(chosen)
  assert [(row["config"], row["seed"]) for row in rows] == [("float", None), ("mine", 0), ("mine", 1), ("mine", 2)]
  (entry,) = ptq.spread(rows)
  values = [row["perplexity"] for row in rows[1:]]
  assert entry["perplexity"] == pytest.approx(np.mean(values))
  # Student's t for 2 degrees of freedom: 4.303
  assert entry["perplexity_ci95"] == pytest.approx(4.302653 * np.std(values, ddof=1) / math.sqrt(3), rel=1e-5)
  ptq.show(chosen, rows)
  assert "(95 %, 3 seeds)" in capsys.readouterr().out


def test_an_encoder_gets_cosines(places):
  _, bert, text = places
  rows = ptq.run(options(bert, text, configs=("INT8_WEIGHT_ONLY_CFG",)))
  one, other = rows[2:]
  assert "perplexity" not in one and 0.99 < one["cosine_min"] <= one["cosine"] <= 1
  assert one["cosine"] == pytest.approx(other["cosine"], abs=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"configs": ("INT9_CFG",)}, "INT9_CFG"),
    ({"configs": ()}, "--configs is empty"),
    ({"configs": ("FP8_DEFAULT_CFG", "FP8_DEFAULT_CFG")}, "FP8_DEFAULT_CFG twice"),
    ({"seeds": ()}, "--seeds is empty"),
    ({"eval_samples": 1000}, "1000 windows of 16 tokens"),
    ({"batch_samples": 0}, "batch size 0"),
  ],
)
def test_mistakes(places, changes, message):
  with pytest.raises(ValueError, match=message):
    ptq.run(options(places[0], places[2], backend="torch", **changes))


def test_flags():
  parsed = cli.parse(ptq.Options, ["ptq", "--backend=jax", "--configs=A,B", "--seeds=3,4", "--noshare_scales", "--eval_tokens=9"])
  assert parsed == ptq.Options(backend="jax", configs=("A", "B"), seeds=(3, 4), share_scales=False, eval_tokens=9)
  assert cli.parse(ptq.Options, shlex.split(cli.command("experiments.ptq", parsed))[2:]) == parsed
  with pytest.raises(ValueError, match="--seeds=x: expected comma-separated int"):
    cli.parse(ptq.Options, ["ptq", "--seeds=x"])
  with pytest.raises(Exception, match="backend"):
    cli.parse(ptq.Options, ["ptq", "--backend=tensorflow"])


def test_scores_are_those_of_core_metrics():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 50, (3, 7)).astype(np.int32)
  base = (4 * rng.standard_normal((3, 7, 50))).astype(np.float32)
  logits = base + (0.3 * rng.standard_normal(base.shape)).astype(np.float32)
  found = evaluate.score_batch(ids, logits, base)
  # float32 logits and exponentials against float64 ones.
  np.testing.assert_allclose(found["nll"], metrics.negative_log_likelihood(logits[:, :-1], ids[:, 1:]).ravel(), atol=2e-6)
  np.testing.assert_allclose(found["kl"], metrics.kl_divergence(base[:, :-1], logits[:, :-1]).ravel(), atol=2e-6)
  assert found["top1"].tolist() == (base[:, :-1].argmax(-1) == logits[:, :-1].argmax(-1)).ravel().tolist()
  figures = evaluate.figures(found, evaluate.score_batch(ids, base, None))
  assert figures["perplexity"] == pytest.approx(math.exp(found["nll"].mean()))


def test_the_reference_file_gives_back_what_it_got():
  arrays = [np.random.default_rng(i).standard_normal((2, i + 1, 3)).astype(np.float32) for i in range(3)]
  with evaluate.Reference() as kept:
    for array in arrays:
      kept.append(array)
    for _ in range(2):
      assert all(np.array_equal(a, b) for a, b in zip(arrays, kept, strict=True))


def test_a_model_that_returns_nan_is_an_error():
  with pytest.raises(ValueError, match="3 NaN or infinite of 30"):
    bad = np.zeros((1, 3, 10), np.float32)
    bad[0, 1, :3] = np.nan
    evaluate.score(lambda ids: bad, [np.zeros((1, 3), np.int32)])


def test_tables_and_json(tmp_path, capsys):
  columns = (report.Column("a", "name"), report.Column("b", "value", ".2f"), report.Column("c", "empty"))
  rows = [{"a": "x", "b": 1.234}, {"a": "yy", "b": None}]
  report.show(rows, columns, "title", ["note"])
  assert capsys.readouterr().out == "\ntitle\nname  value\nx     1.23\nyy    -\nnote\n"
  assert report.markdown(rows, columns) == "| name | value |\n| --- | --- |\n| x | 1.23 |\n| yy | - |\n"
  manifest.write_json(tmp_path / "deep" / "x.json", {"a": math.nan, "b": [math.inf, np.float32(2)], 1: np.int64(3)})
  assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"a": None, "b": ["inf", 2.0], "1": 3}


@pytest.mark.models
def test_smollm2_in_both_backends():
  rows = ptq.run(
    ptq.Options(configs=("INT4_BLOCKWISE_WEIGHT_ONLY_CFG",), calib_samples=1, calib_tokens=16, eval_samples=1, eval_tokens=64, out="")
  )
  one, other = rows[2:]
  assert one["effective_bits"] == other["effective_bits"] and one["weight_sqnr_db"] == pytest.approx(other["weight_sqnr_db"], rel=1e-9)
  # Weight-only: nothing flips; float32 logits of 30 layers differ by some 1e-5.
  assert one["nll"] == pytest.approx(other["nll"], abs=1e-4)
