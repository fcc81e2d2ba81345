"""experiments.auto_quantize on a tiny Llama in both backends: budgets from one search, controls, files, mistakes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from core.search import state as states
from experiments import auto_quantize, auto_quantize_controls, cli
from tests.experiments import tiny

FORMATS = ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """(Llama folder, text file)."""
  root = tmp_path_factory.mktemp("search")
  words = np.random.default_rng(0).integers(0, tiny.VOCABULARY, 4000)
  (root / "text.txt").write_text(" ".join(f"w{i}" for i in words))
  sizes = {"hidden_size": 32, "intermediate_size": 64}
  return tiny.llama_folder(root / "llama", **sizes), root / "text.txt"


def options(places, **changes):
  sizes = {"calib_samples": 4, "calib_tokens": 16, "eval_samples": 2, "eval_tokens": 16, "batch_samples": 2}
  given = {"formats": FORMATS, "effective_bits": 6.0, "budgets": ("5", "7"), "random_seeds": (0, 1), "out": "", **sizes, **changes}
  return auto_quantize.Options(model=str(places[0]), text_file=str(places[1]), **given)


@pytest.fixture(scope="module")
def both(places, tmp_path_factory):
  out = tmp_path_factory.mktemp("out")
  return *auto_quantize.run(options(places, backend="both", out=str(out))), out


def test_one_search_gives_all_budgets_and_controls(both):
  rows, found, _ = both
  for backend in ("torch", "jax"):
    own = [row for row in rows if row["backend"] == backend]
    assert [row["kind"] for row in own] == ["float", "search", "search", "search", *(f"all {f}" for f in FORMATS), "random", "random"]
    searched = sorted((row for row in own if row["kind"] == "search"), key=lambda row: row["budget"])
    assert all(row["effective_bits"] <= row["budget"] for row in searched)
    assert searched[0]["objective"] >= searched[1]["objective"] >= searched[2]["objective"]
    best = next(row for row in searched if row["budget"] == 6)
    smallest = min(min(abs(a - b) for a in bits.values() for b in bits.values() if a != b) for bits in found[backend]["bits"].values())
    for row in own[-2:]:
      assert row["objective"] >= best["objective"] and row["effective_bits"] <= 6
      assert best["effective_bits"] - row["effective_bits"] < smallest


def test_backends_agree(both):
  _, found, _ = both
  assert found["torch"]["assignment"] == found["jax"]["assignment"]
  alike = f"both backends chose the same format for all {len(found['torch']['assignment'])} groups"
  assert auto_quantize.agreement(found, (5, 7, 1)) == [f"5 bits: {alike}", f"6 bits: {alike}", f"7 bits: {alike}"]
  turned = {g: {f: 1 / (1e-9 + score) for f, score in row.items()} for g, row in found["jax"]["scores"].items()}
  [said] = auto_quantize.agreement({"torch": found["torch"], "jax": {**found["jax"], "scores": turned}})
  assert "6 bits: the backends chose differently" in said and "+" in said


def test_the_search_row_is_what_its_config_makes(both, places):
  rows, found, _ = both
  chosen = options(places, backend="torch")
  study = auto_quantize._Study(chosen, "torch", auto_quantize.read_formats(chosen), *windows(chosen))
  study._base = auto_quantize.evaluate.score(study._model, study._evaluation, keep=study._reference)
  again = study._made({"kind": "search", "config": states.get_auto_quantize_config(found["torch"])})
  first = next(row for row in rows if row["backend"] == "torch" and row["kind"] == "search")
  assert again["nll"] == first["nll"] and again["kl"] == first["kl"]


def windows(chosen):
  text = auto_quantize.setup.open_text(chosen.model, chosen.text, chosen.text_file)
  return (
    text.cut("calibration", chosen.calib_samples, chosen.calib_tokens, chosen.seed),
    text.cut("evaluation", chosen.eval_samples, chosen.eval_tokens),
  )


def test_files(both):
  rows, found, out = both
  document = json.loads((out / "auto_quantize.json").read_text())
  assert document["search_states"]["jax"]["assignment"] == found["jax"]["assignment"] and len(document["rows"]) == len(rows)
  with (out / "scores-torch.csv").open() as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == len(FORMATS) * len(found["torch"]["layers"])
  for name in ("sensitivity", "depth", "pareto"):
    assert (out / f"{name}-jax.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes(places, tmp_path):
  with pytest.raises(ValueError, match=r"effective_bits.*least possible"):
    auto_quantize.run(options(places, backend="torch", effective_bits=3.0))
  with pytest.raises(ValueError, match="--budgets=5,x: numbers"):
    auto_quantize.run(options(places, backend="torch", budgets=("5", "x")))
  with pytest.raises(ValueError, match="NO_SUCH"):
    auto_quantize.run(options(places, backend="torch", formats=("NO_SUCH_CFG",)))
  with pytest.raises(ValueError, match="predicts no tokens"):
    auto_quantize.run(options((tiny.bert_folder(tmp_path / "bert", pooler=False), places[1]), backend="torch"))


def test_budgets_out_of_reach_are_left_out(places, capsys):
  rows, _ = auto_quantize.run(options(places, backend="torch", budgets=("1", "7"), random_seeds=()))
  assert [row.get("budget") for row in rows if row["kind"] == "search"] == [6.0, 7.0]
  assert "budget 1 left out" in capsys.readouterr().out


def test_the_command_repeats_the_run(places):
  said = cli.command("experiments.auto_quantize", options(places))
  assert "--effective_bits=6.0" in said and "--budgets=5,7" in said and "--random_seeds=0,1" in said


def test_uniform_keeps_disabled_groups(both):
  _, found, _ = both
  state = found["torch"]
  assert [entry["kind"] for entry in auto_quantize_controls.uniform(state)] == [f"all {name}" for name in FORMATS]
