"""A report passes only where something was compared and nothing differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from core.verify import Check, Outcome, Report
from core.verify.tally import Tally

GOOD, BAD, OPEN = Check("codes", "equal", 10), Check("codes", "differs", 10, 2, None, ("a",)), Check("inputs", "not checked")
EXPLAINED = Check("log-probabilities", "explained", 10, 3, 0.5)


def report(*outcomes: Outcome) -> Report:
  return Report("out", "compressed-tensors", outcomes)


@pytest.mark.parametrize(
  ("outcome", "status"),
  [
    (Outcome("a", (GOOD, OPEN)), "passed"),
    (Outcome("a", (GOOD, EXPLAINED)), "passed"),
    (Outcome("a", (GOOD, BAD)), "failed"),
    (Outcome("a", (OPEN,)), "not run"),
    (Outcome("a"), "not run"),
    (Outcome("a", reason="not installed"), "not run"),
    (Outcome("a", (GOOD,), reason="it crashed", failed=True), "failed"),
  ],
)
def test_status(outcome: Outcome, status: str) -> None:
  assert outcome.status == status


def test_passed() -> None:
  ran, absent, wrong = Outcome("a", (GOOD,)), Outcome("b", reason="not installed"), Outcome("c", (BAD,))
  assert report(ran, absent).passed
  assert not report(absent).passed
  assert not report().passed
  assert not report(ran, wrong).passed


def test_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  found = report(Outcome("numpy", (BAD,)), Outcome("vllm", reason="no interpreter"))
  held = json.loads(found.write(tmp_path / "sub" / "report.json").read_text())
  assert held["passed"] is False and [c["status"] for c in held["clients"]] == ["failed", "not run"]
  assert held["clients"][0]["checks"][0]["differing"] == 2
  assert [path.name for path in (tmp_path / "sub").iterdir()] == ["report.json"]
  found.show()
  printed = capsys.readouterr().out
  assert "vllm not run: no interpreter" in printed and "NOT passed" in printed and "first in a" in printed
  assert found["vllm"].reason == "no interpreter"
  with pytest.raises(KeyError, match="asked were numpy, vllm"):
    found["onnx"]


def test_tally_sees_bits_shapes_and_what_is_missing() -> None:
  ones = np.ones(4, np.float32)
  for expected, found, differing in (
    (ones, ones.copy(), 0),
    (ones, np.nextafter(ones, np.float32(2)), 4),
    (np.zeros(2, np.float32), -np.zeros(2, np.float32), 2),
    (ones, ones[:2], 4),
    (ones, ones.astype(np.float64), 4),
    (ones, None, 1),
    (None, ones, 1),
    (None, None, 0),
  ):
    tally = Tally("x")
    tally.bits("name", expected, found)
    assert tally.differing == differing
  assert Tally("nothing").check().status == "not checked"


def test_values_take_nan_for_different() -> None:
  tally = Tally("x")
  tally.values("name", np.zeros(3, np.float32), np.array([-0.0, np.nan, 0.0], np.float32))
  assert tally.differing == 1 and tally.check().status == "differs"
