"""The figure of `experiments.algorithm_study`: quality over CPU and wall seconds of calibration, one colour per format."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core import files

COLOURS = ("#4c78a8", "#e45756", "#2a8f3c", "#f58518", "#9467bd", "#72b7b2", "#b279a2", "#9d755d")


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Write the figure as PNG, in one step.

  Args:
    path: where to.
    rows: rows of the study, the float model's among them.

  Raises:
    ImportError: matplotlib is not installed.
  """
  measures = (
    (("perplexity", "perplexity"), ("kl", "KL to float, nats"))
    if any(r.get("kl") is not None for r in rows)
    else (("cosine", "cosine to float"),)
  )
  clocks = (("cpu_seconds", "CPU seconds of calibration"), ("calibrate_seconds", "wall seconds of calibration"))
  panels = [functools.partial(_panel, rows=rows, measure=measure, clock=clock) for clock in clocks for measure in measures]
  save(path, panels, (6.4 * len(measures), 4.8 * len(clocks)), columns=len(measures))


def save(path: Path, panels: Sequence[Any], size: tuple[float, float], columns: int = 1) -> None:
  """A figure with these panels, so many beside each other, each drawn by a function of its axes."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, dpi=110, layout="constrained")
  FigureCanvasAgg(figure)
  for axes, panel in zip(figure.subplots(len(panels) // columns, columns, squeeze=False).flat, panels, strict=True):
    panel(axes)
  content = io.BytesIO()
  figure.savefig(content, format="png")
  files.write(path, content.getvalue())


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], measure: tuple[str, str], clock: tuple[str, str]) -> None:
  key, label = measure
  formats = list(dict.fromkeys(row["format"] for row in rows if row.get("algorithm")))
  for colour, name in zip(COLOURS * (1 + len(formats) // len(COLOURS)), formats, strict=False):
    own = [row for row in rows if row["format"] == name and row.get(key) is not None]
    seconds = [max(row[clock[0]], 0.1) for row in own]
    axes.scatter(seconds, [row[key] for row in own], color=colour, label=name, s=28)
    for x, row in zip(seconds, own, strict=True):
      axes.annotate(row["algorithm"], (x, row[key]), xytext=(4, 3), textcoords="offset points", fontsize=7)
  base = next((row[key] for row in rows if row["format"] == "float" and row.get(key) is not None), None)
  if base is not None:
    axes.axhline(base, color="#555555", linewidth=0.8, linestyle="--", label="float")
  axes.set_xscale("log")
  if key != "cosine" and all(row[key] > 0 for row in rows if row.get(key) is not None):
    axes.set_yscale("log")
  axes.set_xlabel(clock[1])
  axes.set_ylabel(label)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.legend(fontsize=8)
