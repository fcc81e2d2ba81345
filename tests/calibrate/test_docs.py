"""The worked example of docs/own_algorithm.md runs as it stands, in both backends."""

from __future__ import annotations

import pathlib
import re

from core.calibrate import registry
from core.config.algorithms import ALGORITHMS

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "own_algorithm.md"


def test_own_algorithm(monkeypatch):
  for table in (registry.ALGORITHMS, ALGORITHMS):  # what the document registers is forgotten afterwards
    for name in ("shrink", "double_max"):
      monkeypatch.setitem(table, name, None)
      monkeypatch.delitem(table, name)
  blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
  assert len(blocks) == 3 and len(blocks[0][blocks[0].index("@register") :].strip().splitlines()) <= 20
  names: dict = {}
  for block in blocks:
    exec(compile(block, str(DOCUMENT), "exec"), names)
  assert len(names["report"]) == 2 and names["jq"].quantizers(names["qvariables"])["weight_quantizer"].amax is not None
