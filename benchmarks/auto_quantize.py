"""auto_quantize beside ModelOpt's: the same model, tokens, formats and loss, one ruler for the bits, each search in its own process.

  python -m benchmarks.auto_quantize

ModelOpt searches for `--effective_bits` by its own count. What it chose is counted by ours (everything that is stored, scales included),
and twinquant searches under that very number; its model must have the lower perplexity on the first text within as many CPU seconds. Exit
status 1 where it has not. Both may leave layers unquantized; the output layer is left out on both sides.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import core
from benchmarks import algorithm_runs as runs
from benchmarks import algorithm_tables as tables
from benchmarks.algorithms import source_digest
from benchmarks.modelopt_algorithms import peer_version
from core.config import normalize, preset, resolve
from core.metrics import mean_and_error
from experiments import cli, manifest, report
from experiments.cli import flag
from experiments.report import Column

MODULE = "benchmarks.auto_quantize"
OFF = ("*lm_head*",)
NONE_BITS = 16


@dataclasses.dataclass(frozen=True)
class Options(runs.Settings):
  """Flags."""

  formats: tuple[str, ...] = flag(("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG"), "preset names that both sides have")
  effective_bits: float = flag(6.0, "ModelOpt's budget, in its own count")
  method: str = flag("fisher", "of our scores", ("gradient", "fisher", "kl_div", "hessian", "sqnr"))
  peer_method: str = flag("gradient", "of ModelOpt's scores", ("gradient", "kl_div"))
  backends: tuple[str, ...] = flag(("torch",), "torch, jax")
  tables: str = flag("results/auto_quantize_peer", "folder of the tables; empty writes none")
  worker: str = flag("", "internal: modelopt, torch or jax: search in this process")
  budget: float = flag(0.0, "internal: stored bits per weight that our worker may use")


COLUMNS = (
  Column("name", "search"),
  Column("method", "scores"),
  Column("stored_bits", "stored bits", ".4f"),
  Column("peer_bits", "bits as ModelOpt counts", ".4f"),
  *tables.PEER[1:5],
  *tables.PEER[5:9],
  Column("difference_first", "NLL 1 less ModelOpt's", "+.5f"),
  Column("difference_se_first", "paired +-", ".5f"),
  Column("difference_second", "NLL 2", "+.5f"),
  Column("difference_se_second", "paired +-", ".5f"),
  *tables.PEER[9:],
)


def stored_bits(layers: Mapping[str, tuple[str | None, list[int]]], options: Options, peers: bool = False) -> float:
  """Bits per weight over all searched layers.

  Args:
    layers: name -> (format or None, shape of the weight [N, K]).
    options: flags.
    peers: ModelOpt's count, which leaves scales out, in place of what is stored.
  """
  specs = {name: weight_spec(name) for name in options.formats}
  total = weights = 0.0
  for choice, shape in layers.values():
    numel = int(np.prod(shape))
    if choice is None:
      bits = float(NONE_BITS)
    else:
      bits = float(specs[choice].element.bits) if peers else core.effective_bits(specs[choice], tuple(shape))
    total, weights = total + bits * numel, weights + numel
  return total / weights


def weight_spec(name: str) -> core.QuantSpec:
  """What a preset makes of the weights of a linear layer."""
  [config] = resolve(normalize(preset(name)).entries, "layer.weight_quantizer", ("nn.Linear",)).configs
  return config.spec


def peer_search(options: Options, model: Any, batches: list[np.ndarray]) -> tuple[Any, dict[str, tuple[str | None, list[int]]]]:
  """(the model that ModelOpt's search returns, what it chose: layer -> (format or None, shape of its weight))."""
  import modelopt.torch.quantization as mtq
  import torch

  loader = [torch.from_numpy(ids).long() for ids in batches]
  found, _ = mtq.auto_quantize(
    copy.deepcopy(model),
    # The output layer stays in float and out of the count, as the presets of both sides mean it.
    constraints={"effective_bits": options.effective_bits, "cost": {"excluded_module_name_patterns": list(OFF)}},
    quantization_formats=[copy.deepcopy(getattr(mtq, name)) for name in options.formats],
    data_loader=loader,
    forward_step=lambda m, ids: m(input_ids=ids, labels=ids),
    loss_func=lambda output, _: output.loss,
    disabled_layers=list(OFF),
    num_calib_steps=len(loader),
    num_score_steps=len(loader),
    method=options.peer_method,
  )
  bits = {weight_spec(name).element.bits: name for name in options.formats}
  chosen: dict[str, tuple[str | None, list[int]]] = {}
  for name, module in found.named_modules():
    quantizer = module._modules.get("weight_quantizer")
    if quantizer is not None and isinstance(module, torch.nn.Linear) and "lm_head" not in name:
      chosen[name] = (bits[quantizer.num_bits] if quantizer.is_enabled else None, list(module.weight.shape))
  return found, chosen


def our_search(options: Options, backend: str, batches: list[np.ndarray]) -> tuple[Any, dict[str, tuple[str | None, list[int]]]]:
  """The same of twinquant, under `options.budget`."""
  from experiments import setup

  formats = (*options.formats, None)
  found, state = setup.load(backend, options.model).auto_quantize(
    batches, {"effective_bits": options.budget}, formats, method=options.method
  )
  chosen = {}
  for group, members in state["groups"].items():
    choice = state["assignment"][group]
    for member in members:
      chosen[member] = (choice if choice in options.formats else None, list(state["layers"][member]["shape"]))
  return found, {name: chosen[name] for name in chosen if "lm_head" not in name}


def work(options: Options) -> int:
  """Search and score in this process."""
  inputs = runs.read_inputs(options)
  held: dict[str, Any] = {}

  def quantize(batches: list[np.ndarray]) -> Any:
    if options.worker == "modelopt":
      from experiments.on_torch import Model, Quantized

      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, held["layers"] = peer_search(options, Model.load(options.model).model, batches)
      return Quantized(found)
    found, held["layers"] = our_search(options, options.worker, batches)
    return found

  arrays, figures = runs.measure(options, inputs, quantize)
  runs.keep(path_of(options, inputs), arrays, {"side": options.worker, **held, **figures, "inputs": inputs.facts})
  return 0


def path_of(options: Options, inputs: runs.Inputs) -> Path:
  """Where a worker's run is kept, without a suffix."""
  facts: dict[str, Any] = {"formats": options.formats}
  if options.worker == "modelopt":
    facts |= {"method": options.peer_method, "bits": options.effective_bits, "modelopt": peer_version()}
  else:
    facts |= {"method": options.method, "budget": options.budget, "source": source_digest(options.worker)}
  return Path(options.out) / f"auto_quantize-{options.worker}-{runs.key(inputs, **facts)}"


def obtain(options: Options, inputs: runs.Inputs) -> runs.Run | None:
  """The run of `options.worker`, from before or now."""
  return runs.obtain(options, inputs, path_of(options, inputs), cli.command(MODULE, options))


def row_of(name: str, run: runs.Run, options: Options, base: dict[str, np.ndarray], peer: runs.Run) -> dict[str, Any]:
  """Figures of one search, and how its negative log-likelihood differs from ModelOpt's, token by token."""
  layers = {key: (choice, shape) for key, (choice, shape) in run[1]["layers"].items()}
  bits = {"stored_bits": stored_bits(layers, options), "peer_bits": stored_bits(layers, options, peers=True)}
  found = {**tables.row(name, *run, base), **bits, "method": options.peer_method if run is peer else options.method}
  for text in runs.TEXTS if run is not peer else ():
    difference, error = mean_and_error(run[0][f"nll_{text}"] - peer[0][f"nll_{text}"])
    found |= {f"difference_{text}": difference, f"difference_se_{text}": error}
  return found


def compare(options: Options, inputs: runs.Inputs) -> list[dict[str, Any]]:
  """Rows of the table, ModelOpt's first; without those that failed.

  Raises:
    ImportError: ModelOpt is not installed.
  """
  with report.progress(1 + len(options.backends), "ModelOpt") as progress:
    progress.step("ModelOpt")
    peer = obtain(dataclasses.replace(options, worker="modelopt"), inputs)
    if peer is None:
      return []
    budget = stored_bits(dict(peer[1]["layers"]), options)
    found = {}
    for backend in options.backends:
      progress.step(f"twinquant, {backend}")
      run = obtain(dataclasses.replace(options, worker=backend, budget=budget), inputs)
      if run is not None:
        found[f"twinquant, {backend}"] = run
  base = runs.float_run(options, inputs, logits=False)
  return [row_of(name, run, options, base, peer) for name, run in {"ModelOpt": peer, **found}.items()]


def main(options: Options) -> int:
  runs.language_model(options.model)
  if options.worker:
    return work(options)
  inputs = runs.read_inputs(options)
  try:
    rows = compare(options, inputs)
  except ImportError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  finally:
    runs.drop_logits(options, inputs)
  if not rows:
    return 1
  missed = [row["name"] for row in rows[1:] if row["difference_first"] >= 0 or row["cpu_seconds"] > rows[0]["cpu_seconds"]]
  notes = [f"not better, or slower: {', '.join(missed)}" if missed else "better at equal stored bits, in no more CPU seconds"]
  report.show(rows, COLUMNS, f"{' + '.join(options.formats)}, ModelOpt at {options.effective_bits:g} bits of its own count", notes)
  if options.tables:
    facts = manifest.manifest(cli.command(MODULE, options), options=dataclasses.asdict(options), inputs=inputs.facts)
    manifest.write_json(Path(options.tables) / "auto_quantize.json", json.loads(json.dumps({**facts, "rows": rows})))
    manifest.write_csv(Path(options.tables) / "auto_quantize.csv", rows)
    manifest.write_text(Path(options.tables) / "auto_quantize.md", report.markdown(rows, COLUMNS))
  return 0 if not missed and len(rows) == 1 + len(options.backends) else 1


if __name__ == "__main__":
  cli.main(Options, main)
