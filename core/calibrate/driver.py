"""Running an algorithm over a model: statistics, one function per layer or per group of layers with one input, changes.

Two ways through a model. In one sweep: the forward loop runs once in float and every layer's statistics are held together. Layerwise: the
model's blocks one after the other, each on what the already quantized blocks before it return, with one block's statistics in memory.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from core.calibrate.collector import Collector, Group
from core.calibrate.host import QUANTIZED, Block, Host, Visit
from core.calibrate.layer import Change
from core.calibrate.progress import progress
from core.calibrate.registry import Algorithm
from core.calibrate.resume import Journal
from core.config import ConfigWarning, matches_name

Report = list[dict[str, Any]]
_COPY = re.compile(r"\[[\d,]+\]$")
NO_TOKENS = "no tokens"


@dataclasses.dataclass(frozen=True)
class Layerwise:
  """How blocks are calibrated one after the other.

  Attributes:
    enable: go block by block.
    quantized_prefix: a block's inputs come through the already quantized blocks; otherwise through the float ones.
    checkpoint_dir: folder for what is finished, so that an interrupted run goes on; "" keeps nothing.
  """

  enable: bool = False
  quantized_prefix: bool = True
  checkpoint_dir: str = ""

  @classmethod
  def read(cls, value: Any) -> Layerwise:
    """Reads True, False or ModelOpt's mapping {"enable", "get_qdq_activations_from_prev_layer", "checkpoint_dir", ...}.

    Raises:
      ValueError: another type or an unknown key.
    """
    if value is None or isinstance(value, bool):
      return cls(bool(value))
    allowed = ("enable", "get_qdq_activations_from_prev_layer", "checkpoint_dir", "save_every", "calib_mutates_weights")
    if not isinstance(value, Mapping) or set(value) - set(allowed):
      raise ValueError(f"layerwise is {value!r}; allowed are True, False, and a mapping of {', '.join(allowed)}")
    prefix = value.get("get_qdq_activations_from_prev_layer", True)
    return cls(bool(value.get("enable", True)), bool(prefix), str(value.get("checkpoint_dir") or ""))


@dataclasses.dataclass
class Run:
  """One algorithm on one model.

  Attributes:
    algorithm, options: what runs.
    report: one dict per layer, filled while it runs.
    layerwise: block by block or in one sweep.
    true_sequential: within a block, layers that come later see the quantized ones before them.
    exclude_padding: padding is left out of the statistics (by the host).
    include: patterns of the layers that it runs on; None for all. The others keep what they have, or get max calibration.
  """

  algorithm: Algorithm
  options: dict[str, Any]
  report: Report
  layerwise: Layerwise
  true_sequential: bool = False
  exclude_padding: bool = False
  include: tuple[str, ...] | None = None

  def __post_init__(self) -> None:
    self.start = len(self.report)

  def includes(self, name: str) -> bool:
    """Whether a layer, by its name or by that of one of its quantizers, is among those that the algorithm runs on.

    A stacked copy ("mlp.up_proj[1]") goes with its layer.
    """
    if self.include is None:
      return True
    layer = _COPY.sub("", name.rpartition(".")[0] if name.endswith("_quantizer") else name)
    return any(matches_name(pattern, layer) for pattern in self.include)

  def note(self, name: str, change: Change | None, reason: str = "") -> None:
    """One line of the report."""
    row = {"layer": name, "method": self.algorithm.name, **(change.report if change is not None else {})}
    self.report.append({**row, "kept": reason} if reason else row)


def run(host: Host, algorithm: Algorithm, options: Mapping[str, Any], report: Report | None = None) -> None:
  """Run one algorithm.

  Args:
    host: the model.
    algorithm: from the registry.
    options: as a configuration gives them, common ones included (`layerwise`, `true_sequential`, `checkpoint_dir`, `include`).
    report: gets one dict per layer.

  Raises:
    ValueError: an option that is not allowed, calibration data that are not finite, files of another run, or `include` for an algorithm
      that changes several layers together.
  """
  own = {key: value for key, value in options.items() if key in algorithm.options}
  layerwise = Layerwise.read(options.get("layerwise"))
  if options.get("checkpoint_dir"):
    layerwise = dataclasses.replace(layerwise, checkpoint_dir=str(options["checkpoint_dir"]))
  sequential, unpadded = (bool(options.get(name, False)) for name in ("true_sequential", "exclude_padding"))
  include = options.get("include")
  if include is not None and algorithm.whole and not algorithm.includes:
    raise ValueError(f"algorithm {algorithm.name!r} changes layers together and cannot be limited to {include!r}; leave 'include' out")
  report = [] if report is None else report
  job = Run(algorithm, own, report, layerwise, sequential, unpadded, None if include is None else tuple(include))
  host.calibrate_missing(inputs=algorithm.calibrated_inputs or layerwise.enable or algorithm.observed_at(own) == QUANTIZED)
  if algorithm.whole:
    algorithm.function(host, job, **own)
  elif layerwise.enable:
    _by_blocks(host, job)
  else:
    _in_one_sweep(host, job)
  _warn_without_data(job)
  host.settle()
  host.calibrate_missing()


def _warn_without_data(job: Run) -> None:
  rows = job.report[job.start :]
  if rows and all("kept" in row for row in rows) and any(NO_TOKENS in row["kept"] for row in rows):
    warnings.warn(
      f"{job.algorithm.name} saw no calibration data, so all {len(rows)} layers keep max calibration: there is no forward_loop, or it did "
      "not run the model on data in its second pass (an iterator that is used up); it must give the same data each time it is called",
      ConfigWarning,
      stacklevel=5,
    )


def _targets(host: Host, job: Run) -> list[str]:
  names = [name for name in host.layers() if job.includes(name)]
  if job.algorithm.weights_only:
    names = [name for name in names if host.layer(name).specs]
  return names


def _journal(host: Host, job: Run) -> Journal:
  """The run's journal: its steps hold for these options, and for this way through the model."""
  way = {"layerwise": job.layerwise.enable, "quantized_prefix": job.layerwise.quantized_prefix, "true_sequential": job.true_sequential}
  options = {**job.options, **way, "exclude_padding": job.exclude_padding}
  if job.include is not None:
    options["include"] = job.include
  return Journal.open(job.layerwise.checkpoint_dir, host, job.algorithm.name, options)


