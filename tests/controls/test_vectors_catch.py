"""The conformance comparison must turn red for every plausible mistake: each breaks one thing in core and runs the vectors on numpy."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core import blocks, encoding, rounding, scaling
from core.arrays import NUMPY
from core.conformance import Runtime, run

FILES = [
  "int",
  "int_signed_scale",
  "e2m1",
  "e4m3",
  "granularity",
  "mx_e2m1",
  "nvfp4",
  "nvfp4_four_over_six",
  "nf4",
  "double_scale",
  "stochastic",
  "int_zero_point",
]


def _mismatches(files: list[str]) -> int:
  with np.errstate(all="ignore"):
    return sum(r.mismatches for r in run(Runtime("numpy"), files))


def _away(x):
  return np.where(x < 0, -1.0, 1.0).astype(np.float32) * np.floor(np.abs(x) + np.float32(0.5))


def ties_away(patch):
  patch.setattr(type(NUMPY), "round", staticmethod(_away))


def float_ties_away(patch):
  original = rounding.to_level

  def broken(v, *rest, **options):
    return original(np.nextafter(v, np.copysign(np.float32(1e38), v)), *rest, **options)

  patch.setattr(rounding, "to_level", broken)


def truncation(patch):
  patch.setattr(type(NUMPY), "round", staticmethod(np.trunc))


def reciprocal_scale(patch):
  """bound / amax, then its inverse, as ModelOpt computes it."""
  original = scaling._float32

  def broken(xp, amax, spec):
    s = original(xp, amax, spec)
    with np.errstate(all="ignore"):
      inverse = np.where(s.inv_step == 0, np.float32(0), np.float32(spec.element_bound) / np.maximum(amax, np.float32(1e-38)))
      step = np.where(s.inv_step == 0, s.step, np.float32(1) / inverse).astype(np.float32)
    return scaling.Scales(step, inverse.astype(np.float32), step)

  patch.setattr(scaling, "_float32", broken)


def floor_for_rceil(patch):
  original = scaling.e8m0_code
  patch.setattr(
    scaling, "e8m0_code", lambda amax, fmt, rule="rceil", bound=None: original(amax, fmt, "floor" if rule == "rceil" else rule, bound)
  )


def ceil_for_rceil(patch):
  original = scaling.e8m0_code
  patch.setattr(
    scaling, "e8m0_code", lambda amax, fmt, rule="rceil", bound=None: original(amax, fmt, "ceil" if rule == "rceil" else rule, bound)
  )


def dropped_tensor_scale(patch):
  original = scaling._two_level

  def broken(xp, amax, spec, tensor_amax, tiles, tiling):
    one = np.float32(spec.element_bound * (256 if spec.four_over_six else 448))
    return original(xp, amax, spec, np.asarray(one), tiles, tiling)

  patch.setattr(scaling, "_two_level", broken)


def unclamped_block_scale(patch):
  patch.setattr(scaling, "_block_level", lambda xp, target: rounding.to_level(target, core.formats.E4M3))


def always_six(patch):
  patch.setattr(scaling, "_four_or_six", lambda xp, target, *rest: scaling._block_level(xp, target))


def flipped_nibbles(patch):
  original = encoding.pack_codes
  patch.setattr(
    encoding, "pack_codes", lambda codes, width: (lambda p: (p << 4 | p >> 4).astype(np.uint8) if width == 4 else p)(original(codes, width))
  )


def wrong_axis(patch):
  original = blocks.tiling

  def broken(shape, spec):
    if spec.axis == (0,) and len(shape) == 2:
      spec = spec.replace(axis=(1,))
    return original(shape, spec)

  patch.setattr(blocks, "tiling", broken)


def zero_scale_of_zero_blocks(patch):
  original = scaling._float32

  def broken(xp, amax, spec):
    s = original(xp, amax, spec)
    return s._replace(scale=np.where(s.inv_step == 0, np.float32(0), s.scale))

  patch.setattr(scaling, "_float32", broken)


def bound_128(patch):
  original = scaling._float32
  patch.setattr(scaling, "_float32", lambda xp, amax, spec: original(xp, amax, spec.replace(bound=spec.element_bound + 1)))


def sign_of_zero_lost(patch):
  original = encoding._encode_float
  patch.setattr(encoding, "_encode_float", lambda xp, level, fmt: original(xp, np.where(level == 0, np.float32(0), level), fmt))


def sign_of_scale_lost(patch):
  original = scaling._with_sign
  patch.setattr(scaling, "_with_sign", lambda xp, amax, *rest: original(xp, np.abs(amax), *rest))


def neighbour_random_bits(patch):
  original = core.bits.threefry2x32
  patch.setattr(core.bits, "threefry2x32", lambda key, count: original(key, count + 1))


def zero_point_off_by_one(patch):
  original = scaling._asymmetric
  patch.setattr(scaling, "_asymmetric", lambda xp, r, spec: (lambda s: s._replace(zero_point=s.zero_point + 1))(original(xp, r, spec)))


BROKEN = [
  ties_away,
  float_ties_away,
  truncation,
  reciprocal_scale,
  floor_for_rceil,
  ceil_for_rceil,
  dropped_tensor_scale,
  unclamped_block_scale,
  always_six,
  flipped_nibbles,
  wrong_axis,
  zero_scale_of_zero_blocks,
  bound_128,
  sign_of_zero_lost,
  sign_of_scale_lost,
  neighbour_random_bits,
  zero_point_off_by_one,
]


@pytest.mark.parametrize("breakage", BROKEN, ids=lambda f: f.__name__)
def test_breakage_is_caught(breakage, monkeypatch):
  breakage(monkeypatch)
  try:
    found = _mismatches(FILES)
  except ValueError:  # a shape that no longer fits is as red as a wrong bit
    found = 1
  assert found > 0, f"{breakage.__name__} went unnoticed by the conformance vectors"


def test_unbroken_is_green():
  assert _mismatches(FILES) == 0


def test_command_line_status(monkeypatch, capsys):
  """Exit status 0 as shipped, 1 when something differs, and one row per file."""
  from core.conformance.__main__ import main

  assert main(["--backend=numpy", "--files=e2m1,nvfp4"]) == 0
  assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["e2m1", "nvfp4"]
  dropped_tensor_scale(monkeypatch)
  assert main(["--backend=numpy", "--files=nvfp4"]) == 1
  assert "MISMATCH nvfp4" in capsys.readouterr().out
