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
from core import QuantSpec, formats, limits
from core.spec import E8M0_RULES, NAMED
from experiments import cli, manifest, report
from experiments.cli import flag
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


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the sweep.

  Attributes:
    spec: specification.
    family: "INT", "FP8", "MX", "NVFP4", "NF4"; colour and marker in the figure.
    label: text in the figure; "" keeps a variation out of it unless it is asked for by name.
    clip: given amax in standard deviations; None takes amax from the elements.
  """

  spec: QuantSpec
  family: str
  label: str = ""
  clip: float | None = None


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


def entries() -> dict[str, Entry]:
  """Every line of the sweep by name: the named formats of `core`, integers of 2 to 8 bits, and the choices that move a figure."""
  return {**_named(), **_integers(), **_scale_rules(), **_granularities(), **_clipped()}


def _named() -> dict[str, Entry]:
  labels = {
    "int8": "INT8 tensor",
    "int4": "",  # INT4, block 128, float32 scales: drawn with float16 scales, as it is usually stored
    "fp8_e4m3": "E4M3",
    "fp8_e5m2": "E5M2",
    "nvfp4_four_over_six": "NVFP4 four over six",
    "nf4_double": "NF4 double",
    "mxfp8_e4m3": "MXFP8 E4M3",
    "mxfp8_e5m2": "MXFP8 E5M2",
    "mxfp6_e2m3": "MXFP6 E2M3",
    "mxfp6_e3m2": "MXFP6 E3M2",
  }
  return {name: Entry(spec, _family(name), labels.get(name, name.upper())) for name, spec in NAMED.items()}


def _family(name: str) -> str:
  return next(
    family for start, family in (("mx", "MX"), ("int", "INT"), ("fp8", "FP8"), ("nvfp4", "NVFP4"), ("nf4", "NF4")) if name.startswith(start)
  )


def _integers() -> dict[str, Entry]:
  found = {}
  for bits in range(2, 9):
    for size in (16, 32, 64, 128):
      spec = QuantSpec(formats.int_format(bits), blocks=((-1, size),), scale_format=formats.FLOAT16)
      label = f"INT{bits} block {size}" if size in (32, 128) else ""
      found[f"int{bits}_block{size}_fp16"] = Entry(spec, "INT", label)
  for bound in (7.5, 8.0):
    found[f"int4_block128_fp16_bound{bound:g}"] = Entry(found["int4_block128_fp16"].spec.replace(bound=bound), "INT")
  for bits in (4, 8):
    found[f"int{bits}_channel"] = Entry(QuantSpec(formats.int_format(bits), axis=(0,)), "INT", f"INT{bits} channel")
  found["int4_tensor"] = Entry(QuantSpec(formats.INT4), "INT", "INT4 tensor")
  found["int8_channel_zero_point"] = Entry(QuantSpec(formats.INT8, axis=(0,), zero_point=True), "INT")
  found["fp8_e4m3_channel"] = Entry(QuantSpec(formats.E4M3, axis=(0,)), "FP8")
  return found


def _scale_rules() -> dict[str, Entry]:
  return {
    f"{name}_{rule}": Entry(spec.replace(e8m0_rule=rule), "MX")
    for name, spec in NAMED.items()
    for rule in E8M0_RULES
    if spec.is_mx and rule != spec.e8m0_rule
  }


def _granularities() -> dict[str, Entry]:
  found = {}
  for size in (8, 16, 64, 128):
    found[f"mxfp4_block{size}"] = Entry(QuantSpec.named("mxfp4", blocks=((-1, size),)), "MX")
  for size in (8, 32):
    found[f"nvfp4_block{size}"] = Entry(QuantSpec.named("nvfp4", blocks=((-1, size),)), "NVFP4")
  found["nvfp4_tiles16x16"] = Entry(QuantSpec.named("nvfp4", blocks=((-2, 16), (-1, 16))), "NVFP4")
  found["int4_block16_e4m3"] = Entry(QuantSpec(formats.INT4, blocks=((-1, 16),), scale_format=formats.E4M3), "NVFP4", "INT4, NVFP4 scales")
  for size in (32, 128):
    found[f"nf4_block{size}"] = Entry(QuantSpec.named("nf4", blocks=((-1, size),)), "NF4")
  return found


def _clipped() -> dict[str, Entry]:
  """One scale for everything, at the clip that is optimal for a Gaussian (exact, from `core.limits`)."""
  found = {}
  for bits in (4, 8):
    spec = QuantSpec(formats.int_format(bits, narrow_range=True))
    found[f"int{bits}_tensor_clipped"] = Entry(spec, "INT", f"INT{bits} tensor, optimal clip", limits.optimal_uniform(bits).clip)
  return found


def chosen(names: tuple[str, ...]) -> dict[str, Entry]:
  """The entries that `--formats` names; those without a label get their name, since they were asked for.

  Raises:
    ValueError: none, or an unknown name.
  """
  known = entries()
  if names == ("all",):
    return known
  unknown = [name for name in names if name not in known]
  if unknown or not names:
    raise ValueError(f"--formats={','.join(names)}: unknown {', '.join(unknown) or '(empty)'}; allowed are all, or of {', '.join(known)}")
  return {name: dataclasses.replace(known[name], label=known[name].label or name) for name in names}


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
