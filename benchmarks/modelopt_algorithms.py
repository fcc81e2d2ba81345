"""Calibration algorithms of NVIDIA ModelOpt on a CPU, each in a process of its own, kept between runs.

  python -m benchmarks.modelopt_algorithms

The peer side of `benchmarks.algorithms`: what ModelOpt's max, mse, local Hessian, SmoothQuant, AWQ, GPTQ and SVDQuant cost and what they
leave of SmolLM2. NVFP4 runs take their arithmetic from `benchmarks.modelopt_cpu`; read there what that means.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import algorithm_runs as runs
from benchmarks import algorithm_tables as tables
from benchmarks.algorithm_cases import CASES, Case, choose
from benchmarks.modelopt_cpu import nvfp4_on_cpu
from experiments import cli, manifest, report
from experiments.cli import flag


@dataclasses.dataclass(frozen=True)
class Options(runs.Settings):
  """Flags."""

  algorithms: tuple[str, ...] = flag((), "names of runs, in this order; empty takes all that ModelOpt has")
  worker: str = flag("", "internal: calibrate this one in this process")


def quantize(model: torch.nn.Module, config: dict[str, Any], batches: list[np.ndarray]) -> torch.nn.Module:
  """A copy of the model, quantized by ModelOpt.

  Args:
    model: float model.
    config: quantization configuration in the list form, valid for ModelOpt and for us.
    batches: token ids [B, T] of the calibration.

  Raises:
    ImportError: ModelOpt is not installed.
  """
  import modelopt.torch.quantization as mtq

  def loop(peer: torch.nn.Module) -> None:
    for ids in batches:
      peer(torch.from_numpy(ids).long())

  with torch.no_grad():
    return mtq.quantize(copy.deepcopy(model), copy.deepcopy(config), loop)


def path_of(options: runs.Settings, inputs: runs.Inputs, case: Case) -> Path:
  """Where ModelOpt's run of a case is kept, without a suffix."""
  return Path(options.out) / f"modelopt-{case.name}-{runs.key(inputs, config=case.config(), modelopt=peer_version())}"


def peer_version() -> str:
  """Raises:
  ImportError: ModelOpt is not installed.
  """
  version = manifest.versions().get("nvidia-modelopt")
  if version is None:
    raise ImportError("ModelOpt is not installed; pip install nvidia-modelopt==0.47.0")
  return version


def work(options: Options) -> int:
  """Calibrate and score one case in this process."""
  from experiments.on_torch import Model, Quantized

  inputs = runs.read_inputs(options)
  case = choose([options.worker])[0]
  model = Model.load(options.model).model
  with warnings.catch_warnings(), nvfp4_on_cpu():
    warnings.simplefilter("ignore")
    arrays, figures = runs.measure(options, inputs, lambda batches: Quantized(quantize(model, case.config(), batches)))
  facts = {"side": "modelopt", "name": case.name, "config": case.config(), "substitute": case.nvfp4, **figures, "inputs": inputs.facts}
  runs.keep(path_of(options, inputs, case), arrays, facts)
  return 0


def results(options: runs.Settings, inputs: runs.Inputs, cases: list[Case]) -> dict[str, runs.Run]:
  """name -> (arrays, facts) of every case that ran; those that are not kept run first, one after the other.

  Raises:
    ImportError: ModelOpt is not installed.
  """
  found = {}
  shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(runs.Settings)}
  with report.progress(len(cases), "ModelOpt") as progress:
    for case in cases:
      progress.step(f"ModelOpt {case.name}")
      command = cli.command("benchmarks.modelopt_algorithms", Options(**shared, worker=case.name))
      run = runs.obtain(options, inputs, path_of(options, inputs, case), command)
      if run is not None:
        found[case.name] = run
  return found


def main(options: Options) -> int:
  runs.language_model(options.model)
  if options.worker:
    return work(options)
  inputs = runs.read_inputs(options)
  cases = choose(options.algorithms) if options.algorithms else [case for case in CASES if case.peer]
  try:
    found = results(options, inputs, cases)
  except ImportError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  finally:
    runs.drop_logits(options, inputs)
  base = runs.float_run(options, inputs, logits=False)
  rows = [tables.row(name, *run, base) for name, run in found.items()]
  report.show(rows, tables.PEER, "ModelOpt on a CPU")
  command = cli.command("benchmarks.modelopt_algorithms", options)
  facts = manifest.manifest(command, options=dataclasses.asdict(options), inputs=inputs.facts)
  manifest.write_json(Path(options.out) / "modelopt_algorithms.json", {**facts, "rows": rows})
  manifest.write_csv(Path(options.out) / "modelopt_algorithms.csv", rows)
  manifest.write_text(Path(options.out) / "modelopt_algorithms.md", report.markdown(rows, tables.PEER))
  return 0 if len(found) == len(cases) else 1


if __name__ == "__main__":
  cli.main(Options, main)
