"""What a result needs so that somebody else can repeat it: versions, commit, machine, command; written in one step."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core import files
from core.state import folder

PACKAGES = ("twinquant", "numpy", "torch", "jax", "jaxlib", "flax", "transformers", "nvidia-modelopt")


def manifest(command: str, **facts: Any) -> dict[str, Any]:
  """Everything about a run that is not in its rows.

  Args:
    command: what repeats the run.
    facts: further entries, for example the text's hash and the configurations in full.

  Returns:
    A dict that JSON can hold.
  """
  return {
    "command": command,
    "commit": commit(),
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "versions": versions(),
    "machine": {
      "platform": platform.platform(),
      "processor": platform.machine(),
      "cores": os.cpu_count(),
      "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
      "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    },
    **facts,
  }


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that are installed."""
  return folder.versions(PACKAGES)


def commit() -> str | None:
  """The commit of this checkout, with "-dirty" where tracked files differ from it; None outside of a checkout."""
  root = Path(__file__).resolve().parent.parent
  try:
    head = _git(root, "rev-parse", "HEAD")
    return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.SubprocessError):
    return None


def _git(root: Path, *args: str) -> str:
  done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=20)
  return done.stdout.strip()


def digest(values: Any) -> str:
  """SHA-256 of an integer array, as int64 little-endian: names the calibration or evaluation set."""
  import numpy as np

  return hashlib.sha256(np.ascontiguousarray(values, dtype="<i8").tobytes()).hexdigest()


def write_json(path: str | Path, value: Any) -> Path:
  """Write JSON in one step. NaN becomes null and infinity the string "inf", since JSON has neither."""
  return write_text(path, json.dumps(plain(value), indent=2) + "\n")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
  """Write rows as CSV in one step; the columns are the keys of all rows, in order of appearance."""
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, fieldnames=columns(rows), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return write_text(path, buffer.getvalue())


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
  """The keys of all rows, in order of appearance."""
  return list(dict.fromkeys(key for row in rows for key in row))


def plain(value: Any) -> Any:
  """The value in types that JSON knows; keys become strings."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else "inf" if value > 0 else "-inf"
  return value


def write_text(path: str | Path, text: str) -> Path:
  """Write a file in one step: a reader sees the old one or the new one, never half of it."""
  return files.write(path, text)
