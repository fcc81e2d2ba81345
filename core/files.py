"""Files that are there complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: str | os.PathLike[str], content: bytes | str) -> Path:
  """Write a file in one step: a reader sees the old one or the new one, never half of it, and a full disk leaves the old one.

  Args:
    path: the file; its folder is made if need be.
    content: bytes, or text (UTF-8).

  Returns:
    The path.

  Raises:
    OSError: it cannot be written.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
  try:
    part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
  return path
