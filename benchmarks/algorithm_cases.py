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
  """

  name: str
  algorithm: Any
  weight: dict[str, Any]
  input: dict[str, Any] | None = None
  peer: bool = True

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

# Our own four-bit configurations, held against ModelOpt's best four-bit integer run.
OWN: tuple[Case, ...] = ()


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
