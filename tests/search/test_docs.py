"""The example of docs/auto_quantize.md runs as it stands."""

from __future__ import annotations

import pathlib
import re

import pytest

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "auto_quantize.md"


@pytest.mark.slow
@pytest.mark.models
def test_the_example():
  [block] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
  names: dict = {}
  exec(compile(block, str(DOCUMENT), "exec"), names)
  state = names["state"]
  assert len(state["layers"]) == 210 and len(state["groups"]) == 120
  assert state["effective_bits"] <= 4.8 and set(state["assignment"].values()) == {"NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"}
  assert names["tq"].is_quantized(names["model"])
  assert names["config"]["algorithm"] == {"method": "max"} and len(names["config"]["quant_cfg"]) == 1 + 420
  assert names["front"][-1]["effective_bits"] > names["front"][0]["effective_bits"]
