"""Scores on disk while they come: one JSON file, written aside and renamed after every batch; numbers and names only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import files

VERSION = 1
KIND = "scores of auto_quantize"


class ScoreFile:
  """Rows of scores, one per batch, and the weights' errors. Without a path it keeps them in memory only.

  Args:
    path: file to continue or to make; None for none.
    identity: what the scores depend on, as JSON values; a file with another identity is refused.

  Attributes:
    rows: per batch, one number per column.
    errors: layer -> format -> (signal, noise), once they are known.

  Raises:
    ValueError: the file belongs to another model, other formats or another way of scoring, or is no file of scores.
  """

  def __init__(self, path: str | Path | None, identity: Mapping[str, Any]) -> None:
    self._path = None if path is None else Path(path)
    self._identity = json.loads(json.dumps({"kind": KIND, "version": VERSION, **identity}))
    self.rows: list[list[float]] = []
    self.errors: dict[str, dict[str, tuple[float, float]]] | None = None
    if self._path is not None and self._path.exists():
      self._load(self._path)

  def _load(self, path: Path) -> None:
    try:
      found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
      raise ValueError(f"{path} is no file of scores ({error}); choose another checkpoint, or delete it") from error
    held = found.get("identity", {}) if isinstance(found, dict) else {}
    if held.get("kind") != KIND:
      raise ValueError(f"{path} is no file of scores of auto_quantize; choose another checkpoint")
    differing = [key for key, value in self._identity.items() if held.get(key) != value]
    if differing:
      what = "; ".join(self._compared(key, held.get(key)) for key in differing)
      raise ValueError(
        f"{path} holds the scores of another {' and another '.join(differing)} ({what}); choose another checkpoint, or delete it"
      )
    self.rows = [[float(value) for value in row] for row in found["rows"]]
    if found.get("errors") is not None:
      self.errors = {layer: {name: (pair[0], pair[1]) for name, pair in row.items()} for layer, row in found["errors"].items()}

  def _compared(self, key: str, held: Any) -> str:
    now = self._identity[key]
    if isinstance(now, dict) and isinstance(held, dict):
      return f"{key}: {', '.join(held)} there, {', '.join(now)} here" + ("" if list(now) != list(held) else ", with other settings")
    if isinstance(now, list):
      return f"{key}: {len(held or ())} there, {len(now)} here"
    return f"{key}: {_short(held)} there, {_short(now)} here"

  def add(self, row: list[float]) -> None:
    """Keep the scores of one more batch."""
    self.rows.append(row)
    self.write()

  def set_errors(self, errors: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Keep the weights' errors."""
    self.errors = {layer: dict(row) for layer, row in errors.items()}
    self.write()

  def write(self) -> None:
    """Write the file in one step."""
    if self._path is not None:
      write_json(self._path, {"identity": self._identity, "rows": self.rows, "errors": self.errors})


def write_json(path: Path, value: Any) -> None:
  """Write JSON in one step: a reader sees the old file or the new one."""
  files.write(path, json.dumps(value))


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 24 else text[:21] + "..."
