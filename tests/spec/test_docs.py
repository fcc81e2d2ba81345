"""The worked example of docs/formats.md runs as written and says what the document says."""

from __future__ import annotations

import pathlib
import re

import numpy as np

import core
from tests.golden import exact

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "formats.md"


def test_example_of_a_new_format(capsys):
  (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
  assert len(block.strip().splitlines()) <= 20
  names: dict = {}
  exec(compile(block, str(DOCUMENT), "exec"), names)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(" at ")[1] for line in lines] == ["5.25 bits", "5.25 bits", "5.50 bits"]
  sqnr = {line.split(":")[0]: float(line.split(": ")[1].split(" dB")[0]) for line in lines}
  # between MXFP4 and MXFP6 on the same data
  x = names["x"]
  low, high = (core.sqnr_db(x, core.fake_quantize(x, core.QuantSpec.named(n))) for n in ("mxfp4", "mxfp6_e2m3"))
  assert low < sqnr["mxfp5"] < high and sqnr["nvfp5"] > sqnr["mxfp5"]


def test_new_format_against_exact_rationals():
  """The same format in the independent arithmetic: every level, midpoint and a random block."""
  ours, theirs = core.formats.FloatFormat("E2M2", 2, 2, 7.0), exact.Float(2, 2, exact.Fraction(7))
  x = np.concatenate([np.arange(-64, 65) / 8, np.random.default_rng(1).normal(size=64) * 3]).astype(np.float32)
  q = core.quantize(x, core.QuantSpec(ours), np.float32(7.0))
  one = exact.Fraction(1)
  expected = [exact.code_and_value(exact.from_bits(int(b)), one, one, theirs, None)[0] for b in x.view(np.uint32)]
  assert q.codes.tolist() == expected
