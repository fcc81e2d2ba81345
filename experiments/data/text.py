"""Running text, and windows of tokens cut from it."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SOURCES = ("python-docs", "python-docstrings")
PARTS = ("calibration", "evaluation")


class Text(NamedTuple):
  """A text, the SHA-256 of its UTF-8 bytes, and where it is from: a source name, or the path of a file."""

  text: str
  sha256: str
  source: str


def load_text(source: str = "python-docs", text_file: str | Path | None = None) -> Text:
  """A text for calibration and perplexity.

  Args:
    source: "python-docs", the language reference that every Python installation carries (`pydoc_data.topics`, 465 KB of English; it
      differs between Python versions, hence the hash); "python-docstrings", the docstrings of the standard library's top-level modules, by
      name of the module and position.
    text_file: a UTF-8 file; it takes the place of `source`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: unknown source, or a file that is empty or not UTF-8.
  """
  if text_file is not None:
    path = Path(text_file).expanduser()
    try:
      text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"text file {path} is not UTF-8 ({error}); convert it first") from error
    if not text.strip():
      raise ValueError(f"text file {path} is empty")
    return _text(text, str(text_file))
  if source not in SOURCES:
    raise ValueError(f"text source {source!r} is unknown; allowed are {', '.join(map(repr, SOURCES))}, or give text_file")
  if source == "python-docstrings":
    return _text(_docstrings(), source)
  from pydoc_data.topics import topics

  return _text("\n\n".join(topics[key] for key in sorted(topics)), source)


def _docstrings() -> str:
  """English about code; sources are parsed, not imported."""
  folder = Path(sysconfig.get_paths()["stdlib"])
  parts = []
  for name in sorted(sys.stdlib_module_names):
    path = folder / f"{name}.py"
    if path.is_file():
      nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
      found = (ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
      parts += [text for text in found if text]
  return "\n\n".join(parts)


def _text(text: str, source: str) -> Text:
  return Text(text, hashlib.sha256(text.encode("utf-8")).hexdigest(), source)


def text_tokens(tokenizer: Any, text: Text | str) -> np.ndarray:
  """All tokens of a text, [n] int32, without the special tokens that a tokenizer may put around it."""
  words = text.text if isinstance(text, Text) else text
  return np.asarray(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def token_windows(
  tokenizer: Any,
  text: Text | str,
  samples: int,
  tokens: int,
  part: str = "calibration",
  *,
  seed: int | None = None,
  calibration_share: float = 0.5,
) -> np.ndarray:
  """Windows of consecutive tokens that do not overlap.

  The tokens of the text are cut in two: calibration windows come from the first `calibration_share` of them, evaluation windows from the
  rest, so the two never overlap, however many are asked for. Without a seed, calibration takes the first windows of the text and
  evaluation the last ones, in the order of the text.

  A tokenizer with class and separator tokens (BERT) gets them around every window, inside its `tokens`.

  Args:
    tokenizer: of Hugging Face.
    text: from `load_text`.
    samples: how many windows.
    tokens: length of each.
    part: "calibration" or "evaluation".
    seed: None, or a number that shifts the grid of windows and draws `samples` of them; the same seed gives the same windows.
    calibration_share: share of the text that belongs to calibration, in (0, 1).

  Returns:
    [samples, tokens] int32.

  Raises:
    ValueError: the text is too short, or an argument is out of range.
  """
  if part not in PARTS:
    raise ValueError(f"part {part!r} is unknown; allowed are {', '.join(map(repr, PARTS))}")
  if not 0 < calibration_share < 1:
    raise ValueError(f"calibration_share {calibration_share} is outside (0, 1)")
  before, after = _surroundings(tokenizer)
  length = tokens - len(before) - len(after)
  if samples < 1 or length < 1:
    raise ValueError(f"samples {samples} and tokens {tokens} must be at least 1 and {1 + len(before) + len(after)}")
  stream = text_tokens(tokenizer, text)
  cut = int(len(stream) * calibration_share)
  own = stream[:cut] if part == "calibration" else stream[cut:]
  if samples * length > len(own):
    raise ValueError(
      f"{samples} windows of {length} tokens of text are {samples * length}, but the {part} part of this text has {len(own)} of its "
      f"{len(stream)} tokens; use fewer or shorter windows, a longer text, or another calibration_share ({calibration_share} now)"
    )
  starts = _starts(len(own), samples, length, seed, from_end=part == "evaluation")
  return np.stack([np.concatenate([before, own[s : s + length], after]) for s in starts]).astype(np.int32)


def _surroundings(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
  ids = (getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None))
  before, after = ([] if i is None or None in ids else [i] for i in ids)
  return np.asarray(before, np.int32), np.asarray(after, np.int32)


def _starts(size: int, samples: int, length: int, seed: int | None, from_end: bool) -> np.ndarray:
  if seed is None:
    first = size - samples * length if from_end else 0
    return first + length * np.arange(samples)
  rng = np.random.default_rng(seed)
  # A shift of less than one window costs at most one window, and none where they are all needed.
  shift = int(rng.integers(0, min(length, size - samples * length + 1)))
  available = (size - shift) // length
  return shift + length * rng.permutation(available)[:samples]
