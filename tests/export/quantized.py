"""Quantized small models for the export tests."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core import export as core_export
from core.config import PRESETS, ConfigWarning
from experiments import setup
from tests.experiments import tiny

OFF: dict[str, Any] = {"enable": False}
IDS = tiny.tokens(2, 12)


def config(weights: Any, inputs: Any = None) -> dict[str, Any]:
  """All linear layers but the head."""
  rules = {"default": OFF, "*weight_quantizer": weights} | ({"*input_quantizer": inputs} if inputs else {})
  return {"quant_cfg": {**rules, "*lm_head*": OFF, "nn.Embedding": {"*": OFF}}, "algorithm": "max"}


INT8_DYNAMIC = config({"num_bits": 8, "axis": 0}, {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}})
INT4_ASYMMETRIC = config({"num_bits": 4, "block_sizes": {-1: 32}, "zero_point": True})
INT8_TENSOR = config({"num_bits": 8})
FP8_GROUPS = config({"num_bits": (4, 3), "block_sizes": {-1: 32}}, {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: 32}})
MXFP6_E2M3 = config({"format": "mxfp6_e2m3"})
INT4_FLOAT16 = config({"num_bits": 4, "block_sizes": {-1: 32, "scale_bits": (5, 10)}})
_FP8 = {"num_bits": (4, 3), "axis": None}
MXFP4_FP8 = config({"format": "mxfp4"}, _FP8)
NVFP4_FP8 = config({"format": "nvfp4"}, _FP8)
MIXED = config({"num_bits": 8, "axis": 0}) | {}
MIXED["quant_cfg"] = {**MIXED["quant_cfg"], "*mlp*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 64}}, "*o_proj*": OFF}
OWN = {
  "INT8_DYNAMIC": INT8_DYNAMIC, "INT4_ASYMMETRIC": INT4_ASYMMETRIC, "INT8_TENSOR": INT8_TENSOR, "FP8_GROUPS": FP8_GROUPS,
  "MXFP6_E2M3": MXFP6_E2M3, "INT4_FLOAT16": INT4_FLOAT16, "MIXED": MIXED, "MXFP4_FP8": MXFP4_FP8, "NVFP4_FP8": NVFP4_FP8,
}  # fmt: skip


@functools.cache
def model(backend: str, folder: Path, dtype: str = "float32") -> Any:
  return setup.load(backend, str(folder), dtype)


def quantized(backend: str, folder: Path, name: str, dtype: str = "float32", group_rules: Any = None) -> Any:
  """A preset, or one of `OWN`, on the small Llama."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    return model(backend, folder, dtype).quantize(OWN.get(name) or PRESETS[name], [IDS], group_rules)


def exported(made: Any, directory: Path, layout: str, source: Path, **options: Any) -> core_export.Artefact:
  """The model as a folder, opened again."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    made.export(directory, layout=layout, source=source, **options)
  return core_export.read(directory)


def simulated(made: Any) -> Iterator[tuple[str, np.ndarray]]:
  """(layer, the weight that the model computes with); a torch bfloat16 weight comes as ml_dtypes' bfloat16."""
  for weight in made.weights():
    after = weight.after
    if made.backend == "torch":
      after = _numpy(after)
    yield weight.name.removesuffix(".weight_quantizer"), np.asarray(after)


def _numpy(tensor: Any) -> np.ndarray:
  import ml_dtypes
  import torch

  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.contiguous().numpy()


def compared(made: Any, artefact: core_export.Artefact) -> int:
  """Number of weights whose exported value is bit for bit the simulated one; all of them must be."""
  count = 0
  layers = []
  for layer, wanted in simulated(made):
    got = artefact.stored(layer).values(np.zeros((), wanted.dtype))
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert got.tobytes() == wanted.tobytes(), f"{layer}: {int(np.sum(got != wanted))} of {got.size} weights differ"
    layers.append(layer)
    count += got.size
  assert sorted(layers) == sorted(artefact.layers)
  return count
