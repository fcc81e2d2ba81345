"""Ties and roundings are told from other arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import core
from core.config.schema import QuantizerConfig
from core.export.source import Stage
from core.verify import outputs
from core.verify.inputs import compare, flips

INT8 = Stage(QuantizerConfig.from_attributes({"num_bits": 8}), np.asarray(3.0, np.float32))
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


def quantized(x: np.ndarray, stage: Stage) -> np.ndarray:
  return np.asarray(core.fake_quantize(x, stage.spec, stage.amax, tensor_amax=stage.tensor_amax))


def noise(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(64, 256)).astype(np.float32)


def test_division_flips_ties_only() -> None:
  """x / scale where the quantizer has x * (1 / scale), on inputs around the middles between codes."""
  step = np.asarray(core.scales(INT8.amax, INT8.spec).step)
  middles = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * step
  x = np.stack([middles, np.nextafter(middles, np.float32(9)), np.nextafter(middles, np.float32(-9))])
  client = np.clip(np.rint(x / step), -128, 127) * step
  found = compare(x, client.astype(np.float32), INT8)
  assert found.ties == int((client != quantized(x, INT8)).sum()) > 0
  assert found.different == 0


@pytest.mark.parametrize("attributes", [{"num_bits": 8}, {"num_bits": (4, 3)}, NVFP4, {"format": "mxfp8_e4m3"}])
def test_the_quantizer_agrees_with_itself(attributes: dict[str, Any]) -> None:
  config = QuantizerConfig.from_attributes(attributes)
  x = noise()
  stage = Stage(config, None if config.spec.is_mx else np.asarray(core.amax(x, config.spec)))
  found = compare(x, quantized(x, stage), stage)
  assert (found.total, found.rounded, found.ties, found.different, found.largest) == (x.size, 0, 0, 0, 0.0)


def test_another_scale_is_no_tie() -> None:
  x = noise()
  other = Stage(INT8.config, np.asarray(3.0 * 127 / 127.5, np.float32))
  assert compare(x, quantized(x, other), INT8).different > x.size / 2
  nvfp4 = Stage(QuantizerConfig.from_attributes(NVFP4), np.asarray(core.amax(x, QuantizerConfig.from_attributes(NVFP4).spec)))
  doubled = Stage(nvfp4.config, np.asarray(core.amax(x, nvfp4.spec)) * np.float32(1.5))
  assert compare(x, quantized(x, doubled), nvfp4).different > x.size / 10
  assert compare(x, x, INT8).different > x.size / 2  # not quantized at all
  assert compare(x, x[:1], INT8).different == x.size


def test_a_product_in_another_order_is_one_rounding() -> None:
  x = noise()
  y = quantized(x, INT8)
  found = compare(x, y * np.float32(1 + 2.0**-23), INT8)
  assert found.different == 0 and found.rounded > x.size / 2


def test_flips_are_counted_over_drifting_scales() -> None:
  y = quantized(noise(), INT8)
  assert flips(y, y * np.float32(1 + 1e-5)) == 0
  step = float(np.asarray(core.scales(INT8.amax, INT8.spec).step))
  moved = y.copy()
  moved[0, :5] += np.float32(step)
  assert flips(y, moved) == 5


class TestOutputs:
  LOGITS = np.random.default_rng(1).normal(size=(1, 4, 32)).astype(np.float32) * 5

  def judge(self, theirs: np.ndarray, differing: int = 0, drifted: str = "", agree: bool = True) -> str:
    codes = outputs.Codes(2e-6)
    codes.count("layer", 100, differing)
    codes.drifted = drifted
    return outputs.check([(self.LOGITS, theirs)], codes, 2e-6, agree).status

  def test_statuses(self) -> None:
    near, far = self.LOGITS * np.float32(1 + 1e-7), self.LOGITS * np.float32(1.01)
    assert self.judge(self.LOGITS) == "equal"
    assert self.judge(near) == "within"
    assert self.judge(far) == "differs"
    assert self.judge(far, differing=3) == "explained"
    assert self.judge(far, differing=3, drifted="layer") == "differs"
    assert self.judge(far, differing=3, agree=False) == "differs"
    assert self.judge(np.full_like(far, np.nan), differing=3) == "differs"
    assert self.judge(far[:, :2]) == "differs"

  def test_a_constant_on_all_logits_changes_no_probability(self) -> None:
    codes = outputs.Codes(2e-6)
    assert outputs.check([(self.LOGITS, self.LOGITS + np.float32(8))], codes, 2e-6, True).status == "within"
    assert outputs.check([(self.LOGITS, self.LOGITS + np.float32(8))], codes, 2e-6, True, logits=False).status == "differs"

  def test_drift_before_the_first_flip_is_noted(self) -> None:
    codes = outputs.Codes(2e-6)
    x = noise()
    codes.drift("first", x, x * np.float32(1 + 1e-6))
    assert not codes.drifted
    codes.drift("second", x, x * np.float32(1.01))
    assert codes.drifted == "second"
