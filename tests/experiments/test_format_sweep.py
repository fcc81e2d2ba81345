"""experiments.format_sweep on 16 rows: bounds, rows, files, the figure, mistakes."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import shlex
import sys

import numpy as np
import pytest

from core import limits
from core.spec import NAMED
from experiments import cli, format_sweep, manifest
from experiments.format_entries import entries

TINY = 0.066  # 16 rows of 4096


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """(options, rows) of one run over every format, with files."""
  chosen = format_sweep.Options(samples_millions=TINY, out=str(tmp_path_factory.mktemp("sweep")))
  return chosen, format_sweep.run(chosen)


def test_every_format_stays_below_the_bound(result):
  _, rows = result
  assert {row["format"] for row in rows} == set(entries()) >= set(NAMED)
  assert [row["gap_db"] for row in rows] == sorted(row["gap_db"] for row in rows)
  for row in rows:
    assert row["sqnr_db"] < limits.rate_distortion_db(row["effective_bits"]) and row["bound_db"] - row["sqnr_db"] == row["gap_db"]
    # Every code has a fixed length and the scales say little: 3 dB is well inside what ideal entropy coding could reach.
    assert row["gap_db"] > 3 and 0 < row["sqnr_se_db"] < 0.5


@pytest.mark.parametrize("distribution", ("laplace", "student"))
def test_other_densities_have_their_own_bound(distribution):
  names = ("int8", "nvfp4", "mxfp4", "nf4_double", "int4_block16_fp16")
  rows = format_sweep.run(format_sweep.Options(samples_millions=TINY, distribution=distribution, formats=names, out=""))
  for row in rows:
    assert row["bound_db"] > limits.rate_distortion_db(row["effective_bits"]) and row["gap_db"] > 0


def test_figures_that_are_known(result):
  _, rows = result
  by_name = {row["format"]: row for row in rows}
  sqnr = {name: row["sqnr_db"] for name, row in by_name.items()}
  bits = {name: row["effective_bits"] for name, row in by_name.items()}
  assert bits["nvfp4"] == pytest.approx(4.5, abs=1e-3) and bits["mxfp4"] == 4.25 and bits["int4_block128_fp16"] == 4.125
  # Floats with m mantissa bits: 13.46 + 6.02 m dB, whatever the density; they vary by some 0.1 dB over an octave of scale.
  assert sqnr["fp8_e4m3"] == pytest.approx(13.46 + 3 * 6.02, abs=0.15) and sqnr["fp8_e5m2"] == pytest.approx(13.46 + 2 * 6.02, abs=0.15)
  # INT4 in blocks of 128, amax to 7.5 and to 8 instead of 7: +0.50 and +0.92 dB on N(0,1), here on 65,536 elements.
  assert sqnr["int4_block128_fp16_bound7.5"] - sqnr["int4_block128_fp16"] == pytest.approx(0.50, abs=0.05)
  assert sqnr["int4_block128_fp16_bound8"] - sqnr["int4_block128_fp16"] == pytest.approx(0.92, abs=0.08)
  for size in (16, 32, 64, 128):
    series = [sqnr[f"int{b}_block{size}_fp16"] for b in range(2, 9)]
    assert all(a < b for a, b in itertools.pairwise(series))
  for better, worse in (
    ("nvfp4_four_over_six", "nvfp4"),
    ("nf4_block32", "nf4"),
    ("nvfp4_block8", "nvfp4_block32"),
    ("mxfp4", "mxfp4_ceil"),
  ):
    assert sqnr[better] > sqnr[worse]
  # The exact figure at the exact clip; four standard errors.
  for b in (4, 8):
    row = by_name[f"int{b}_tensor_clipped"]
    assert row["sqnr_db"] == pytest.approx(limits.optimal_uniform(b).sqnr_db, abs=4 * row["sqnr_se_db"])


def test_files_hold_what_repeats_the_run(result):
  chosen, rows = result
  folder = format_sweep.Path(chosen.out)
  document = json.loads((folder / "format_sweep.json").read_text())
  assert document["rows"] == manifest.plain(rows) and set(document["specs"]) == set(entries())
  assert document["gaussian_limits"][3]["lloyd_max_db"] == limits.lloyd_max(4).sqnr_db
  words = shlex.split(document["command"])
  assert words[:3] == ["python", "-m", "experiments.format_sweep"] and cli.parse(format_sweep.Options, words[2:]) == chosen
  with open(folder / "format_sweep.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert [line["format"] for line in lines] == [row["format"] for row in rows]
  assert lines[0]["sigma"] == "1.0" and lines[0]["distribution"] == "gaussian" and lines[0]["commit"] == str(document["commit"] or "")
  assert (folder / "format_sweep.md").read_text().count("\n") == len(rows) + 2
  assert (folder / "format_sweep.png").read_bytes().startswith(b"\x89PNG")
  assert sorted(p.name for p in folder.iterdir()) == [f"format_sweep.{kind}" for kind in ("csv", "json", "md", "png")]


def test_the_same_seed_gives_the_same_rows_and_sigma_scales_them():
  sweep = {"samples_millions": TINY, "formats": ("int4", "mxfp4", "nvfp4"), "out": ""}
  first = format_sweep.run(format_sweep.Options(**sweep))
  assert first == format_sweep.run(format_sweep.Options(**sweep)) != format_sweep.run(format_sweep.Options(**sweep, seed=1))
  # Four octaves: float32 of 16 x is 16 times float32 of x, so every code is the same.
  assert first == format_sweep.run(format_sweep.Options(**sweep, sigma=16.0))


def test_a_few_formats_by_name_are_all_drawn(tmp_path):
  # mxfp4_floor has no label of its own; these figures leave no room for the inset, or need none.
  for names in (("int4", "mxfp4_floor"), tuple(name for name in entries() if "4" in name)):
    format_sweep.run(format_sweep.Options(samples_millions=TINY, formats=names, out=str(tmp_path), distribution="laplace"))
    assert (tmp_path / "format_sweep.png").stat().st_size > 10_000


def test_without_matplotlib_the_table_stands_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  chosen = format_sweep.Options(samples_millions=TINY, formats=("nvfp4",), out=str(tmp_path))
  assert format_sweep.main(chosen) == 0
  shown = capsys.readouterr().out
  assert "matplotlib is not installed; pip install 'twinquant[plots]'" in shown and "--formats=nvfp4" in shown and ".png" not in shown
  assert not (tmp_path / "format_sweep.png").exists() and (tmp_path / "format_sweep.csv").exists()


def test_samples_have_the_variance_they_claim():
  for distribution in limits.DISTRIBUTIONS:
    x = format_sweep.sample(format_sweep.Options(samples_millions=0.5, distribution=distribution, sigma=3.0, student_dof=12))
    assert x.dtype == np.float32 and x.shape[0] % 16 == 0
    # Variance of 458,752 elements with a kurtosis of at most 6: 0.35 % standard error, four of them.
    assert float(np.var(x.astype(np.float64))) == pytest.approx(9.0, rel=0.014)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"formats": ("int9",)}, r"--formats=int9: unknown int9; allowed are all, or of int8"),
    ({"formats": ()}, "unknown \\(empty\\)"),
    ({"samples_millions": 0.01}, r"--samples_millions=0\.01; allowed is 0\.0656"),
    ({"sigma": 0.0}, r"--sigma=0\.0; allowed is 1e-20 to 1e20"),
    ({"distribution": "student", "student_dof": 2}, "2 degrees of freedom"),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(ValueError, match=message):
    format_sweep.run(format_sweep.Options(out="", **changes))