def _in_one_sweep(host: Host, job: Run) -> None:
  names = _targets(host, job)
  journal = _journal(host, job)
  collector = Collector(job.algorithm.wanted(job.options))
  if job.algorithm.wanted(job.options):
    host.observe(collector, names, job.algorithm.observed_at(job.options))
  groups = collector.groups(names)
  with progress(len(groups), job.algorithm.name) as step:
    for group in groups:
      step(group[0])
      changes = journal.read(group)
      if changes is None:
        changes = decide(host, job, group, collector)
        journal.write(group, changes)
      _carry_out(host, job, group, changes)
  journal.finish()


def decide_each(host: Host, algorithm: Algorithm, options: Mapping[str, Any], job: Run) -> None:
  """Run another algorithm in one sweep on the same layers, from within one that drives the host itself.

  Raises:
    ValueError: an option that it does not know.
  """
  unknown = sorted(set(options) - set(algorithm.options))
  if unknown:
    raise ValueError(f"algorithm {algorithm.name!r} does not know {', '.join(unknown)}; its options are {', '.join(algorithm.options)}")
  _in_one_sweep(host, Run(algorithm, dict(options), job.report, Layerwise(), include=job.include))


def decide(host: Host, job: Run, group: Group, collector: Collector) -> list[Change | None]:
  """What the algorithm makes of layers that share an input."""
  layers = [dataclasses.replace(host.layer(name), statistics=collector.result(name)) for name in group]
  needs_data = bool(job.algorithm.wanted(job.options))
  if needs_data and not layers[0].tokens:
    why = NO_TOKENS if layers[0].linear else "its inputs are no feature vectors"
    return [Change(report={"kept": f"max calibration ({why})"}) for _ in layers]
  if job.algorithm.grouped:
    return list(job.algorithm.function(layers, **job.options))
  return [job.algorithm.function(layer, **job.options) for layer in layers]


