"""A small Llama on the disk whose sizes every layout takes, and its models in both frameworks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments import tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
  sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
  return tiny.llama_folder(tmp_path_factory.mktemp("llama") / "model", **sizes)
