"""python -m benchmarks.model_forward : one forward pass of SmolLM2 with each preset, over its float forward pass.

torch eager, torch.compile and jax.jit, each over the same without quantization, and ModelOpt in eager where it runs. Weights are as in
evaluation: kept between calls in eager torch, folded (`fold_weight`) where a whole graph is compiled. A preset's candidates and the float
ones are interleaved.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import environment, timing
from experiments import manifest

MODULE = "benchmarks.model_forward"
PRESETS = ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG")
TARGETS = {"INT8": 1.2, "FP8": 1.2, "NVFP4": 1.35, "MX": 1.35}
EAGER, COMPILED, JIT, MODELOPT, MODELOPT_FOLDED = RUNTIMES = ("torch", "compile", "jit", "modelopt", "modelopt folded")
FLOAT = "float"


def main(arguments: list[str] | None = None) -> int:
  """Run, print, write."""
  arguments = sys.argv[1:] if arguments is None else arguments
  options = _parser().parse_args(arguments)
  environment.restart(MODULE, arguments, options.fresh_memory)
  cores = environment.use_cores(options.cores)
  environment.torch_threads(cores)
  importlib.import_module("torch._dynamo").config.recompile_limit = 10_000
  presets = PRESETS if options.presets == "default" else options.presets.split(",")
  rows: list[dict[str, Any]] = []
  for family in options.families.split(","):
    rows += {"torch": torch_rows, "jax": jax_rows}[family](options, presets)
  facts = manifest.manifest(f"python -m {MODULE} {' '.join(arguments)}".strip(), memory=environment.memory(), cores_used=cores)
  console = Console(width=150)
  show(console, rows, presets, options)
  console.print(
    f"{facts['command']}\n{facts['time']}, commit {facts['commit']}, {cores} of {facts['machine']['cores']} cores used, "
    f"load {facts['machine']['load']}, freed memory {facts['memory']}",
    highlight=False,
  )
  if options.out:
    manifest.write_csv(f"{options.out}/model_forward.csv", rows)
    console.print(f"written: {manifest.write_json(f'{options.out}/model_forward.json', {'facts': facts, 'rows': rows})}", highlight=False)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Cost of quantization in a whole forward pass.")
  parser.add_argument("--model", default="smollm2")
  parser.add_argument("--presets", default="default", help=f"comma-separated preset names; default is {', '.join(PRESETS)}")
  parser.add_argument("--families", default="torch,jax")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--tokens", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--cores", type=int, default=0, help="use so many cores; 0 is all. On a busy machine 1 is steadier")
  parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
  parser.add_argument("--no-peers", action="store_true", help="leave out ModelOpt")
  parser.add_argument("--fresh-memory", action="store_true", help="do not tell glibc to reuse freed memory")
  parser.add_argument("--out", help="folder for model_forward.csv and model_forward.json")
  return parser


def target_of(preset: str) -> float | None:
  """Largest allowed ratio when compiled: 1.2 for INT8 and FP8, 1.35 for NVFP4 and MX; None for others."""
  return next((ratio for start, ratio in TARGETS.items() if preset.startswith(start)), None)


def _tokens(options: argparse.Namespace) -> np.ndarray:
  return np.random.default_rng(0).integers(100, 40_000, (options.batch, options.tokens))


def _rows(timings: dict[str, timing.Timing], preset: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
  """Ratios of one preset's candidates, each to the float pass of the same runtime (for ModelOpt: eager torch)."""
  rows = []
  for name, timed in timings.items():
    what, runtime = name.split("/")
    if what != FLOAT:
      base = timings[f"{FLOAT}/{EAGER if runtime.startswith(MODELOPT) else runtime}"]
      ratios = {"ratio": timed.wall / base.wall, "cpu_ratio": timed.cpu / base.cpu}
      times = {"milliseconds": timed.wall * 1e3, "float_milliseconds": base.wall * 1e3, "rounds": timed.rounds}
      rows.append({"preset": preset, "runtime": runtime, **ratios, **times, "prepare_seconds": seconds.get(runtime)})
  return rows


def torch_rows(options: argparse.Namespace, presets: tuple[str, ...]) -> list[dict[str, Any]]:
  """Eager, compiled, and ModelOpt."""
  import torch

  import torch_backend
  from experiments import models

  ids = torch.from_numpy(_tokens(options))
  model, _ = models.load_torch(options.model)
  rows = []
  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    floats = {f"{FLOAT}/{EAGER}": _torch_call(model, ids)}
    if not options.no_compile:
      floats[f"{FLOAT}/{COMPILED}"] = _torch_call(torch.compile(copy.deepcopy(model), dynamic=False), ids)
    for preset in presets:
      seconds: dict[str, float] = {}
      candidates = dict(floats)
      start = time.perf_counter()
      quantized = torch_backend.quantize(copy.deepcopy(model), _with_max(torch_backend.preset(preset)), lambda m: m(ids))
      candidates[f"{preset}/{EAGER}"] = _torch_call(quantized, ids)
      seconds[EAGER] = time.perf_counter() - start
      if not options.no_compile:
        start = time.perf_counter()
        folded = copy.deepcopy(quantized)
        torch_backend.fold_weight(folded)
        candidates[f"{preset}/{COMPILED}"] = _torch_call(torch.compile(folded, dynamic=False), ids)
        seconds[COMPILED] = time.perf_counter() - start
      if not options.no_peers:
        candidates |= {f"{preset}/{name}": call for name, call in _modelopt(model, preset, ids).items()}
      rows += _rows(timing.interleave(candidates, options.rounds), preset, seconds)
      print(f"torch {preset}: " + ", ".join(f"{r['runtime']} {r['ratio']:.2f}" for r in rows if r["preset"] == preset), flush=True)
      del candidates, quantized
      gc.collect()
  return rows


