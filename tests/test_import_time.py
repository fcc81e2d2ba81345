"""Import times in fresh interpreters. Figures are printed; bounds are five times the targets: a busy machine is no failure."""

from __future__ import annotations

import pytest

from benchmarks import imports

SLACK = 5.0


@pytest.mark.parametrize("entry", imports.IMPORTS, ids=lambda entry: entry.package)
def test_import_is_quick(entry: imports.Import) -> None:
  over, added = imports.seconds(entry, repeats=2)
  print(f"{entry.package}: {added:.3f} s over {', '.join(entry.over)} ({over:.2f} s); target {entry.target} s")
  assert entry.target is not None
  assert added < SLACK * entry.target
