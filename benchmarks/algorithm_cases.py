"""Configurations of the benchmark of calibration algorithms: data that ModelOpt and twinquant read alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

INT4 = {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}
INT8_WEIGHT = {"num_bits": 8, "axis": 0}
INT8_INPUT = {"num_bits": 8, "axis": None}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}

# What the presets leave in float and a Llama has: the output layer and the embedding.
_OFF = ({"quantizer_name": "*lm_head*", "enable": False}, {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False})


@dataclasses.dataclass(frozen=True)
class Case:
  """One configuration.

  Attributes:
    name: in tables and file names.
    algorithm: a method with its options, or a list of those.
    weight: attributes of every linear layer's weight quantizer.
    input: attributes of the input quantizers; None leaves inputs in float.
    peer: ModelOpt can run it.
    rival: of our own configurations: the ModelOpt run that it is held against; "" takes the best of all four-bit integer runs.
    added_limit: largest allowed ratio of added NLL to the rival's on the first text; on the second it must be below 1.
    kl_limit: the same for KL.
    cpu_limit: CPU seconds of calibration allowed, or None.
  """

  name: str
  algorithm: Any
  weight: dict[str, Any]
  input: dict[str, Any] | None = None
  peer: bool = True
  rival: str = ""
  added_limit: float = 1.0
  kl_limit: float = 1.0
  cpu_limit: float | None = None

  @property
  def nvfp4(self) -> bool:
    """ModelOpt's run takes its arithmetic from `benchmarks.modelopt_cpu`."""
    return NVFP4 in (self.weight, self.input)

  @property
  def int4(self) -> bool:
    """Four-bit integer weights and nothing else."""
    return self.weight == INT4 and self.input is None

  def config(self) -> dict[str, Any]:
    """In the list form; new objects on every call, since ModelOpt writes into what it gets."""
    entries: list[dict[str, Any]] = [
      {"quantizer_name": "*", "enable": False},
      {"quantizer_name": "*weight_quantizer", "cfg": dict(self.weight)},
    ]
    if self.input is not None:
      entries.append({"quantizer_name": "*input_quantizer", "cfg": dict(self.input)})
    return {"quant_cfg": [*entries, *map(dict, _OFF)], "algorithm": self.algorithm}


# Cheap ones first.
CASES = (
  Case("int4-max", {"method": "max"}, INT4),
  Case("int4-mse", {"method": "mse"}, INT4),
  Case("int8-mse", {"method": "mse"}, INT8_WEIGHT),
  Case("int4-local_hessian", {"method": "local_hessian", "fp8_scale_sweep": False, "block_size": 64}, INT4),
  Case("nvfp4-max", {"method": "max"}, NVFP4, NVFP4),
  Case("nvfp4-svdquant", {"method": "svdquant", "lowrank": 32}, NVFP4, NVFP4),
  Case("int4-awq_lite", {"method": "awq_lite", "alpha_step": 0.1}, INT4),
  Case("int4-gptq", {"method": "gptq"}, INT4),
  Case("int4-awq_clip", {"method": "awq_clip"}, INT4),
  Case("int8-smoothquant", {"method": "smoothquant"}, INT8_WEIGHT, INT8_INPUT),
  Case("int8-max", {"method": "max"}, INT8_WEIGHT, INT8_INPUT),
  Case("nvfp4-awq_lite", {"method": "awq_lite", "alpha_step": 0.1}, NVFP4, NVFP4),
)

_GPTQ = {
  "method": "gptq",
  "act_order": True,
  "scale_search": "signed",
  "layerwise": True,
  "true_sequential": True,
  "correction": 0.5,
  "perc_damp": 0.03,
}
_NVFP4_GPTQ = {"method": "gptq", "act_order": True, "layerwise": True, "true_sequential": True}
_SVDQUANT = {"method": "svdquant", "lowrank": 32}
NVFP4_FOUR_OVER_SIX = {"num_bits": (2, 1), "block_sizes": {**NVFP4["block_sizes"], "four_over_six": True}}

# Our own four-bit configurations: what is stored has as many bits as the rival's.
OWN: tuple[Case, ...] = (
  Case("int4-gptq_blockwise", [{**_GPTQ, "true_sequential": False, "perc_damp": 0.01}], INT4, peer=False, added_limit=0.5, kl_limit=0.5),
  Case("int4-gptq_corrected", [_GPTQ], INT4, peer=False, added_limit=0.5, kl_limit=0.5, cpu_limit=250),
  Case(
    "int4-gptq_distilled",
    [_GPTQ, {"method": "distill", "epochs": 3, "parts": ["scales", "norms"]}],
    INT4,
    peer=False,
    added_limit=1 / 3,
    kl_limit=1 / 3,
    cpu_limit=900,
  ),
  Case("nvfp4-svdquant_gptq", [_SVDQUANT, _NVFP4_GPTQ], NVFP4, NVFP4, peer=False, rival="nvfp4-svdquant"),
  Case(
    "nvfp4-svdquant_gptq_distilled",
    [_SVDQUANT, _NVFP4_GPTQ, {"method": "distill", "epochs": 2, "parts": ["norms", "low_rank"], "norm_lr": 3e-4}],
    NVFP4,
    NVFP4_FOUR_OVER_SIX,
    peer=False,
    rival="nvfp4-svdquant",
    added_limit=0.65,
    kl_limit=0.87,
  ),
)


def choose(names: Iterable[str]) -> list[Case]:
  """Cases by name.

  Raises:
    ValueError: an unknown name.
  """
  known = {case.name: case for case in (*CASES, *OWN)}
  for name in names:
    if name not in known:
      raise ValueError(f"algorithm run {name!r} is unknown; allowed are {', '.join(known)}")
  return [known[name] for name in names]
