"""How far every number format is from Shannon's bound at the same rate, scale bits counted.

  python -m experiments.format_sweep --distribution=gaussian --sigma=1 --out=results/format_sweep

Quantizes independent random elements with every format (numpy, `core.fake_quantize`) and sets the SQNR beside the bound at the bits that
are really stored. Writes format_sweep.csv, .md, .json and .png. Power-of-two scales make every MX figure periodic in log2 of sigma, so
sigma is part of the result.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import core
from core import limits
from experiments import cli, manifest, report
from experiments.cli import flag
from experiments.format_entries import Entry, chosen
from experiments.report import Column

ROW = 4096  # elements along the blocked axis; a per-channel scale serves this many
ROWS = 16  # rows come in this number, for the 16x16 tiles of NVFP4


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  samples_millions: float = flag(1.0, "random elements, in millions; rounded down to a multiple of 16 rows of 4096")
  distribution: str = flag("gaussian", "density of the elements", limits.DISTRIBUTIONS)
  student_dof: int = flag(5, "degrees of freedom of --distribution=student, at least 3")
  sigma: float = flag(1.0, "standard deviation of the elements")
  formats: tuple[str, ...] = flag(("all",), "comma-separated names from the table, or all")
  seed: int = flag(0, "seed of the random elements")
  figure: bool = flag(True, "draw format_sweep.png (needs matplotlib and --out)")
  out: str = flag("results/format_sweep", "folder for format_sweep.csv, .md, .json and .png; empty writes nothing")


COLUMNS = (
  Column("format", "format"),
  Column("family", "family"),
  Column("effective_bits", "bits", ".4f"),
  Column("sqnr_db", "SQNR dB", ".3f"),
  Column("sqnr_se_db", "+-", ".3f"),
  Column("bound_db", "bound dB", ".2f"),
  Column("gap_db", "gap dB", ".2f"),
  Column("gap_bits", "bits lost", ".3f"),
)


def sample(options: Options) -> np.ndarray:
  """[16 n, 4096] float32 independent elements of the chosen density, with mean 0 and standard deviation sigma.

  Raises:
    ValueError: fewer elements than 16 rows, or a standard deviation that is not usable.
  """
  if not ROW * ROWS <= options.samples_millions * 1e6 <= 1e9:
    raise ValueError(f"--samples_millions={options.samples_millions}; allowed is 0.0656 (16 rows of 4096) to 1000")
  rows = int(options.samples_millions * 1e6) // (ROW * ROWS) * ROWS
  if not 1e-20 <= options.sigma <= 1e20:
    raise ValueError(f"--sigma={options.sigma}; allowed is 1e-20 to 1e20")
  limits.differential_entropy(options.distribution, options.student_dof)  # refuses a density without a variance
  rng = np.random.default_rng(options.seed)
  shape = (rows, ROW)
  if options.distribution == "gaussian":
    unit = rng.standard_normal(shape)
  elif options.distribution == "laplace":
    unit = rng.laplace(scale=math.sqrt(0.5), size=shape)
  else:
    unit = rng.standard_t(options.student_dof, shape) * math.sqrt((options.student_dof - 2) / options.student_dof)
  return (options.sigma * unit).astype(np.float32)


def run(options: Options) -> list[dict[str, Any]]:
  """Quantize with every chosen format and write the files.

  Args:
    options: flags.

  Returns:
    One row per format, the smallest gap first.

  Raises:
    ValueError: an unknown format, or a size or standard deviation that is not usable.
  """
  wanted = chosen(options.formats)
  x = sample(options)
  rows = []
  with report.progress(len(wanted), "drawing samples") as progress:
    for name, entry in wanted.items():
      progress.step(name)
      rows.append({"format": name, "family": entry.family, **measure(x, entry, options)})
  rows.sort(key=lambda row: row["gap_db"])
  if options.out:
    write(Path(options.out), options, rows, {name: entry.label for name, entry in wanted.items()})
  return rows


def measure(x: np.ndarray, entry: Entry, options: Options) -> dict[str, Any]:
  """SQNR of one format and its distance from the bound at the rate stored."""
  amax = None if entry.clip is None else np.float32(entry.clip * options.sigma).reshape(core.amax(x, entry.spec).shape)
  y = core.fake_quantize(x, entry.spec, amax)
  sqnr, error = core.sqnr_db(x, y), _standard_error_db(x, y)
  rate = core.effective_bits(entry.spec, x.shape)
  bound = limits.shannon_bound_db(rate, options.distribution, options.student_dof)
  return {
    "effective_bits": rate,
    "sqnr_db": sqnr,
    "sqnr_se_db": error,
    "bound_db": bound,
    "gap_db": bound - sqnr,
    "gap_bits": (bound - sqnr) / limits.DB_PER_BIT,
  }


def _standard_error_db(x: np.ndarray, y: np.ndarray) -> float | None:
  """Standard error of the pooled SQNR, rows taken as independent (a ratio estimator). It holds the amax of a per-tensor scale fixed."""
  signal = np.sum(x.astype(np.float64) ** 2, axis=-1)
  noise = np.sum((x.astype(np.float64) - y) ** 2, axis=-1)
  n, ratio = len(signal), noise.sum() / signal.sum()
  if n < 2 or ratio == 0:
    return None
  spread = math.sqrt(n / (n - 1) * float(np.sum((noise - ratio * signal) ** 2))) / float(signal.sum())
  return 10 / math.log(10) * spread / float(ratio)


def limits_of_a_gaussian() -> list[dict[str, float]]:
  """Exact SQNR in dB at 1 to 8 bits: the bound, ideal entropy coding, the best levels, the best evenly spaced symmetric levels."""
  return [
    {
      "bits": bits,
      "rate_distortion_db": limits.rate_distortion_db(bits),
      "entropy_coded_uniform_db": limits.entropy_coded_uniform_db(bits),
      "lloyd_max_db": limits.lloyd_max(bits).sqnr_db,
      **(
        {"optimal_uniform_db": limits.optimal_uniform(bits).sqnr_db, "optimal_clip": limits.optimal_uniform(bits).clip} if bits > 1 else {}
      ),
    }
    for bits in range(1, 9)
  ]


def write(folder: Path, options: Options, rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
  """format_sweep.csv (one line a row, with what was drawn and the commit), .md, .json, and .png where matplotlib is installed."""
  facts = manifest.manifest(cli.command("experiments.format_sweep", options), options=dataclasses.asdict(options))
  same = {key: facts["options"][key] for key in ("distribution", "student_dof", "sigma", "samples_millions", "seed")}
  manifest.write_csv(folder / "format_sweep.csv", [{**row, **same, "commit": facts["commit"]} for row in rows])
  specs = {name: repr(entry.spec) for name, entry in chosen(options.formats).items()}
  manifest.write_json(folder / "format_sweep.json", {**facts, "rows": rows, "specs": specs, "gaussian_limits": limits_of_a_gaussian()})
  manifest.write_text(folder / "format_sweep.md", report.markdown(rows, COLUMNS))
  if options.figure and _can_draw():
    from experiments import format_figure

    drawn = [{**row, "label": labels[row["format"]]} for row in rows if labels[row["format"]]]
    format_figure.draw(folder / "format_sweep.png", drawn, _source(options), gaussian=options.distribution == "gaussian")


def _can_draw() -> bool:
  return importlib.util.find_spec("matplotlib") is not None


def _source(options: Options) -> str:
  name = {"gaussian": "Gaussian", "laplace": "Laplace", "student": f"Student t ({options.student_dof})"}[options.distribution]
  return f"{name}, sigma {options.sigma:g}"


def _notes(options: Options) -> Iterator[str]:
  yield f"{_source(options)}; {options.samples_millions:g} million elements in rows of {ROW}, seed {options.seed}"
  yield "+- is one standard error, with the amax of per-tensor scales held fixed"
  if options.out:
    files = "csv, .md, .json"
    if options.figure and _can_draw():
      files = "csv, .md, .json, .png"
    elif options.figure:
      yield "no figure: matplotlib is not installed; pip install 'twinquant[plots]', or pass --nofigure"
    yield f"written to {options.out}/format_sweep.{files}"
  yield cli.command("experiments.format_sweep", options)


def show(options: Options, rows: list[dict[str, Any]]) -> None:
  """Print the table, what was drawn, and the command that repeats it."""
  report.show(rows, COLUMNS, "distance from Shannon at equal rate, scale bits counted", list(_notes(options)))


def main(options: Options) -> int:
  show(options, run(options))
  return 0


if __name__ == "__main__":
  cli.main(Options, main)