def _torch_call(model: Any, ids: Any) -> Callable[[], Any]:
  def call() -> Any:
    return model(ids, use_cache=False).logits

  call()
  call()
  return call


def _modelopt(model: Any, preset: str, ids: Any) -> dict[str, Callable[[], Any]]:
  """ModelOpt as it comes (weights quantized in each call) and folded; empty where it has no such preset or fails on this machine."""
  mtq = importlib.import_module("modelopt.torch.quantization")
  calls = {}
  try:
    config = _with_max(getattr(mtq, preset))
    calls[MODELOPT] = _torch_call(mtq.quantize(copy.deepcopy(model), copy.deepcopy(config), lambda m: m(ids)), ids)
    folded = mtq.quantize(copy.deepcopy(model), copy.deepcopy(config), lambda m: m(ids))
    mtq.fold_weight(folded)
    calls[MODELOPT_FOLDED] = _torch_call(folded, ids)
  except Exception as error:  # what it cannot do on this machine is a finding
    print(f"ModelOpt, {preset}: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}", flush=True)
  return calls


def _with_max(config: dict[str, Any]) -> dict[str, Any]:
  """The preset with max calibration: how amax was chosen does not change the speed."""
  return {**config, "algorithm": "max"}


def jax_rows(options: argparse.Namespace, presets: tuple[str, ...]) -> list[dict[str, Any]]:
  """jax.jit with folded weights."""
  import jax
  import jax.numpy as jnp

  import jax_backend
  from experiments import models

  ids = jnp.asarray(_tokens(options).astype(np.int32))
  module, variables, _ = models.load_jax(options.model)
  plain = jax.jit(module.apply)
  base = _jax_call(plain, variables, ids)
  rows = []
  for preset in presets:
    start = time.perf_counter()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      quantized, state = jax_backend.quantize(module, variables, _with_max(jax_backend.preset(preset)), lambda m: m(ids))
    state = jax_backend.fold_weight(quantized, state)
    call = _jax_call(jax.jit(quantized.apply), state, ids)
    seconds = {JIT: time.perf_counter() - start}
    rows += _rows(timing.interleave({f"{FLOAT}/{JIT}": base, f"{preset}/{JIT}": call}, options.rounds), preset, seconds)
    print(f"jax {preset}: jit {rows[-1]['ratio']:.2f}", flush=True)
    del state, call
    gc.collect()
  return rows


def _jax_call(apply: Callable[..., Any], variables: Any, ids: Any) -> Callable[[], Any]:
  def call() -> Any:
    return apply(variables, ids).block_until_ready()

  call()
  call()
  return call


def show(console: Console, rows: list[dict[str, Any]], presets: tuple[str, ...], options: argparse.Namespace) -> None:
  """One row per preset."""
  title = f"{options.model}, {options.batch} x {options.tokens} tokens: forward pass over the float one, wall (CPU)"
  table = Table(title=title)
  names = [name for name in RUNTIMES if any(row["runtime"] == name for row in rows)]
  for name in ("preset", *names, "target, compiled", "verdict"):
    table.add_column(name, justify="right" if name in names else "left")
  for preset in presets:
    found = {row["runtime"]: row for row in rows if row["preset"] == preset}
    cells = (f"{found[n]['ratio']:.2f} ({found[n]['cpu_ratio']:.2f})" if n in found else "" for n in names)
    target = target_of(preset)
    table.add_row(preset, *cells, "" if target is None else f"{target}", verdict(found, target))
  console.print(table)
  floats = {row["runtime"]: row["float_milliseconds"] for row in rows if row["runtime"] in (EAGER, COMPILED, JIT)}
  console.print("float: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in floats.items()), highlight=False)


def verdict(found: dict[str, dict[str, Any]], target: float | None) -> str:
  """Compiled against the target, eager against ModelOpt."""
  words = []
  for name in (COMPILED, JIT):
    if target is not None and name in found:
      words.append(f"{name} met" if found[name]["ratio"] <= target else f"{name} x{found[name]['ratio'] / target:.2f} over")
  peers = [found[name]["ratio"] for name in (MODELOPT, MODELOPT_FOLDED) if name in found]
  if EAGER in found and peers:
    words.append(f"eager x{found[EAGER]['ratio'] / min(peers):.2f} of ModelOpt's best")
  return ", ".join(words)


if __name__ == "__main__":
  sys.exit(main())
