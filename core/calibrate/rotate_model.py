"""Which parameters of a model a rotation of the residual stream touches, and turning them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from core.calibrate import relations
from core.calibrate.host import Host
from core.calibrate.relations import LINEARS, Relation
from core.calibrate.rotation import Rotation, rotation

WRITERS = ("embed_tokens", "self_attn.o_proj", "mlp.down_proj")


@dataclasses.dataclass(frozen=True)
class RotatedModel:
  """A model whose residual stream can be turned.

  Attributes:
    host: the model.
    norms: every norm of the stream with its readers.
    writers: layers that write into the stream.
    heads: pairs of layers between which the values of heads are turned, or ().
    width: K of the stream.
    head_dim: head size, or None.
  """

  host: Host
  norms: tuple[Relation, ...]
  writers: tuple[str, ...]
  heads: tuple[Relation, ...]
  width: int
  head_dim: int | None

  @classmethod
  def find(cls, host: Host, rules: Sequence[str], writers: Sequence[str], heads: bool, head_dim: int | None) -> RotatedModel:
    """Find what the rules name, and check that nothing else has to do with the stream.

    Raises:
      ValueError: see `core.calibrate.builtin_relations.rotate`.
    """
    norms = tuple(relations.find(host, rules))
    if not norms:
      raise ValueError(f"rotate finds none of the norms in relations={list(rules)}; give the model's own, 'norm -> part.(reader|reader)'")
    pairs = tuple(relations.find(host, LINEARS[:1])) if heads else ()
    if heads and not (pairs and head_dim):
      raise ValueError(
        f"rotate with heads=True needs v_proj, o_proj and the head size, and found {len(pairs)} pairs and head_dim {head_dim}"
      )
    width = host.parameter_shapes()[f"{norms[0].source}.weight"][0]
    model = cls(host, norms, tuple(relations.matching(host.weighted(), writers)), pairs, width, head_dim)
    model._check()
    return model

  def _check(self) -> None:
    for norm in self.norms:
      kind = self.host.norm(norm.source)
      if kind != "rms" or f"{norm.source}.bias" in self.host.parameter_shapes():
        what = {"layer": "it subtracts the mean (LayerNorm)", "other": "it is no plain RMSNorm", "rms": "it has a bias"}[kind]
        raise ValueError(f"rotate cannot turn the stream through the norm {norm.source!r}: {what}; only RMSNorm commutes with a rotation")
    self._check_scales()
    layers = {*self._readers(), *self.writers}
    known = {f"{norm.source}.weight" for norm in self.norms} | {f"{name}.{p}" for name in layers for p in ("weight", "bias")}
    missed = [name for name, shape in self.host.parameter_shapes().items() if self.width in shape and name not in known]
    if missed:
      raise ValueError(
        f"rotate does not know what parameters of the stream's width {self.width} do: {', '.join(missed[:8])}; name the norms and all "
        "their readers in relations, and the layers that write into the stream in writers"
      )

  def _check_scales(self) -> None:
    for name in {**dict.fromkeys(self._readers()), **dict.fromkeys(self.writers), **dict.fromkeys(p.source for p in self.heads)}:
      if self.host.low_rank(name) is not None or self.host.pre_quant_scale(name) is not None:
        raise ValueError(f"layer {name!r} has a pre_quant_scale or a low-rank branch already; put rotate before the algorithm that gave it")

  def _readers(self) -> list[str]:
    return [reader for norm in self.norms for reader in norm.readers]

  def moved(self) -> set[str]:
    """Layers whose output is another one afterwards."""
    return {*self.writers, *(pair.source for pair in self.heads)}

  def carry_out(self, turn: Rotation, kind: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Turn everything; each parameter is computed in float64 and rounded once.

    Yields:
      (layer, figures): the crest of its weight's rows (largest magnitude over root mean square, mean over rows) before and after.
    """
    new: dict[str, np.ndarray] = {}
    for norm in self.norms:
      gain = self._get(f"{norm.source}.weight")
      for reader in norm.readers:
        new[f"{reader}.weight"] = turn.inputs(self._get(f"{reader}.weight"), gain)
      new[f"{norm.source}.weight"] = np.ones_like(gain)
    for name in self.writers:
      weight = self._get(f"{name}.weight")
      new[f"{name}.weight"] = turn(weight) if self.host.is_table(name) else turn.outputs(weight)
      if f"{name}.bias" in self.host.parameter_shapes():
        new[f"{name}.bias"] = turn(self._get(f"{name}.bias"))
    self._turn_heads(new, kind, seed)
    for name, value in new.items():
      before = self._get(name)
      self.host.set_parameter(name, value.astype(before.dtype))
      if value.ndim == 2:
        yield name.removesuffix(".weight"), {"crest_before": _crest(before), "crest": _crest(value)}

  def _turn_heads(self, new: dict[str, np.ndarray], kind: str, seed: int) -> None:
    """Rows of v_proj and columns of o_proj, head by head, all with one rotation of the head size."""
    for pair in self.heads:
      size, reader = int(self.head_dim or 0), pair.readers[0]
      block = rotation(size, kind, None, seed + 1)
      for name in (f"{pair.source}.weight", f"{pair.source}.bias"):
        held = new[name] if name in new else self.host.parameter(name)
        if held is not None:
          new[name] = block(held.T.reshape(-1, size)).reshape(held.T.shape).T
      weight = new[f"{reader}.weight"]
      new[f"{reader}.weight"] = block(weight.reshape(-1, size)).reshape(weight.shape)

  def _get(self, name: str) -> np.ndarray:
    held = self.host.parameter(name)
    assert held is not None
    return held


def _crest(weight: np.ndarray) -> float:
  rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1))
  return float(np.mean(np.abs(weight).max(axis=1) / np.where(rms > 0, rms, 1)))
