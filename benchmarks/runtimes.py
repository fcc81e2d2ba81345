"""core.fake_quantize of one case on one runtime, ready to be timed, and its result for the comparison of bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import Case
from core.arrays import to_numpy

NUMPY, TORCH, COMPILE, JIT = RUNTIMES = ("numpy", "torch", "compile", "jit")
DTYPES = ("float32", "bfloat16", "float16")


def array(x: Any, runtime: str, device: str = "cpu") -> Any:
  """A float32 numpy array on the runtime's device (integers and None too, so that `Scales` can be moved leaf by leaf)."""
  if x is None or runtime == NUMPY:
    return x
  if runtime == JIT:
    jax = importlib.import_module("jax")
    return jax.device_put(np.asarray(x), jax.devices("gpu" if device == "cuda" else "cpu")[0])
  torch = importlib.import_module("torch")
  return torch.from_numpy(np.array(x)).to(device)


def cast(x: Any, runtime: str, dtype: str) -> Any:
  """x in a floating point type by name."""
  if runtime == JIT:
    return x.astype(dtype)
  if runtime == NUMPY:
    return x if dtype == "float32" else x.astype(getattr(importlib.import_module("ml_dtypes"), dtype) if dtype == "bfloat16" else dtype)
  return x.to(getattr(importlib.import_module("torch"), dtype))


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
  """float32 values rounded to bfloat16 or float16 (nearest, ties to even) and widened again, without ml_dtypes."""
  if dtype == "float16":
    return np.clip(x, -65504.0, 65504.0).astype(np.float16).astype(np.float32)
  if dtype == "float32":
    return x
  bits = np.ascontiguousarray(x).view(np.uint32)
  return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def move(state: tuple[Any, ...], runtime: str, device: str = "cpu") -> tuple[Any, ...]:
  """What a case keeps of its calibration, on the runtime's device."""
  return tuple(type(s)(*(array(v, runtime, device) for v in s)) if isinstance(s, tuple) else array(s, runtime, device) for s in state)


def build(case: Case, runtime: str, x: Any, state: tuple[Any, ...]) -> Callable[[], Any]:
  """The call that is timed; it returns the result, not yet waited for in jax and on a GPU.

  Args:
    case: what to compute.
    runtime: one of RUNTIMES.
    x: the input on that runtime.
    state: `case.state`, moved to that runtime.
  """
  function = case.function
  if runtime == COMPILE:
    torch = importlib.import_module("torch")
    importlib.import_module("torch._dynamo").config.recompile_limit = 10_000
    function = torch.compile(function, fullgraph=True, dynamic=False)
  elif runtime == JIT:
    function = importlib.import_module("jax").jit(function)
  return lambda: function(x, *state)


def waiting(call: Callable[[], Any], runtime: str) -> Callable[[], Any]:
  """The call, returning when its result is there."""
  return (lambda: call().block_until_ready()) if runtime == JIT else call


def digest(y: Any) -> int:
  """A number that differs when the bits of two results differ: the sum of (bits * position-dependent odd factor) modulo 2^64."""
  words = np.ascontiguousarray(to_numpy(y)).reshape(-1).view(np.uint32)
  total = 0
  for start in range(0, words.size, 1 << 22):
    part = words[start : start + (1 << 22)].astype(np.uint64)
    factor = (np.arange(start, start + part.size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    total = (total + int(np.sum(part * factor, dtype=np.uint64))) % 2**64
  return total
