"""The figure of `experiments.format_sweep`: gap to Shannon's bound over stored bits, one labelled marker per format."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import limits

STYLES = {
  "INT": ("o", "#4c78a8"),
  "FP8": ("D", "#e45756"),
  "MX": ("s", "#f58518"),
  "NVFP4": ("^", "#2a8f3c"),
  "NF4": ("v", "#9467bd"),
}


def draw(path: Path, rows: Sequence[Mapping[str, Any]], source: str, gaussian: bool) -> None:
  """Write the figure as PNG, in one step.

  Args:
    path: where to.
    rows: rows of the sweep, each with a "label".
    source: what was quantized, for the title.
    gaussian: draw the limits of scalar quantizers as well; they are those of a Gaussian.

  Raises:
    ImportError: matplotlib is not installed.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9.2, 5.6), dpi=110, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  bits = [row["effective_bits"] for row in rows] or [4.0]
  left, right = min(1.9, min(bits) - 0.3), max(bits) + 0.75
  curves = _draw_limits(axes, left, right, gaussian)
  for family, (marker, colour) in STYLES.items():
    own = [row for row in rows if row["family"] == family]
    if own:
      points = [row["effective_bits"] for row in own], [row["gap_db"] for row in own]
      axes.plot(*points, marker, color=colour, markersize=5, label=family, linestyle="none", zorder=3)
  worst = max([row["gap_db"] for row in rows], default=6.0)
  axes.set(xlim=(left, right), ylim=(worst + 1.2, -0.9))
  axes.set_xlabel("bits stored per element, scales included")
  axes.set_ylabel("dB below Shannon's bound at that rate")
  axes.set_title(f"Distance from Shannon at equal rate ({source})", fontsize=11)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
  _place_labels(figure, axes, rows, curves)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _draw_limits(axes: Any, left: float, right: float, gaussian: bool) -> list[tuple[np.ndarray, np.ndarray]]:
  axes.axhline(0, color="black", linewidth=1.4, label="Shannon's bound")
  if not gaussian:
    return [(np.array([left, right]), np.zeros(2))]
  fine = np.linspace(left, right, 40)
  whole = np.arange(math.floor(left), math.ceil(right) + 1)
  gap = limits.rate_distortion_db
  coded = np.array([gap(r) - limits.entropy_coded_uniform_db(r) for r in fine])
  lloyd_bits = whole[(whole >= 1) & (whole <= limits.MAX_LLOYD_BITS)]
  lloyd = np.array([gap(b) - limits.lloyd_max(int(b)).sqnr_db for b in lloyd_bits])
  uniform_bits = lloyd_bits[lloyd_bits >= 2]
  uniform = np.array([gap(b) - limits.optimal_uniform(int(b)).sqnr_db for b in uniform_bits])
  axes.plot(fine, coded, color="black", linewidth=1, linestyle="--", label="uniform, ideal entropy coding")
  axes.plot(lloyd_bits, lloyd, color="#555555", linewidth=1, linestyle="-.", label="best 2^b levels (Lloyd-Max)")
  axes.plot(uniform_bits, uniform, color="#888888", linewidth=1, linestyle=":", label="best even spacing, one scale")
  return [(np.array([left, right]), np.zeros(2)), (fine, coded), (lloyd_bits, lloyd), (uniform_bits, uniform)]


def _place_labels(figure: Any, axes: Any, rows: Sequence[Mapping[str, Any]], curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
  """Put each label where it covers least: places around the marker, nearest first; crowded markers choose first."""
  figure.canvas.draw()
  renderer = figure.canvas.get_renderer()
  points = axes.transData.transform([(row["effective_bits"], row["gap_db"]) for row in rows]).reshape(-1, 2)
  legend = axes.get_legend().get_window_extent(renderer)
  taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points] + [(legend.x0, legend.y0, legend.x1, legend.y1)]
  frame = axes.get_window_extent(renderer)
  lines = np.concatenate([_dense(axes, *curve) for curve in curves])
  crowd = [float(np.sum(np.hypot(*(points - p).T) < 60)) for p in points]
  for i in sorted(range(len(rows)), key=lambda i: -crowd[i]):
    row, (x, y) = rows[i], points[i]
    text = axes.annotate(row["label"], (row["effective_bits"], row["gap_db"]), fontsize=7, color=STYLES[row["family"]][1])
    extent = text.get_window_extent(renderer)
    place, corner = _best_place(x, y, extent.width, extent.height, taken, lines, frame)
    text.set_position(axes.transData.inverted().transform(corner))
    taken.append(place)
    if math.hypot(max(place[0] - x, 0, x - place[2]), max(place[1] - y, 0, y - place[3])) > 12:
      near = axes.transData.inverted().transform([(x, y), (min(max(x, place[0]), place[2]), min(max(y, place[1]), place[3]))])
      axes.plot(near[:, 0], near[:, 1], color=STYLES[row["family"]][1], linewidth=0.5, alpha=0.7, zorder=1)


def _best_place(x, y, width, height, taken, lines, frame):
  """The box (x0, y0, x1, y1) in pixels with the least overlap, and its lower left corner."""
  best, least = None, math.inf
  for distance in (6, 12, 20, 30, 42, 56, 72):
    for angle in np.arange(0, 360, 22.5):
      dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
      # The box touches the circle of that radius with the side or corner that faces the marker.
      x0, y0 = x + distance * dx + width * (dx - 1) / 2, y + distance * dy + height * (dy - 1) / 2
      box = (x0, y0, x0 + width, y0 + height)
      cost = distance / 6 + sum(_overlap(box, other) for other in taken)
      inside = (lines[:, 0] > box[0]) & (lines[:, 0] < box[2]) & (lines[:, 1] > box[1]) & (lines[:, 1] < box[3])
      cost += 1.5 * float(np.sum(inside))
      if box[0] < frame.x0 or box[2] > frame.x1 - 3 or box[1] < frame.y0 or box[3] > frame.y1:
        cost += 1e4
      if cost < least:
        best, least = box, cost
  return best, best[:2]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
  """Shared area in pixels, with a margin of one pixel."""
  return max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 2) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


def _dense(axes: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """[400, 2] pixels along a curve."""
  fine = np.linspace(x[0], x[-1], 400)
  return axes.transData.transform(np.stack([fine, np.interp(fine, x, y)], axis=-1))