def _carry_out(host: Host, job: Run, group: Group, changes: Sequence[Change | None]) -> None:
  for name, change in zip(group, changes, strict=True):
    if change is not None:
      host.apply(name, change)
    job.note(name, change)


def blocks_of(host: Host) -> list[Block]:
  """The model's blocks.

  Raises:
    ValueError: it has none.
  """
  blocks = list(host.blocks())
  if not blocks:
    raise ValueError(
      "layerwise calibration needs a chain of equal blocks (such as the decoder layers of a language model, as separate modules and not "
      "under nn.scan) and found none; set layerwise to False"
    )
  return blocks


def _by_blocks(host: Host, job: Run) -> None:
  blocks = blocks_of(host)
  targets = set(_targets(host, job))
  journal = _journal(host, job)
  streams = Streams(host, cross="cross" in job.algorithm.wanted(job.options))
  outside = [name for name in _targets(host, job) if not any(name in block.layers for block in blocks)]
  with progress(len(blocks), job.algorithm.name) as step:
    for block in blocks:
      step(block.name)
      names = [name for name in block.layers if name in targets]
      changes = journal.read((block.name, *names))
      streams.enter(block)
      if changes is None:
        changes = _calibrate_block(host, job, block, names, streams)
        journal.write((block.name, *names), [None, *changes])
      else:
        _carry_out(host, job, tuple(names), changes[1:])
      streams.leave(block, block.layers if job.layerwise.quantized_prefix else ())
  for name in outside:
    job.note(name, None, "max calibration (outside the blocks)")
  journal.finish()


class Streams:
  """Hidden states on their way through the blocks: those of the quantized model and, where it is asked for, those of the float model."""

  def __init__(self, host: Host, cross: bool) -> None:
    self.quantized = host.block_inputs()
    self._floating = list(self.quantized) if cross else None
    self._references: list[dict[str, np.ndarray]] = []

  def enter(self, block: Block) -> None:
    """Run the float model through the block and keep what its layers read, while the block's weights are still the float model's."""
    if self._floating is None:
      return
    self._references, after = [], []
    for i, hidden in enumerate(self._floating):
      kept: dict[str, np.ndarray] = {}
      after.append(block.run(i, hidden, visit=lambda group, x, kept=kept: kept.update(dict.fromkeys(group, x))))
      self._references.append(kept)
    self._floating = after

  def collect(self, block: Block, collector: Collector, names: Collection[str], done: Collection[str], point: str) -> None:
    """Show the inputs of these layers to the collector, batch by batch, beside those of the float model."""
    for i, hidden in enumerate(self.quantized):
      kept = self._references[i] if self._references else {}
      block.run(i, hidden, done, _only(names, lambda group, x, kept=kept: collector(group, x, kept.get(group[0]))), point)

  def leave(self, block: Block, quantized: Collection[str]) -> None:
    """On to the next block."""
    self.quantized = [block.run(i, hidden, quantized) for i, hidden in enumerate(self.quantized)]
    self._references = []


def _only(names: Collection[str], visit: Callable[[Group, np.ndarray], None]) -> Visit:
  def chosen(group: Group, x: np.ndarray) -> None:
    members = tuple(name for name in group if name in names)
    if members:
      visit(members, x)

  return chosen


def _calibrate_block(host: Host, job: Run, block: Block, names: list[str], streams: Streams) -> list[Change | None]:
  """Changes of a block's layers, in the order of `names`, carried out."""
  wanted, point = job.algorithm.wanted(job.options), job.algorithm.observed_at(job.options)
  found: dict[str, Change | None] = {}
  pending = list(names)
  while pending:
    collector = Collector(wanted)
    if wanted:
      streams.collect(block, collector, pending, [n for n in names if n in found], point)
    groups = collector.groups(pending)
    for group in groups[:1] if job.true_sequential else groups:
      changes = decide(host, job, group, collector)
      _carry_out(host, job, group, changes)
      found |= dict(zip(group, changes, strict=True))
    pending = [name for name in pending if name not in found]
  return [found[name] for name in names]
