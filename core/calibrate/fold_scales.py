"""pre_quant_scale moves into what computes the input: a norm's weight, or the rows of the layer before.

(p x) with x_j = g_j y_j is x' with g'_j = p_j g_j: the layer's input quantizer and its weight see the same numbers, and the multiplication
at run time is gone. Norms: weight and bias times p. Layers: rows of the weight, bias, and b of a low-rank branch times p.

Exact up to rounding: g p is rounded to the norm's type once (2^-24 in float32, 2^-8 in bfloat16), where (y g) p was rounded twice.
Under grouped-query attention p must be the same in all heads that repeat one head of the source; where it is not, it stays online.

References: Lin et al., 2023, arXiv:2306.00978 (AWQ, section 3.2, and its code's `scale_ln_fcs`, `scale_fc_fc`); Xiao et al., 2022,
arXiv:2211.10438 (SmoothQuant). AWQ's code shrinks the search to scales that can be folded; here whatever cannot be folded stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from core.calibrate import relations
from core.calibrate.host import Host
from core.calibrate.layer import Change
from core.calibrate.relations import Relation


def fold(host: Host, relation: Relation, head_dim: int | None = None) -> dict[str, Any] | None:
  """Fold the pre_quant_scale of a relation's readers into its source.

  A layer that takes a scale gets its weight amax anew, as max finds it: fold before its weight is final (before gptq and searches of amax).

  Args:
    host: the model, which is changed.
    relation: a place that `relations.find` returned.
    head_dim: head size, for repeated heads.

  Returns:
    Figures for the report, "kept" among them where the scale stays online; None where no reader has a scale.
  """
  scales = [host.pre_quant_scale(reader) for reader in relation.readers]
  if all(scale is None for scale in scales):
    return None
  first = scales[0]
  if first is None or any(scale is None or not np.array_equal(scale, first) for scale in scales):
    return {"kept": "pre_quant_scale (the readers do not share one)"}
  is_layer = relation.source in host.weighted()
  reason = _obstacle(host, relation, is_layer)
  if reason:
    return {"kept": f"pre_quant_scale ({reason})"}
  shapes = host.parameter_shapes()
  outputs, inputs = shapes[f"{relation.source}.weight"][0], shapes[f"{relation.readers[0]}.weight"][1]
  repeated = relations.by_source(np.broadcast_to(first, (inputs,)).astype(np.float64), outputs, head_dim)
  if (repeated != repeated[:1]).any():
    return {"kept": "pre_quant_scale (it differs among heads that repeat one head of the source)"}
  _scale_source(host, relation.source, repeated[0], is_layer)
  for reader in relation.readers:
    host.clear_pre_quant_scale(reader)
  figures = {"folded": ", ".join(relation.readers), "scale_min": float(first.min()), "scale_max": float(first.max())}
  return figures | ({"note": "amax of the weight is max again"} if is_layer and host.layer(relation.source).specs else {})


def _obstacle(host: Host, relation: Relation, is_layer: bool) -> str:
  seen = relations.sees_output(host, relation.source)
  if seen:
    return f"{seen} quantizes the output of the source"
  kind = "" if is_layer else host.norm(relation.source)
  return "the norm does not multiply with its weight" if kind == "other" else ""


def _scale_source(host: Host, source: str, scale: np.ndarray, is_layer: bool) -> None:
  for parameter in ("weight", "bias"):
    held = host.parameter(f"{source}.{parameter}")
    if held is not None:
      factor = scale.reshape(-1, *[1] * (held.ndim - 1))
      host.set_parameter(f"{source}.{parameter}", (held.astype(np.float64) * factor).astype(held.dtype))
  branch = host.low_rank(source) if is_layer else None
  if branch is not None:
    a, b = branch
    host.apply(source, Change(low_rank=(a, (b * scale[:, None]).astype(np.float32))))
