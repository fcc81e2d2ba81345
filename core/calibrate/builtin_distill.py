"""End-to-end tuning as an algorithm of a configuration; it follows the one that found the codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.calibrate.distill import tune
from core.calibrate.host import Host
from core.calibrate.layer import Change
from core.calibrate.progress import progress
from core.calibrate.registry import register_algorithm


@register_algorithm("distill", whole=True, teacher=True)
def distill(
  host: Host,
  run: Any,
  *,
  parts: Sequence[str] = ("scales", "norms", "low_rank"),
  epochs: int = 4,
  scale_lr: float = 1e-3,
  norm_lr: float = 1e-3,
  low_rank_lr: float = 5e-4,
  rounding_lr: float = 1e-3,
  loss: str = "kl",
  seed: int = 0,
) -> None:
  """Tune scales, norms and low-rank factors so that the model returns what the float model did (`core.calibrate.distill.tune`).

  In a list it comes last: `["gptq", "distill"]`. The float model's outputs are recorded before the first algorithm of the list runs.
  Scales move where they are free numbers: static symmetric formats with a float32 scale.

  Args:
    host: the model, given by the driver.
    run: the run, given by the driver.
    parts: what moves: "scales", "norms", "low_rank", "rounding".
    epochs: passes over the calibration data.
    scale_lr: largest relative change of a scale in a step.
    norm_lr: the same of a norm's weight.
    low_rank_lr: largest change of a low-rank factor in a step, over its root mean square.
    rounding_lr: largest change of a weight's position between two levels in a step, with "rounding" among the parts.
    loss: "kl" of logits, "mse" of hidden states.
    seed: of the order of the batches.

  References: Hinton et al., 2015, arXiv:1503.02531; as quantization-aware distillation: arXiv:2601.20088; tuning of norms: Li et al.,
  2023, arXiv:2309.02784.
  """
  student = host.student()
  layers = [layer for name in host.layers() if (layer := host.layer(name)).specs]
  latents = host.float_weights() if "rounding" in parts else None
  with progress(epochs * student.batches(), "distill") as tell:
    changes, losses = tune(
      student,
      layers,
      parts=tuple(parts),
      epochs=epochs,
      scale_lr=scale_lr,
      norm_lr=norm_lr,
      low_rank_lr=low_rank_lr,
      rounding_lr=rounding_lr,
      latents=latents,
      loss=loss,
      seed=seed,
      tell=tell,
    )
  for name, change in changes.items():
    host.apply(name, change)
  run.note("model", Change(report={"loss_by_epoch": losses, "error_before": losses[0], "error": losses[-1]} if losses else {}))
