"""experiments.algorithm_study on a tiny Llama and a tiny BERT: seeds, the second text, the table in a document, mistakes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments import algorithm_study, cli, data, evaluate
from tests.experiments import tiny


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """(Llama folder, BERT folder, text file)."""
  root = tmp_path_factory.mktemp("study")
  words = np.random.default_rng(0).integers(0, tiny.VOCABULARY, 4000)
  (root / "text.txt").write_text(" ".join(f"w{i}" for i in words))
  return tiny.llama_folder(root / "llama"), tiny.bert_folder(root / "bert", pooler=False), root / "text.txt"


def options(model, text, **changes):
  sizes = {"calib_samples": 2, "calib_tokens": 16, "eval_samples": 2, "eval_tokens": 16, "batch_samples": 2}
  given = {"formats": ("int4_g32",), "algorithms": ("max",), "second_text": "none", "out": "", **sizes, **changes}
  return algorithm_study.Options(model=str(model), text_file=str(text), **given)


def test_seeds_and_their_interval(places, tmp_path):
  llama, _, text = places
  rows, _ = algorithm_study.run(options(llama, text, formats=("int8",), seeds=(0, 1, 2), out=str(tmp_path)))
  assert [row.get("seed") for row in rows] == [None, 0, 1, 2]
  (entry,) = json.loads((tmp_path / "algorithm_study.json").read_text())["over_seeds"]
  values = [row["kl"] for row in rows[1:]]
  assert (entry["format"], entry["algorithm"], entry["seeds"]) == ("int8", "max", 3) and entry["kl"] == pytest.approx(np.mean(values))
  # Student's t for 2 degrees of freedom: 4.303
  assert entry["kl_ci95"] == pytest.approx(4.302653 * np.std(values, ddof=1) / math.sqrt(3), rel=1e-5)


def test_weights_alone_do_not_depend_on_the_seed(places):
  llama, _, text = places
  rows, _ = algorithm_study.run(options(llama, text, seeds=(0, 1)))
  assert rows[1]["kl"] == rows[2]["kl"] > 0
  (entry,) = evaluate.over_seeds(rows, algorithm_study.BY)
  assert entry["kl_ci95"] == 0 and "cosine" not in entry


def test_rows_equal_a_direct_computation_and_float_is_first(places):
  import torch

  import core
  from experiments import models, setup

  llama, _, text = places
  rows, _ = algorithm_study.run(options(llama, text, formats=("int8_w",)))
  model, _ = models.load_torch(llama)
  ids = setup.open_text(str(llama), "python-docs", str(text)).cut("evaluation", 2, 16)

  @torch.no_grad()
  def score(reference):
    return evaluate.score_batch(ids, model(torch.from_numpy(ids).long()).logits.numpy(), reference)

  with torch.no_grad():
    base = model(torch.from_numpy(ids).long()).logits.numpy()
    same = score(base)
    for name, module in model.named_modules():
      if isinstance(module, torch.nn.Linear) and name != "lm_head":
        module.weight.copy_(torch.from_numpy(core.fake_quantize(module.weight.numpy(), core.QuantSpec.named("int8", axis=(0,)))))
  # float32 logits: a KL of equal ones is zero to rounding
  assert rows[0]["format"] == "float" and "kl" not in rows[0] and same["kl"].max() < 1e-6
  assert rows[0]["nll"] == pytest.approx(same["nll"].mean(), rel=1e-6)
  assert rows[1]["nll"] == pytest.approx(score(base)["nll"].mean(), rel=1e-6)
  assert rows[1]["kl"] == pytest.approx(score(base)["kl"].mean(), rel=1e-2)


def test_the_second_text_is_one_that_every_python_ships(places, tmp_path):
  llama, _, text = places
  rows, _ = algorithm_study.run(options(llama, text, second_text="python-docstrings", out=str(tmp_path)))
  assert rows[1]["kl_second"] > 0
  first, second = json.loads((tmp_path / "algorithm_study.json").read_text())["texts"]
  found = data.load_text("python-docstrings")
  assert first["source"] == str(text) and second == {"source": "python-docstrings", "sha256": found.sha256}
  assert len(found.text) > 500_000 and "Return" in found.text


def test_an_encoder_gets_cosines(places, tmp_path):
  _, bert, text = places
  rows, _ = algorithm_study.run(options(bert, text, formats=("int8_w", "int4_g32"), out=str(tmp_path)))
  assert 1 > rows[1]["cosine"] > rows[2]["cosine"] > 0.5 and "kl" not in rows[1]  # eight bits are better than four
  assert (tmp_path / "algorithm_study.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_in_a_document(places, tmp_path):
  llama, _, text = places
  document = tmp_path / "algorithms.md"
  document.write_text("# Algorithms\n\nText.\n")
  chosen = options(llama, text, write_table=str(document))
  algorithm_study.run(chosen)
  once = document.read_text()
  begin, end = f"<!-- begin algorithm_study {llama.name} -->", f"<!-- end algorithm_study {llama.name} -->"
  assert once.startswith("# Algorithms\n\nText.\n\n" + begin) and once.endswith(f"{end}\n")
  assert "| int4_g32 | max | torch |" in once and cli.command("experiments.algorithm_study", chosen) in once
  document.write_text(once.replace("| int4_g32 |", "| old |") + "\nAfter.\n")
  algorithm_study.run(chosen)
  again = document.read_text()
  assert again.endswith("\nAfter.\n") and "| old |" not in again and again.count(begin) == again.count(end) == 1
  document.write_text(again.replace(end, ""))
  with pytest.raises(ValueError, match="one of them alone"):
    algorithm_study.write_table(document, chosen, [])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"formats": ("int9",)}, "'int9' is unknown; allowed are int3_g64"),
    ({"algorithms": ("gptqq",)}, "gptqq"),
    ({"formats": ()}, "--formats is empty"),
    ({"algorithms": ()}, "--algorithms is empty"),
    ({"seeds": ()}, "--seeds is empty"),
    ({"eval_samples": 1000}, "1000 windows of 16 tokens"),
  ],
)
def test_mistakes(places, changes, message):
  with pytest.raises(ValueError, match=message):
    algorithm_study.run(options(places[0], places[2], **changes))


def test_a_missing_document_is_told_before_anything_runs(places, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.md: no such file"):
    algorithm_study.run(options(places[0], places[2], write_table=str(tmp_path / "none.md"), eval_samples=1000))
