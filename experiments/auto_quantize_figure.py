"""Figures of `experiments.auto_quantize`: how sensitive each layer is, what was chosen where, and what a bit buys."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.algorithm_figure import COLOURS, save


def draw(folder: Path, backend: str, state: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
  """Write sensitivity-, depth- and pareto-BACKEND.png.

  Args:
    folder: where to.
    backend: in the file names.
    state: search_state.
    rows: of this backend.

  Raises:
    ImportError: matplotlib is not installed.
  """
  height = max(3.0, 0.16 * len(state["groups"]))
  save(folder / f"sensitivity-{backend}.png", [functools.partial(_sensitivity, state=state)], (7.5, height))
  kinds, depth = _places(state)
  save(folder / f"depth-{backend}.png", [functools.partial(_depth, state=state)], (6.0 + 0.28 * depth, 1.6 + 0.4 * len(kinds)))
  save(folder / f"pareto-{backend}.png", [functools.partial(_pareto, rows=rows)], (7.0, 5.0))


def _sensitivity(axes: Any, state: Mapping[str, Any]) -> None:
  names = [name for name in state["formats"] if any(name in row for row in state["scores"].values())]
  values = np.full((len(state["groups"]), len(names)), np.nan)
  for i, group in enumerate(state["groups"]):
    for j, name in enumerate(names):
      score = state["scores"][group].get(name, 0.0)
      values[i, j] = np.log10(score) if score > 0 else np.nan
  shown = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
  axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=7)
  axes.set_yticks(range(len(state["groups"])), list(state["groups"]), fontsize=5)
  axes.set_title(f"sensitivity, log10 of the {state['method']} score", fontsize=9)
  axes.figure.colorbar(shown, ax=axes, shrink=0.6)


def _places(state: Mapping[str, Any]) -> tuple[list[str], int]:
  """(kinds of layers: names without their number, number of places along the depth)."""
  kinds = list(dict.fromkeys(_kind(member) for members in state["groups"].values() for member in members))
  return kinds, 1 + max(_number(member) for members in state["groups"].values() for member in members)


def _kind(name: str) -> str:
  return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _number(name: str) -> int:
  found = re.search(r"\.(\d+)\.", name)
  return int(found[1]) if found else 0


def _depth(axes: Any, state: Mapping[str, Any]) -> None:
  from matplotlib.colors import ListedColormap
  from matplotlib.patches import Patch

  kinds, depth = _places(state)
  names = list(dict.fromkeys(choice for choices in state["choices"].values() for choice in choices))
  values = np.full((len(kinds), depth), np.nan)
  for group, members in state["groups"].items():
    for member in members:
      values[kinds.index(_kind(member)), _number(member)] = names.index(state["assignment"][group])
  colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
  axes.imshow(values, aspect="auto", cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
  axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
  axes.set_xlabel("layer")
  axes.set_title(f"{state['effective_bits']:.3f} bits", fontsize=9)
  axes.legend(
    handles=[Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)], fontsize=7, loc="upper left", bbox_to_anchor=(1, 1)
  )


def _pareto(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
  searched = sorted((row for row in rows if row["kind"] == "search"), key=lambda row: row["effective_bits"])
  axes.plot([r["effective_bits"] for r in searched], [r["perplexity"] for r in searched], "o-", color=COLOURS[0], label="searched")
  random = [row for row in rows if row["kind"] == "random"]
  axes.scatter([r["effective_bits"] for r in random], [r["perplexity"] for r in random], color=COLOURS[1], marker="x", label="random")
  for row in rows:
    if row["kind"].startswith("all "):
      axes.scatter([row["effective_bits"]], [row["perplexity"]], color=COLOURS[2], marker="s")
      axes.annotate(row["kind"], (row["effective_bits"], row["perplexity"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if row["kind"] == "float":
      axes.axhline(row["perplexity"], color="#555555", linewidth=0.8, linestyle="--", label="float")
  axes.set_xlabel("stored bits per weight")
  axes.set_ylabel("perplexity")
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.legend(fontsize=8)
