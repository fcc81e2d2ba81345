"""Runs vectors on one runtime and counts compared values and mismatches."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import core
from core import bits
from core.arrays import Array, to_numpy
from core.conformance import vectors_io
from core.spec import QuantSpec

BACKENDS = ("numpy", "torch", "jax")


class Runtime:
  """A framework, eager or compiled, on one device. The framework is imported here, by the name that the caller gives."""

  def __init__(self, backend: str = "numpy", compiled: bool = False, device: str = "cpu") -> None:
    if backend not in BACKENDS:
      raise ValueError(f"backend {backend!r} is unknown; allowed are {', '.join(BACKENDS)}")
    if backend == "numpy" and (compiled or device != "cpu"):
      raise ValueError("numpy has no compiler and no device; leave out --compiled and --device, or use --backend=torch or jax")
    self.backend, self.compiled, self.device = backend, compiled, device
    self.module = importlib.import_module(backend)
    self._compiled: dict[Any, Callable[..., Any]] = {}

  @property
  def name(self) -> str:
    return self.backend + {"torch": ".compile", "jax": ".jit", "numpy": ""}[self.backend] * self.compiled

  def array(self, x: np.ndarray) -> Array:
    """A numpy array as an array of this framework, on this device."""
    if self.backend == "torch":
      return self.module.from_numpy(np.array(x)).to(self.device)
    if self.backend == "jax":
      kind = "gpu" if self.device == "cuda" else self.device
      return self.module.device_put(np.array(x), self.module.devices(kind)[0])
    return np.array(x)

  def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as this runtime runs it: unchanged, torch.compile(fullgraph=True) or jax.jit."""
    if not self.compiled:
      return function
    if self.backend == "torch":
      # every specification is a closure of one code object, which dynamo counts as recompilations of one function
      importlib.import_module("torch._dynamo").config.recompile_limit = 10_000
      return self.module.compile(function, fullgraph=True, dynamic=False)
    return self.module.jit(function)

  def evaluator(self, spec: QuantSpec, names: tuple[str, ...], stochastic: bool) -> Callable[..., Any]:
    """`evaluate` for one specification, compiled once: takes x, the arrays called `names`, and the key's two words."""
    known = self._compiled.get((spec, names, stochastic))
    if known is None:

      def function(x: Array, *arrays: Array) -> tuple[Array | None, ...]:
        key = arrays[len(names) :] if stochastic else None
        return evaluate(x, spec, dict(zip(names, arrays, strict=False)), key)

      known = self._compiled[spec, names, stochastic] = self.compile(function)
    return known


