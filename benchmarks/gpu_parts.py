"""What `benchmarks.gpu` runs, each part in a process of its own, so that frameworks do not share a GPU's memory pool or a crash.

python -m benchmarks.gpu_parts probe|conformance|speed ... ; each writes one JSON file, after every step, so that a part that is cut off
still reports what it did.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runtimes, timing
from benchmarks.cases import SCALES, Case, select
from core.conformance import runner, vectors_io

REFERENCE_ROWS = 64  # rows of the input that numpy checks; the scales come from the whole input
DIGEST_ROWS = 1024  # rows whose bits are compared between the runtimes


def main(arguments: list[str] | None = None) -> int:
  """Run one part."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts")
  parser.add_argument("part", choices=("probe", "conformance", "speed"))
  parser.add_argument("--framework", choices=("torch", "jax"), required=True)
  parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
  parser.add_argument("--out", required=True, help="JSON file")
  parser.add_argument("--seconds", type=float, default=100.0)
  parser.add_argument("--compiled", action="store_true")
  parser.add_argument("--files", default="")
  parser.add_argument("--cases_per_file", type=int, default=1000)
  parser.add_argument("--rows", type=int, default=8192)
  parser.add_argument("--cols", type=int, default=8192)
  parser.add_argument("--dtype", default="bfloat16,float32")
  parser.add_argument("--formats", default="targets")
  parser.add_argument("--rounds", type=int, default=20)
  options = parser.parse_args(arguments)
  {"probe": probe, "conformance": conformance, "speed": speed}[options.part](options)
  return 0


def write(options: argparse.Namespace, content: dict[str, Any]) -> None:
  """The part's file, replaced in one step."""
  path = Path(options.out)
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=1))
  partial.replace(path)


