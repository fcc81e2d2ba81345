"""A negative amax is a negative scale for signed integers of full range, a zero group for everything else."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import formats
from core.arrays import to_numpy
from core.conformance.runner import FIELDS, FileResult, evaluate
from tests.spec.specs import KEY, SHAPE, plain, stress

INT4 = core.QuantSpec(formats.INT4, blocks=((-1, 32),))
SIGNED = {
  "int4 block 32": INT4,
  "int4 float16 scale": INT4.replace(scale_format=formats.FLOAT16),
  "int8": core.QuantSpec(formats.INT8),
  "int2 axis 0": core.QuantSpec(formats.int_format(2), axis=(0,)),
  "int3 stochastic": core.QuantSpec(formats.int_format(3), axis=(0,), rounding="stochastic"),
}
UNSIGNED = {
  "int4 narrow": core.QuantSpec(formats.int_format(4, narrow_range=True), blocks=((-1, 32),)),
  "uint4": core.QuantSpec(formats.int_format(4, signed=False), axis=(0,)),
  "int4 double": INT4.replace(scale_format=formats.UINT8, scale_block=4),
  "int4 two-level": INT4.replace(scale_format=formats.E4M3),
  "mxint8": core.QuantSpec.named("mxint8"),
  "e4m3": core.QuantSpec.named("fp8_e4m3"),
  "nf4": core.QuantSpec.named("nf4"),
  "nf4 float16 scale": core.QuantSpec.named("nf4", scale_format=formats.FLOAT16),
}
COMPILED = ("int4 block 32", "int4 narrow")  # torch.compile takes seconds a specification


def both_signs(x: np.ndarray, spec: core.QuantSpec) -> np.ndarray:
  """The tensor's own amax, every second one negative."""
  amax = np.asarray(core.amax(x, spec))
  return np.where(np.arange(amax.size).reshape(amax.shape) % 2 == 0, -amax, amax).astype(np.float32)


def _key(spec: core.QuantSpec) -> dict:
  return {"key": KEY} if spec.rounding == "stochastic" else {}


@pytest.mark.parametrize("label", SIGNED | UNSIGNED)
def test_equal_bits_everywhere(runtime, label, compared):
  if runtime.name == "torch.compile" and label not in COMPILED:
    pytest.skip("the same graph with other constants")
  spec, result = (SIGNED | UNSIGNED)[label], FileResult(label, "")
  words = [np.array(k, np.int32) for k in KEY * (spec.rounding == "stochastic")]
  for x in (stress(), plain()):
    amax = both_signs(x, spec)
    with np.errstate(all="ignore"):
      want = evaluate(x, spec, {"amax": amax}, tuple(words) or None)
    got = runtime.evaluator(spec, ("amax",), bool(words))(*(runtime.array(a) for a in (x, amax, *words)))
    for field, ours, reference in zip(FIELDS, got, want, strict=True):
      if reference is not None:
        result.compare(field, to_numpy(ours), np.asarray(reference))
  compared(result.compared)
  assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("label", SIGNED)
def test_fake_quantize_is_dequantize_of_quantize(label, compared):
  spec = SIGNED[label]
  for x in (stress(), plain()):
    x = np.where(np.isnan(x), np.float32(0), x)
    amax = both_signs(x, spec)
    with np.errstate(all="ignore"):
      q, y = core.quantize(x, spec, amax, **_key(spec)), core.fake_quantize(x, spec, amax, **_key(spec))
    assert np.array_equal(core.dequantize(q).view(np.int32), y.view(np.int32))
    assert np.array_equal(np.signbit(q.scale), amax <= -(2.0**-90))
    compared(x.size)


@pytest.mark.parametrize("label", SIGNED)
def test_a_negative_amax_mirrors(label, compared):
  """fq(x, -a) = -fq(-x, a), bit for bit but for the sign of zeros in zero groups, which stay positive."""
  spec, x = SIGNED[label], plain()
  amax = np.asarray(core.amax(x, spec)) * np.float32(0.875)
  negative, mirrored = core.quantize(x, spec, -amax, **_key(spec)), core.quantize(-x, spec, amax, **_key(spec))
  live = ~np.all(x == 0, axis=1)
  assert np.array_equal(negative.codes, mirrored.codes)
  assert negative.scale.tolist() == np.where(amax >= 2.0**-90, -mirrored.scale, mirrored.scale).tolist()
  y, z = core.fake_quantize(x, spec, -amax, **_key(spec)), -core.fake_quantize(-x, spec, amax, **_key(spec))
  assert np.array_equal(y, z)
  assert np.array_equal(y.view(np.int32)[live], z.view(np.int32)[live])
  compared(2 * x.size)