@dataclasses.dataclass
class FileResult:
  """What was compared of one vector file.

  Attributes:
    name: of the file.
    title: of the file.
    cases: number of cases run.
    compared: number of values compared, bit for bit.
    mismatches: number of values that differ.
    failures: one line per array that differs, with its first difference.
  """

  name: str
  title: str
  cases: int = 0
  compared: int = 0
  mismatches: int = 0
  failures: list[str] = dataclasses.field(default_factory=list)

  def compare(self, what: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Count the values of two arrays that differ in their bits; NaN equals NaN, whatever its payload; shapes must be equal."""
    self.compared += expected.size
    if got.shape != expected.shape:
      self.mismatches += max(expected.size, 1)
      self.failures.append(f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}")
      return
    different = np.atleast_1d(differ(got, expected))
    if different.any():
      self.mismatches += int(different.sum())
      index = int(np.flatnonzero(different)[0])
      first = f"{got.reshape(-1)[index]!r}, expected {expected.reshape(-1)[index]!r}"
      self.failures.append(f"{what}: {int(different.sum())} of {expected.size} differ, first at {index}: {first}")


def differ(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
  """Mask of the values that differ in their bits, NaN payloads aside."""
  if expected.dtype != np.float32:
    return np.asarray(got.astype(np.int64) != expected.astype(np.int64))
  if got.dtype != np.float32:
    return np.ones(expected.shape, bool)
  same = np.ascontiguousarray(got).view(np.int32).reshape(got.shape) == np.ascontiguousarray(expected).view(np.int32).reshape(got.shape)
  return np.asarray(~(same | (np.isnan(got) & np.isnan(expected))))


def run(runtime: Runtime, names: list[str] | None = None, select: Callable[[dict], bool] | None = None) -> Iterator[FileResult]:
  """Run vector files, one result each.

  Args:
    runtime: where.
    names: of the files; None runs all.
    select: a filter of cases.
  """
  for name in vectors_io.names() if names is None else names:
    content = vectors_io.load(name)
    result = FileResult(name, content["title"])
    for entry in content.get("random_bits", ()):
      _check_random_bits(entry, runtime, result)
    for case in content.get("cases", ()):
      if select is None or select(case):
        check_case(case, runtime, result)
    yield result


def check_case(case: dict[str, Any], runtime: Runtime, result: FileResult) -> None:
  """Run one case on one runtime: amax, codes, scales, values, dequantized values, packing; everything into `result`."""
  spec, expected = vectors_io.spec_from_json(case["spec"]), case["expected"]
  x = vectors_io.floats(case["x"]).reshape(case["shape"])
  given = {k: v for k, v in (("amax", _amax(case)), ("tensor_amax", _tensor_amax(case))) if v is not None}
  if spec.two_level and spec.dynamic and "tensor_amax" in given:
    given = {"amax": given["tensor_amax"]}
  words = [int32_word(k) for k in case.get("key", ())]
  arrays = runtime.evaluator(spec, tuple(given), bool(words))(*(runtime.array(v) for v in (x, *given.values(), *words)))
  out: dict[str, Any] = dict(zip(FIELDS, (None if v is None else to_numpy(v) for v in arrays), strict=True))
  result.cases += 1
  label = f"{result.name}: {case['name']}: "
  want = _expected(expected, spec, x.shape)
  for field, array in want.items():
    got = out[field]
    if got is None:
      got = np.zeros((0,))
    if field == "dequantized":  # a format without NaN stores code 0 for NaN; what that decodes to is not compared
      got = np.where(np.isnan(array), array, got)
    result.compare(label + field, got, array)
  if out["codes"] is not None and out["codes"].dtype != want["codes"].dtype:
    result.failures.append(f"{label}codes have dtype {out['codes'].dtype}, expected {want['codes'].dtype}")
    result.mismatches += 1


FIELDS = ("own_amax", "codes", "scale", "tensor_scale", "zero_point", "values", "dequantized", "packed")


def int32_word(k: int) -> np.ndarray:
  """One word of a key as a 0-d int32, whichever sign it was written with."""
  return np.array(k & 0xFFFFFFFF, np.uint32).view(np.int32)


def evaluate(x: Array, spec: QuantSpec, given: dict[str, Array], key: tuple[Array, Array] | None) -> tuple[Array | None, ...]:
  """Everything that a case pins down, in the order of FIELDS."""
  q = core.quantize(x, spec, key=key, **given)
  values = core.fake_quantize(x, spec, key=key, **given)
  packed = core.pack(q) if spec.element.bits < 8 and x.ndim else None
  return core.amax(x, spec), q.codes, q.scale, q.tensor_scale, q.zero_point, values, core.dequantize(q), packed


def _amax(case: dict[str, Any]) -> np.ndarray | None:
  return vectors_io.array(case["amax"]) if "amax" in case else None


def _tensor_amax(case: dict[str, Any]) -> np.ndarray | None:
  return vectors_io.floats(case["tensor_amax"]).reshape(()) if "tensor_amax" in case else None


def _expected(expected: dict[str, Any], spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
  signed = getattr(spec.element, "signed", False) and not hasattr(spec.element, "mantissa_bits")
  scale, scale_shape = expected["scale"], expected["scale"]["shape"]
  out = {
    "own_amax": vectors_io.array(expected["amax"]),
    "codes": vectors_io.codes(expected["codes"], signed).reshape(shape),
    "scale": (vectors_io.floats(scale["float32"]) if "float32" in scale else vectors_io.codes(scale["uint8"])).reshape(scale_shape),
    "values": vectors_io.floats(expected["values"]).reshape(shape),
    "dequantized": vectors_io.floats(expected["values"]).reshape(shape),
  }
  if "tensor_scale" in expected:
    out["tensor_scale"] = vectors_io.array(expected["tensor_scale"])
  if "zero_point" in expected:
    out["zero_point"] = np.array(expected["zero_point"], np.int32).reshape(scale_shape)
  if "packed" in expected and shape:
    out["packed"] = vectors_io.codes(expected["packed"]).reshape((*shape[:-1], -1))
  return out


def _check_random_bits(entry: dict[str, Any], runtime: Runtime, result: FileResult) -> None:
  counters = runtime.array(np.array(entry["counters"], np.int32))
  key = tuple(runtime.array(int32_word(k)) for k in entry["key"])
  words = runtime.compile(lambda a, b, c: bits.threefry2x32((a, b), c))(*key, counters)
  expected = np.array([int(w, 16) for w in entry["words"].split()], np.uint32).view(np.int32)
  result.cases += 1
  result.compare(f"{result.name}: key {entry['key']}", to_numpy(words), expected)
