"""SmolLM2 as transformers reads it, in the five formats of issue 6: run with `-m slow -s` to see the figures."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import export as core_export
from core.config import PRESETS
from experiments import evaluate, setup
from experiments.export import figures
from experiments.models import folders
from tests.export import clients
from tests.export.quantized import exported

FORMATS = {  # most bits per quantized weight, scales included
  "INT8_DEFAULT_CFG": 8.06,
  "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": 4.51,
  "FP8_DEFAULT_CFG": 8.01,
  "NVFP4_DEFAULT_CFG": 4.51,
  "MXFP4_DEFAULT_CFG": 4.26,
}
IDS = np.random.default_rng(0).integers(0, 49152, (1, 64)).astype(np.int32)


def set_weights(model: Any, artefact: core_export.Artefact) -> None:
  import torch

  for layer in artefact.layers:
    weight = torch.from_numpy(clients.through_bfloat16(artefact.stored(layer)))
    model.get_submodule(layer).weight.data.copy_(weight)


def config_of(name: str) -> dict[str, Any]:
  """576 and 1536 inputs are no multiples of 128."""
  config = PRESETS[name].copy()
  if name == "INT4_BLOCKWISE_WEIGHT_ONLY_CFG":
    config["quant_cfg"]["*weight_quantizer"]["block_sizes"] = {-1: 64, "type": "static"}
  return config


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("name", FORMATS)
def test_smollm2(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
  model = setup.load("torch", "smollm2")
  float_bytes = model.nbytes()
  made = model.quantize(config_of(name), [IDS])
  del model
  gc.collect()
  with evaluate.Meter() as meter:
    before = meter.peak_mib
    artefact = exported(made, tmp_path / "out", "compressed-tensors", folders.find("smollm2"))
  peak = None if before is None or meter.peak_mib is None else 1 + (meter.peak_mib - before) * 2**20 / float_bytes
  size = figures(tmp_path / "out")
  full = made(IDS)
  as_client, flips = clients.divided_inputs(made.model, IDS) if name.startswith("INT8") else (full, 0)
  alone = clients.logits(clients.weights_alone(made.model), IDS)
  del made
  gc.collect()
  dense = clients.difference(clients.logits(clients.load(tmp_path / "out", dequantize=True), IDS), alone)
  lazy = flipped = None
  if not name.startswith(("NVFP4", "MXFP4")):  # which transformers runs lazily in bfloat16 only
    lazy = clients.logits(clients.load(tmp_path / "out", dequantize=False), IDS)
    flipped = clients.difference(lazy, full)
    lazy = clients.difference(lazy, as_client)
  own = None
  if name.startswith("NVFP4"):
    client = setup.load("torch", "smollm2").model
    set_weights(client, artefact)
    own = clients.difference(clients.logits(clients.load(tmp_path / "out", dequantize=True), IDS), clients.logits(client, IDS))
  bits = size["bits_per_quantized_weight"]
  with capsys.disabled():
    print(
      f"\n{name}: largest logit {np.abs(full).max():.3f}; dequantize=True {dense:.3g}; lazy {lazy} with the client's division, "
      f"{flipped} without ({flips} codes flip); through bfloat16 {own}; {size['bytes_on_disk']} bytes, {bits:.3f} bits, "
      f"export peak {peak} of the model, {meter.seconds:.1f} s"
    )
  assert bits <= FORMATS[name]
  assert peak is None or peak < 1.5
  if own is None:
    assert dense == 0.0 and lazy in (None, 0.0)
  else:
    assert own == 0.0 and dense > 0.0
