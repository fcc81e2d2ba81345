"""GPTQ as an algorithm of a configuration, with the choices that make it good at 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.calibrate.gptq import factor, gptq
from core.calibrate.host import PREPARED, QUANTIZED
from core.calibrate.layer import Change, Layer
from core.calibrate.registry import register_algorithm

SEARCHES = (None, False, True, "hessian", "signed")


def _statistics(options: Mapping[str, Any]) -> tuple[str, ...]:
  return ("hessian", "cross") if options.get("correction") else ("hessian",)


def _point(options: Mapping[str, Any]) -> str:
  return PREPARED if options.get("quantized_inputs") is False else QUANTIZED


@register_algorithm("gptq", _statistics, grouped=True, point=_point, also=("fused",))
def gptq_layers(
  layers: Sequence[Layer],
  *,
  perc_damp: float = 0.01,
  block_size: int = 128,
  act_order: bool = False,
  scale_search: str | bool | None = None,
  correction: float = 0.0,
  ridge: float = 0.1,
  quantized_inputs: bool = True,
) -> list[Change | None]:
  """GPTQ (`core.calibrate.gptq`).

  Args:
    layers: layers that read one input; they share one factorisation.
    perc_damp: damping, as a share of the Hessian's mean diagonal.
    block_size: columns between two matmuls; it changes the speed, not the result (but for rounding).
    act_order: columns of the largest inputs first.
    scale_search: "hessian": amax of every group by the output error of its own columns; "signed": negative scales too where the format
      allows them, so that all codes are used; None: as calibrated.
    correction: with layerwise calibration: how far the weight is moved towards what makes up for the inputs' errors, 0 to 1 (.5 does well).
    ridge: of the correction, as a share of the mean diagonal.
    quantized_inputs: take the Hessian of the inputs after their quantizers.

  Raises:
    ValueError: an option that is not allowed.

  References: Frantar et al., 2022, arXiv:2210.17323; Li et al., 2025, arXiv:2504.02692 (the correction).
  """
  if scale_search not in SEARCHES:
    raise ValueError(f"gptq scale_search is {scale_search!r}; allowed are {', '.join(map(repr, SEARCHES))}")
  seen = layers[0].statistics
  factored = factor(seen["hessian"], perc_damp, act_order)
  changes: list[Change | None] = []
  hessian, cross = np.asarray(seen["hessian"]), seen.get("cross")
  strength = correction if cross is not None else 0.0
  for layer in layers:
    found = gptq(
      layer.weight,
      hessian,
      layer.spec,
      amax=None if strength and not layer.spec.two_level else layer.amax,
      tensor_amax=layer.tensor_amax,
      block=block_size,
      scale_search=bool(scale_search),
      signed=scale_search == "signed",
      cross=cross,
      correction=strength,
      ridge=ridge,
      factored=factored,
    )
    changes.append(Change(weight=found.weight, amax=found.amax, tensor_amax=found.tensor_amax, report=found.report))
  return changes