def test_the_peak_takes_the_lowest_code(runtime):
  """Peaks of either sign fall on -8, exactly, where amax = -peak * 7/8; with a positive scale +8 steps would saturate at 7."""
  if runtime.name == "torch.compile":
    pytest.skip("covered by test_equal_bits_everywhere")
  x = np.array([[8.0, 3.2, -7.0, 0.0], [-8.0, 3.2, 7.0, -0.0]], np.float32)
  spec = core.QuantSpec(formats.INT4, axis=(0,))
  peak = np.array([[8.0], [-8.0]], np.float32)
  q = core.quantize(runtime.array(x), spec, runtime.array(-peak * np.float32(0.875)))
  assert to_numpy(q.codes).tolist() == [[-8, -3, 7, 0], [-8, 3, 7, 0]]
  assert to_numpy(q.scale).tolist() == [[-1.0], [1.0]]
  y = to_numpy(core.dequantize(q))
  assert y.tolist() == [[8.0, 3.0, -7.0, 0.0], [-8.0, 3.0, 7.0, 0.0]]
  assert np.signbit(y[:, 3]).tolist() == [True, False]  # 0 times a negative scale


def test_range_policy():
  """|amax| counts: below 2^-90 a zero group with scale +1, above 2^126 cut."""
  spec = core.QuantSpec(formats.INT8, axis=(0,))
  amax = np.array([[-(2.0**-90)], [-np.nextafter(np.float32(2.0**-90), np.float32(0))], [-0.0], [-3e38]], np.float32)
  scales = core.scales(amax, spec)
  positive = core.scales(-amax, spec)
  assert np.array_equal(np.abs(scales.step), positive.step) and np.array_equal(np.abs(scales.inv_step), positive.inv_step)
  assert np.signbit(scales.step).ravel().tolist() == [True, False, False, True]
  assert scales.inv_step[1:3].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("label", UNSIGNED)
def test_elsewhere_a_negative_amax_counts_as_zero(label):
  spec, x = UNSIGNED[label], plain()
  amax = np.asarray(core.amax(x, spec))
  for f in (lambda a: core.quantize(x, spec, a).codes, lambda a: core.fake_quantize(x, spec, a)):
    assert np.array_equal(f(-amax), f(np.zeros_like(amax)))


def test_which_specifications():
  assert all(spec.allows_signed_scale for spec in SIGNED.values())
  assert not any(spec.allows_signed_scale for spec in UNSIGNED.values())
  assert not core.QuantSpec(formats.INT8, zero_point=True).allows_signed_scale


def test_better_codes():
  """What it is for: on N(0, 1), 4 bits and blocks of 32, the sign of each block's peak and amax of 7/8 of it gain half a dB."""
  x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
  amax = np.asarray(core.amax(x, INT4))
  tiles = x.reshape(256, -1, 32)
  peak = np.take_along_axis(tiles, np.argmax(np.abs(tiles), axis=-1)[..., None], axis=-1)[..., 0]
  gain = core.sqnr_db(x, core.fake_quantize(x, INT4, -peak * np.float32(0.875))) - core.sqnr_db(x, core.fake_quantize(x, INT4, amax))
  assert gain > 0.4, gain


class TestQuantizers:
  """Both backends take it, keep it, and mask gradients by its magnitude."""

  x = plain()
  clipped = {"num_bits": 4, "block_sizes": {-1: 32}, "pass_through_bwd": False}  # noqa: RUF012

  def test_torch(self):
    import torch

    import torch_backend as tb

    amax = both_signs(self.x, INT4) * np.float32(0.5)
    quantizer = tb.TensorQuantizer(self.clipped)
    quantizer.amax = amax
    x = torch.from_numpy(self.x).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert np.array_equal(y.detach().numpy(), core.fake_quantize(self.x, INT4, amax))
    assert np.array_equal(x.grad.numpy() != 0, np.abs(self.x) <= np.repeat(np.abs(amax), 32, axis=1))

  def test_jax(self):
    import jax

    import jax_backend as jb

    amax = both_signs(self.x, INT4) * np.float32(0.5)
    quantizer = jb.Quantizer(self.clipped).with_amax(amax)
    y, back = jax.vjp(quantizer, jax.numpy.asarray(self.x))
    (gradient,) = back(jax.numpy.ones(SHAPE))
    assert np.array_equal(np.asarray(y), core.fake_quantize(self.x, INT4, amax))
    assert np.array_equal(np.asarray(gradient) != 0, np.abs(self.x) <= np.repeat(np.abs(amax), 32, axis=1))