def probe(options: argparse.Namespace) -> None:
  """Whether this framework sees the device: its name and versions, or why not."""
  found: dict[str, Any] = {"framework": options.framework}
  try:
    module = importlib.import_module(options.framework)
    found["version"] = module.__version__
    found["numpy"] = np.__version__
    found.update(_torch_device(module, options.device) if options.framework == "torch" else _jax_device(module, options.device))
  except Exception as error:  # whatever a framework raises where it finds no device: this is the report of it
    found["missing"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
  write(options, found)


def _torch_device(torch: Any, device: str) -> dict[str, Any]:
  if device == "cpu":
    return {"device": "cpu"}
  if not torch.cuda.is_available():
    return {"missing": f"torch {torch.__version__} sees no CUDA device (built for CUDA {torch.version.cuda})"}
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return {"device": torch.cuda.get_device_name(0), "cuda": torch.version.cuda, "triton": importlib.metadata.version("triton")}
  return {"device": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}


def _jax_device(jax: Any, device: str) -> dict[str, Any]:
  return {"device": jax.devices("gpu" if device == "cuda" else "cpu")[0].device_kind}


def conformance(options: argparse.Namespace) -> None:
  """Vector files on one runtime: the first case of every file, then the second of every file, until the time is up."""
  runtime = runner.Runtime(options.framework, options.compiled, options.device)
  end = time.perf_counter() + options.seconds
  names = options.files.split(",") if options.files else vectors_io.names()
  contents = {name: vectors_io.load(name) for name in names}
  results = {name: runner.FileResult(name, content["title"]) for name, content in contents.items()}
  available = {name: len(content.get("cases", ())) for name, content in contents.items()}
  errors: list[str] = []

  def report(complete: bool) -> None:
    files = [
      {"name": r.name, "cases": r.cases, "available": available[r.name], "compared": r.compared, "mismatches": r.mismatches}
      for r in results.values()
    ]
    failures = [line for r in results.values() for line in r.failures]
    write(options, {"runtime": runtime.name, "complete": complete, "files": files, "failures": failures[:50], "errors": errors[:20]})

  report(False)
  for index in range(min(options.cases_per_file, max(available.values()))):
    for name in names:
      if time.perf_counter() > end:
        return report(False)
      if index < available[name]:
        case = contents[name]["cases"][index]
        try:
          runner.check_case(case, runtime, results[name])
        except Exception as error:  # a compiler's failure is a finding of that case, not the end of the run
          errors.append(f"{name}: {case['name']}: {type(error).__name__}: {str(error)[:300]}")
        report(False)
  report(True)


class Clock:
  """Seconds per call on a device: several calls are queued and waited for together, so that what is measured is the device."""

  def __init__(self, framework: str, device: str, calls: int = 10) -> None:
    self.module, self.calls, self.events = importlib.import_module(framework), calls, framework == "torch" and device == "cuda"

  def __call__(self, function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call (wall; the CPU time is that of this process)."""
    cpu = time.process_time()
    wall = self._events(function) if self.events else self._wall(function)
    return wall, (time.process_time() - cpu) / self.calls

  def _events(self, function: Callable[[], Any]) -> float:
    cuda = self.module.cuda
    start, stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda.synchronize()
    start.record()
    for _ in range(self.calls):
      function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / self.calls

  def _wall(self, function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(self.calls):
      result = function()
    if hasattr(result, "block_until_ready"):
      result.block_until_ready()
    return (time.perf_counter() - start) / self.calls


def speed(options: argparse.Namespace) -> None:
  """Every format beside a copy, in GB/s and as a ratio; the bits of each result, and whether numpy gives the same in the first rows."""
  end = time.perf_counter() + options.seconds
  host = np.random.default_rng(0).standard_normal((options.rows, options.cols), np.float32)
  clock = Clock(options.framework, options.device)
  content: dict[str, Any] = {"framework": options.framework, "shape": list(host.shape), "rows": [], "errors": []}
  dtypes = options.dtype.split(",")
  for i, dtype in enumerate(dtypes):
    share = time.perf_counter() + (end - time.perf_counter()) / (len(dtypes) - i)
    _speed_of(options, host, dtype, clock, share, content)
  write(options, content | {"complete": True})


def _speed_of(options: argparse.Namespace, host: np.ndarray, dtype: str, clock: Clock, end: float, content: dict[str, Any]) -> None:
  names = (runtimes.TORCH, runtimes.COMPILE) if options.framework == "torch" else (runtimes.JIT,)
  x = runtimes.cast(runtimes.array(host, names[0], options.device), names[0], dtype)
  seen = runtimes.to_numpy(x)  # the values that the device sees, for the reference
  candidates, checks = _copies(options.framework, x), {}
  for case in select(options.formats):
    state = case.state(seen)
    moved = runtimes.move(state, names[0], options.device)
    for name in names:
      if time.perf_counter() > end:
        content["errors"].append(f"{case.key}/{name}/{dtype}: left out, the time was up")
        continue
      try:
        call = runtimes.build(case, name, x, moved)
        y = call()
        checks[case.key, name] = (runtimes.digest(y[:DIGEST_ROWS]), _equals_numpy(case, seen, state, y, dtype))
      except Exception as error:  # a compiler's failure on this device is a finding, and the other formats go on
        content["errors"].append(f"{case.key}/{name}/{dtype}: {type(error).__name__}: {str(error)[:300]}")
        continue
      candidates[f"{case.key}/{name}"] = call
  timings = timing.interleave(candidates, options.rounds, max(end - time.perf_counter(), 5.0), clock)
  base = timings["copy"].wall
  for label, t in timings.items():
    key, _, name = label.partition("/")
    bits, equal = checks.get((key, name), (None, None))
    gigabytes = 2 * x.size * x.dtype.itemsize / 1e9 if options.framework == "jax" else 2 * x.numel() * x.element_size() / 1e9
    content["rows"].append(
      {"format": key, "runtime": name or options.framework, "dtype": dtype, "seconds": t.wall, "ratio": t.wall / base}
      | {"gigabytes_per_second": gigabytes / t.wall, "rounds": t.rounds, "bits": bits, "equals_numpy": equal}
    )
  write(options, content | {"complete": False})


def _copies(framework: str, x: Any) -> dict[str, Callable[[], Any]]:
  if framework == "torch":
    out = x.clone()
    return {"copy": lambda: out.copy_(x)}
  jax = importlib.import_module("jax")
  copy = jax.jit(lambda a: jax.numpy.copy(a))
  copy(x).block_until_ready()
  return {"copy": lambda: copy(x)}


def _equals_numpy(case: Case, seen: np.ndarray, state: tuple[Any, ...], y: Any, dtype: str) -> bool | None:
  """Whether the first rows of y are numpy's, bit for bit; None where the scales of a row depend on other rows."""
  rows = seen[:REFERENCE_ROWS]
  if case.kept == SCALES:
    full = len(seen)
    per_row = [v is not None and v.ndim == 2 and v.shape[0] in (full, full // 16) for v in state[0]]
    cut = (v[: REFERENCE_ROWS * v.shape[0] // full] if p else v for v, p in zip(state[0], per_row, strict=True))
    state = (type(state[0])(*cut),)
  elif case.spec.two_level and not state:
    return None
  expected = runtimes.cast(case.function(rows, *state), runtimes.NUMPY, "float32")
  got = runtimes.to_numpy(y[:REFERENCE_ROWS])
  if dtype != "float32":
    expected = runtimes.rounded(expected, dtype)
  return bool(np.array_equal(expected.view(np.int32), np.ascontiguousarray(got).view(np.int32)))


if __name__ == "__main__":
  sys.exit(main())
