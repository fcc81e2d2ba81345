"""Every runtime against core on numpy, bit for bit: stress data, given and own amax, float32, bfloat16, float16 and float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import core
from core.arrays import to_numpy
from core.conformance.runner import FIELDS, FileResult, evaluate, int32_word
from tests.spec.specs import KEY, SPECS, plain, stress

# torch.compile takes 3 to 25 s a specification; the rest run there under `-m slow`
COMPILED = ("int8 axis 0", "e4m3 token", "mxfp4", "nvfp4")
# jax compiles every operation of every shape on its own when it runs eagerly
EAGER_JAX = (*COMPILED, "int8", "int8 zero point", "nvfp4 stochastic")
NUMPY_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}


def _reference(x: np.ndarray, spec: core.QuantSpec) -> tuple:
  with np.errstate(all="ignore"):
    return evaluate(x, spec, {}, KEY if spec.rounding == "stochastic" else None)


def _run(runtime, spec: core.QuantSpec, x):
  stochastic = spec.rounding == "stochastic"
  return runtime.evaluator(spec, (), stochastic)(x, *(runtime.array(int32_word(k)) for k in KEY * stochastic))


def _check(runtime, label: str, compared) -> None:
  spec, result = SPECS[label], FileResult(label, "")
  for x in (stress(), plain()):
    for field, got, want in zip(FIELDS, _run(runtime, spec, runtime.array(x)), _reference(x, spec), strict=True):
      if want is not None:
        result.compare(field, to_numpy(got), np.asarray(want))
  compared(result.compared)
  assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("label", SPECS)
def test_parity(runtime, label, compared):
  if (runtime.name == "torch.compile" and label not in COMPILED) or (runtime.name == "jax" and label not in EAGER_JAX):
    pytest.skip("runs in test_parity_slow")
  _check(runtime, label, compared)


@pytest.mark.slow
@pytest.mark.parametrize("label", SPECS)
def test_parity_slow(runtime, label, compared):
  _check(runtime, label, compared)


def _cast(runtime, x: np.ndarray, dtype: str):
  """x in a narrower or wider type of the runtime's framework."""
  if runtime.backend == "numpy":
    return x.astype(NUMPY_DTYPES[dtype])
  if runtime.backend == "torch":
    return runtime.array(x).to(getattr(runtime.module, dtype))
  return runtime.array(x).astype(dtype)


def _narrow(y: np.ndarray, dtype: str) -> np.ndarray:
  """The rule of SPEC.md for the way out: one conversion, saturating in float16."""
  if dtype == "float16":
    y = np.clip(y, np.float32(-65504), np.float32(65504))
  return y.astype(NUMPY_DTYPES[dtype]).astype(np.float32)


DTYPE_SPECS = ("int8 axis 0", "e4m3 token", "mxfp4", "nvfp4", "int8 zero point", "nf4 double", "nvfp4 stochastic")


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("label", DTYPE_SPECS)
def test_input_types(runtime, label, dtype, compared):
  """fake_quantize(x) == dequantize(quantize(x)) in x's own type, and equal to numpy's on the widened input."""
  if dtype == "float64" and runtime.backend == "jax":
    pytest.skip("jax narrows float64 to float32 on arrival unless x64 is switched on")
  if runtime.name == "torch.compile" and (label, dtype) not in (
    ("int8 axis 0", "bfloat16"),
    ("e4m3 token", "float16"),
  ):
    pytest.skip("10 s each; the way in and out is the same code for every specification")
  if runtime.name == "jax" and label not in ("int8 axis 0", "nvfp4"):
    pytest.skip("compiled under jax.jit; eager compiles every operation on its own")
  spec = SPECS[label]
  x = _cast(runtime, np.where(np.abs(plain()) > 2, plain() * 20000, plain()).astype(np.float32), dtype)
  out = dict(zip(FIELDS, _run(runtime, spec, x), strict=True))
  assert str(out["values"].dtype).endswith(dtype)
  wide = to_numpy(x).astype(np.float32)
  want = dict(zip(FIELDS, _reference(wide, spec), strict=True))
  result = FileResult(label, "")
  result.compare("values", to_numpy(out["values"]).astype(np.float32), _narrow(want["values"], dtype))
  result.compare("dequantized", _narrow(to_numpy(out["dequantized"]), dtype), to_numpy(out["values"]).astype(np.float32))
  for field in ("own_amax", "codes", "scale"):
    result.compare(field, to_numpy(out[field]), np.asarray(want[field]))
  compared(result.compared)
  assert not result.failures, "\n".join(result.failures)


def test_float16_saturates(runtime):
  """A level times its step may leave float16 (6 steps of 70000 / 6 here); the result is its largest finite value, never an infinity."""
  if runtime.name == "torch.compile":
    pytest.skip("covered by test_input_types")
  x = np.array([[65504.0, -65504.0, 0.0]], np.float32)
  spec = core.QuantSpec(core.formats.E2M1, axis=(0,))
  y = core.fake_quantize(_cast(runtime, x, "float16"), spec, runtime.array(np.array([[70000.0]], np.float32)))
  assert to_numpy(y).tolist() == x.tolist()


@pytest.mark.parametrize("label", SPECS)
def test_fake_quantize_is_dequantize_of_quantize(label, compared):
  """In the reference, on every specification; the other runtimes are compared with the reference above."""
  spec = SPECS[label]
  for x in (stress(), plain()):
    x = np.where(np.isnan(x), np.float32(0), x)
    with np.errstate(all="ignore"):
      out = dict(zip(FIELDS, evaluate(x, spec, {}, KEY if spec.rounding == "stochastic" else None), strict=True))
    compared(x.size)
    assert np.array_equal(out["values"].view(np.int32), out["dequantized"].view(np.int32))
