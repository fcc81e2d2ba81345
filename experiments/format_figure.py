"""The figure of `experiments.format_sweep`: gap to Shannon's bound over stored bits, one labelled marker per format.

Formats of about 4 bits crowd; where there is room for it, an inset shows them larger and carries their labels.
"""

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
CROWD = (3.93, 4.68)  # bits shown in the inset
INSET = (0.325, 0.06, 0.475, 0.385)  # left, bottom, width, height, in fractions of the axes


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

  figure = Figure(figsize=(9.6, 6.4), dpi=110, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  bits = [row["effective_bits"] for row in rows] or [4.0]
  left, right = min(1.9, min(bits) - 0.3), max(bits) + 0.75
  curves = _draw_limits(axes, left, right, gaussian)
  _draw_markers(axes, rows)
  worst = max([row["gap_db"] for row in rows], default=6.0)
  axes.set(xlim=(left, right), ylim=(worst + 1.2, -0.9))
  axes.set_xlabel("bits stored per element, scales included")
  axes.set_ylabel("dB below Shannon's bound at that rate")
  axes.set_title(f"Distance from Shannon at equal rate ({source})", fontsize=11)
  axes.grid(alpha=0.25, linewidth=0.6)
  legend = axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
  figure.canvas.draw()
  obstacles = [_box(legend.get_window_extent())]
  crowd = [row for row in rows if CROWD[0] < row["effective_bits"] < CROWD[1]]
  inset = _draw_inset(axes, rows, crowd, gaussian)
  if inset is not None:
    figure.canvas.draw()
    _place_labels(inset, crowd, crowd, curves, [])
    obstacles.append(_box(inset.get_tightbbox()))
  _place_labels(axes, rows, [row for row in rows if inset is None or row not in crowd], curves, obstacles)
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


def _draw_markers(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
  for family, (marker, colour) in STYLES.items():
    own = [row for row in rows if row["family"] == family]
    if own:
      points = [row["effective_bits"] for row in own], [row["gap_db"] for row in own]
      axes.plot(*points, marker, color=colour, markersize=5, label=family, linestyle="none", zorder=3)


def _draw_inset(axes: Any, rows: Sequence[Mapping[str, Any]], crowd: Sequence[Mapping[str, Any]], gaussian: bool) -> Any:
  """An enlarged view of the crowd; None where there is none, or where markers stand in its place."""
  left, bottom, width, height = INSET
  points = axes.transAxes.inverted().transform(
    axes.transData.transform([(row["effective_bits"], row["gap_db"]) for row in rows] or [(0, 0)])
  )
  blocked = (points[:, 0] > left - 0.05) & (points[:, 0] < left + width + 0.02) & (points[:, 1] < bottom + height + 0.02)
  if len(crowd) < 6 or bool(np.any(blocked)):
    return None
  inset = axes.inset_axes(INSET)
  _draw_limits(inset, *CROWD, gaussian)
  _draw_markers(inset, crowd)
  gaps = [row["gap_db"] for row in crowd]
  inset.set(xlim=CROWD, ylim=(max(gaps) + 0.7, min(gaps) - 0.8))
  inset.tick_params(labelsize=7)
  inset.grid(alpha=0.25, linewidth=0.6)
  bottom, top = inset.get_ylim()
  x, y = [CROWD[0], CROWD[1], CROWD[1], CROWD[0], CROWD[0]], [bottom, bottom, top, top, bottom]
  axes.plot(x, y, color="#999999", linewidth=0.8)
  inset.set_title("the formats in the frame, enlarged", fontsize=8, color="#666666")
  for spine in inset.spines.values():
    spine.set_edgecolor("#999999")
  return inset


def _place_labels(
  axes: Any,
  rows: Sequence[Mapping[str, Any]],
  labelled: Sequence[Mapping[str, Any]],
  curves: list[tuple[np.ndarray, np.ndarray]],
  obstacles: list[tuple[float, ...]],
) -> None:
  """Put each label where it covers least: places around the marker, nearest first; crowded markers choose first."""
  renderer = axes.figure.canvas.get_renderer()
  to_pixels, to_data = axes.transData, axes.transData.inverted()
  places = {row["format"]: to_pixels.transform((row["effective_bits"], row["gap_db"])) for row in rows}
  points = np.array(list(places.values())).reshape(-1, 2)
  taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points] + obstacles
  lines = np.concatenate([_dense(axes, *curve) for curve in curves])
  crowded = {name: float(np.sum(np.hypot(*(points - p).T) < 60)) for name, p in places.items()}
  for row in sorted(labelled, key=lambda row: -crowded[row["format"]]):
    x, y = places[row["format"]]
    colour = STYLES[row["family"]][1]
    text = axes.text(row["effective_bits"], row["gap_db"], row["label"], fontsize=7, color=colour)
    extent = text.get_window_extent(renderer)
    box = _best_place(x, y, extent.width, extent.height, taken, lines, _box(axes.bbox))
    text.set_position(to_data.transform(box[:2]))
    taken.append(box)
    nearest = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    if math.dist((x, y), nearest) > 12:
      leader = to_data.transform([(x, y), nearest])
      axes.plot(leader[:, 0], leader[:, 1], color=colour, linewidth=0.5, alpha=0.7, zorder=1)


def _best_place(
  x: float, y: float, width: float, height: float, taken: list[tuple[float, ...]], lines: np.ndarray, frame: tuple[float, ...]
) -> tuple[float, ...]:
  """The box (x0, y0, x1, y1) in pixels around a marker at x, y that overlaps least."""
  best, least = (x, y, x + width, y + height), math.inf
  for distance in (7, 12, 20, 30, 42, 56, 72):
    for angle in np.arange(0, 360, 22.5):
      dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
      x0, y0 = x + distance * dx + width * (dx - 1) / 2, y + distance * dy + height * (dy - 1) / 2
      box = (x0, y0, x0 + width, y0 + height)
      inside = (lines[:, 0] > box[0]) & (lines[:, 0] < box[2]) & (lines[:, 1] > box[1]) & (lines[:, 1] < box[3])
      cost = distance / 2 + sum(_overlap(box, other) for other in taken) + 4 * float(np.sum(inside))
      if box[0] < frame[0] + 2 or box[2] > frame[2] - 3 or box[1] < frame[1] + 2 or box[3] > frame[3]:
        cost += 1e4
      if cost < least:
        best, least = box, cost
  return best


def _box(extent: Any) -> tuple[float, ...]:
  return (extent.x0, extent.y0, extent.x1, extent.y1)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
  """Shared area in pixels, with a margin of one pixel."""
  return max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 2) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


def _dense(axes: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """[400, 2] pixels along a curve."""
  fine = np.linspace(x[0], x[-1], 400)
  return axes.transData.transform(np.stack([fine, np.interp(fine, x, y)], axis=-1))
