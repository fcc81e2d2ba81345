"""Journal: what an interrupted run has finished, on disk. One file per step, written aside and renamed; numbers only, nothing that runs."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import files
from core.calibrate.host import Host
from core.calibrate.layer import Change

VERSION = 1
_ARRAYS = ("weight", "amax", "tensor_amax", "pre_quant_scale", "input_amax", "bias")


class Journal:
  """Finished steps of one run. Without a folder it remembers nothing."""

  def __init__(self, folder: Path | None) -> None:
    self._folder = folder

  @classmethod
  def open(cls, folder: str, host: Host, method: str, options: Mapping[str, Any]) -> Journal:
    """The journal in a folder, new or of an earlier run of the same model, algorithm and options.

    Raises:
      ValueError: the folder holds the files of another run; names what differs.
    """
    if not folder:
      return cls(None)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    state = {"version": VERSION, "method": method, "options": _plain(options), "model": host.fingerprint()}
    file = path / "run.json"
    if file.exists():
      found = json.loads(file.read_text(encoding="utf-8"))
      differing = [key for key in state if found.get(key) != json.loads(json.dumps(state[key]))]
      if differing:
        held = ", ".join(f"{key}: {found.get(key)!r}" for key in differing)
        raise ValueError(
          f"{path} holds an interrupted run with another {' and '.join(differing)} ({held}); choose another checkpoint_dir or delete it"
        )
    else:
      files.write(file, json.dumps(state, indent=1).encode())
    return cls(path)

  def read(self, names: Sequence[str]) -> list[Change | None] | None:
    """The changes that this step wrote, or None."""
    if self._folder is None or not (path := self._path(names)).exists():
      return None
    with np.load(path, allow_pickle=False) as held:
      count = int(held["count"])
      return [_change(held, i) for i in range(count)]

  def write(self, names: Sequence[str], changes: Sequence[Change | None]) -> None:
    """Keep the changes of a finished step."""
    if self._folder is None:
      return
    arrays: dict[str, Any] = {"count": np.asarray(len(changes))}
    for i, change in enumerate(changes):
      if change is None:
        continue
      arrays[f"{i}.report"] = np.frombuffer(json.dumps(_plain(change.report)).encode(), np.uint8)
      arrays |= {f"{i}.{name}": np.asarray(value) for name in _ARRAYS if (value := getattr(change, name)) is not None}
      if change.low_rank is not None:
        arrays |= {f"{i}.low_rank_a": change.low_rank[0], f"{i}.low_rank_b": change.low_rank[1]}
    content = io.BytesIO()
    np.savez(content, **arrays)
    files.write(self._path(names), content.getvalue())

  def finish(self) -> None:
    """The run is complete: its steps are not needed any more."""
    if self._folder is None:
      return
    for pattern in ("step-*.npz", "*.part"):  # the latter of a run that was killed while it wrote
      for path in self._folder.glob(pattern):
        path.unlink()
    (self._folder / "run.json").unlink(missing_ok=True)

  def _path(self, names: Sequence[str]) -> Path:
    assert self._folder is not None
    return self._folder / f"step-{hashlib.sha256('|'.join(names).encode()).hexdigest()[:24]}.npz"


def _change(held: Any, i: int) -> Change | None:
  if f"{i}.report" not in held:
    return None
  values = {name: held[f"{i}.{name}"] for name in _ARRAYS if f"{i}.{name}" in held}
  low_rank = (held[f"{i}.low_rank_a"], held[f"{i}.low_rank_b"]) if f"{i}.low_rank_a" in held else None
  return Change(**values, low_rank=low_rank, report=json.loads(held[f"{i}.report"].tobytes()))


def _plain(value: Any) -> Any:
  """Numbers, strings, lists and dicts only."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, np.ndarray):
    return value.tolist()
  return value.item() if isinstance(value, np.generic) else value
