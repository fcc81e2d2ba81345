"""A small Llama on the disk, and exported folders and ONNX files of it, each made once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.experiments import tiny
from tests.export import quantized as q
from tests.export.conftest import SIZES

CT, MODELOPT = "compressed-tensors", "modelopt"
Made = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
  sizes: dict[str, Any] = dict(SIZES)
  return tiny.llama_folder(tmp_path_factory.mktemp("llama") / "model", **sizes)


@pytest.fixture(scope="session")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
  """(backend, preset, layout) -> (quantized model, exported folder)."""

  @functools.cache
  def make(backend: str, name: str, layout: str = CT) -> tuple[Any, Path]:
    made = q.quantized(backend, llama, name)
    out = tmp_path_factory.mktemp("out") / name
    q.exported(made, out, layout, llama)
    return made, out

  return make


@pytest.fixture(scope="session")
def graph(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
  """(backend, preset) -> (quantized model, ONNX file)."""

  @functools.cache
  def make(backend: str, name: str, **options: Any) -> tuple[Any, Path]:
    made = q.quantized(backend, llama, name)
    path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      if backend == "torch":
        import torch

        import torch_backend

        ids = torch.from_numpy(q.IDS).long()
        torch_backend.export_onnx(made.model, (ids,), path, kwargs={"use_cache": False}, input_names=["input_ids"], **options)
      else:
        import jax_backend

        jax_backend.export_onnx(made.module, made.variables, (q.IDS,), path, input_names=["input_ids"], **options)
    return made, path

  return make
