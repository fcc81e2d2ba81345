"""Algorithms that need to know which layer reads what: scales into the layer before, equalization, rotation of the residual stream.

All three leave the function of the float model as it is; `verify` checks that on the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.calibrate import fold_scales, relations, rotation
from core.calibrate.driver import Run
from core.calibrate.equalize import equalizing_scale
from core.calibrate.host import Host
from core.calibrate.layer import Change
from core.calibrate.registry import register_algorithm
from core.calibrate.relations import HEAD, LINEARS, NORMS, Relation
from core.calibrate.rotate_model import WRITERS, RotatedModel
from core.calibrate.unchanged import Witness


@register_algorithm("fold_pre_quant_scale", whole=True)
def fold_pre_quant_scale(
  host: Host, run: Run, *, relations: Sequence[str] = (*NORMS, *HEAD, *LINEARS), head_dim: int | None = None, verify: bool = True
) -> None:
  """pre_quant_scale of SmoothQuant, AWQ or SVDQuant moves into the norm or layer before: ["smoothquant", "fold_pre_quant_scale"].

  Layers that read one input must have one scale: AWQ and SVDQuant need `shared=True`.

  Scales that cannot move stay and are reported. A layer that takes a scale is max-calibrated again, so put it before gptq and before
  searches of a weight's amax.

  Args:
    host: the model.
    run: this run of the algorithm.
    relations: rules of who reads what (`core.calibrate.relations`).
    head_dim: head size; None takes it from the model's config.
    verify: check on the calibration data that the layers' outputs stay.

  References: `core.calibrate.fold_scales`.
  """
  matches = _find(host, relations)
  witness = Witness(host, {match.source for match in matches}, verify)
  for match in matches:
    figures = fold_scales.fold(host, match, head_dim or host.head_dim())
    if figures is not None:
      run.note(match.source, Change(report=figures))
  witness.check()


@register_algorithm("cross_layer_equalization", whole=True)
def cross_layer_equalization(
  host: Host, run: Run, *, relations: Sequence[str] = LINEARS, head_dim: int | None = None, verify: bool = True
) -> None:
  """Two layers in a row share out their ranges, channel by channel (`core.calibrate.equalize`); their amax are max again.

  Heads that repeat one head of the source count together: r2 is the largest of them.

  Args:
    host: the model.
    run: this run of the algorithm.
    relations: rules of pairs with nothing in between but what passes a positive factor on: nothing, ReLU, attention, a gated product.
    head_dim: head size; None takes it from the model's config.
    verify: check on the calibration data that the layers' outputs stay.

  Raises:
    ValueError: a rule whose source is no layer or that has several readers.

  References: Nagel et al., 2019, arXiv:1906.04721, section 4.1.
  """
  matches = _find(host, relations)
  witness = Witness(host, {match.source for match in matches}, verify)
  changed = []
  for match in matches:
    figures = _equalize(host, match, head_dim or host.head_dim())
    changed += [] if "kept" in figures else match.readers
    run.note(match.source, Change(report=figures))
  witness.check()
  host.recalibrate([f"{name}.input_quantizer" for name in changed])


def _find(host: Host, rules: Sequence[str]) -> list[Relation]:
  return relations.find(host, rules)


def _equalize(host: Host, match: Relation, head_dim: int | None) -> dict[str, Any]:
  if len(match.readers) != 1 or match.source not in host.weighted():
    raise ValueError(
      f"cross_layer_equalization takes relations of one layer with one layer, got {match.source} -> {', '.join(match.readers)}"
    )
  source, reader = match.source, next(iter(match.readers))
  seen = relations.sees_output(host, source)
  if seen or any(host.low_rank(name) is not None for name in (source, reader)):
    return {"kept": f"ranges ({seen + ' quantizes the output' if seen else 'a low-rank branch'})"}
  w1, b1, w2 = (host.parameter(name) for name in (f"{source}.weight", f"{source}.bias", f"{reader}.weight"))
  assert w1 is not None and w2 is not None
  columns = relations.by_source(np.moveaxis(w2, 1, -1), len(w1), head_dim)  # [N2, ..., R, N1]
  scale = equalizing_scale(w1, columns.reshape(-1, len(w1))).astype(np.float64)
  host.set_parameter(f"{source}.weight", (w1 / scale.reshape(-1, *[1] * (w1.ndim - 1))).astype(w1.dtype))
  if b1 is not None:
    host.set_parameter(f"{source}.bias", (b1 / scale).astype(b1.dtype))
  wide = relations.by_reader(scale, w2.shape[1], head_dim)
  host.set_parameter(f"{reader}.weight", (w2 * wide.reshape(1, -1, *[1] * (w2.ndim - 2))).astype(w2.dtype))
  return {"reader": reader, "scale_min": float(scale.min()), "scale_max": float(scale.max())}


@register_algorithm("rotate", whole=True)
def rotate(
  host: Host,
  run: Run,
  *,
  seed: int = 0,
  kind: str = "hadamard",
  block_size: int | None = None,
  heads: bool = False,
  head_dim: int | None = None,
  relations: Sequence[str] = (*NORMS, *HEAD),
  writers: Sequence[str] = WRITERS,
  verify: bool = True,
) -> None:
  """The residual stream turned by a random rotation that is folded into the weights; put it first in the list (`core.calibrate.rotation`).

  Tied embeddings become two parameters: the last norm is folded into the head alone.

  Args:
    host: the model.
    run: this run of the algorithm.
    seed: of the rotation.
    kind: "hadamard" (random signs, then Hadamard blocks) or "orthogonal".
    block_size: None is the largest power of two that divides the width; for "orthogonal" the width.
    heads: turn the values of every head as well (SpinQuant's R2), between v_proj and o_proj.
    head_dim: head size; None takes it from the model's config.
    relations: rules norm -> readers of the residual stream, all of them.
    writers: names of the layers that write into it, embeddings included, all of them.
    verify: check on the calibration data that the layers' outputs stay.

  Raises:
    ValueError: a norm that is no RMSNorm, a parameter of the stream's width that no rule names, or a model that was scaled before.

  References: Ashkboos et al., 2024, arXiv:2404.00456; Liu et al., 2024, arXiv:2405.16406.
  """
  model = RotatedModel.find(host, relations, writers, heads, head_dim or host.head_dim())
  turn = rotation.rotation(model.width, kind, block_size, seed)
  witness = Witness(host, model.moved(), verify)
  for name, figures in model.carry_out(turn, kind, seed):
    run.note(name, Change(report=figures))
  witness.check()
  host.recalibrate(list(host.activation_specs()))
