"""SmolLM2 exported and verified: run with `-m slow -s` to see the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.verify.outputs import apart
from experiments import export, verify


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG"])
def test_smollm2(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
  export.run(export.Options(config=name, out=str(tmp_path / "out")))
  options = verify.Options(artefact=str(tmp_path / "out"), config=name, clients=("numpy", "transformers"))
  report = verify.run(options)
  with capsys.disabled():
    print(f"\n{name}\n{report}")
  assert report.passed


@pytest.mark.slow
@pytest.mark.models
def test_roundings_move_log_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
  """Why outputs of a model with quantized inputs cannot be judged by a tolerance alone: it is no further from a client than from itself."""
  import torch

  quantized, text = verify._reference(verify.Options(artefact="unused", config="INT8_DEFAULT_CFG"))
  ids = text.cut("evaluation", 1, 64)
  before = quantized(ids)
  torch.manual_seed(0)
  with torch.no_grad():
    table = quantized.model.model.embed_tokens.weight
    table.mul_(1 + 1e-6 * torch.randn_like(table))
  after = quantized(ids)
  with capsys.disabled():
    moved, middle = apart(before, after), float(np.median(np.abs(before - after)))
    print(f"\nembeddings times 1 + 1e-6 noise: log-probabilities move by up to {moved:.3g}, logits by {middle:.2g} in the median")
  assert apart(before, after) > 0.01
