"""A small Llama on the disk whose sizes every layout takes, and its models in both frameworks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments import tiny

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.llama_folder(tmp_path_factory.mktemp("llama") / "model", **SIZES)


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The head is the table of embeddings."""
  return tiny.llama_folder(tmp_path_factory.mktemp("tied") / "model", **SIZES, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """With a byte-level BPE tokenizer, which GGUF files can hold."""
  from tests.export.gguf_cases import bpe_tokenizer, smollm

  folder = tiny.llama_folder(tmp_path_factory.mktemp("bpe") / "model", **SIZES, rope_theta=50000.0, rms_norm_eps=2e-5)
  bpe_tokenizer(folder, smollm())
  return folder
