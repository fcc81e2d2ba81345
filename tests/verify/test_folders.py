"""Exported folders in "numpy" and "transformers": what agrees, and what each client is known to compute otherwise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torch_backend
from core.verify import Report
from tests.experiments import tiny
from tests.export import quantized as q
from tests.export.conftest import SIZES
from tests.verify.conftest import MODELOPT, Made

EXACT = (  # the client's weights, inputs and log-probabilities are the simulated ones, bit for bit
  "INT8_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_ASYMMETRIC", "FP8_DEFAULT_CFG",
  "FP8_PER_CHANNEL_PER_TOKEN_CFG", "MXFP8_DEFAULT_CFG", "MIXED",
)  # fmt: skip


def verify(made: Any, out: Path, *clients: str, **options: Any) -> Report:
  return torch_backend.verify(made.model, out, clients, options.pop("prompts", q.IDS), **options)


def statuses(report: Report, client: str) -> dict[str, str]:
  return {check.name: check.status for check in report[client].checks}


@pytest.mark.parametrize("name", EXACT)
def test_exact(folder: Made, name: str) -> None:
  made, out = folder("torch", name)
  report = verify(made, out, "numpy", "transformers")
  assert report.passed
  found = statuses(report, "transformers")
  assert {found[what] for what in ("tensors placed", "weights", "unquantized tensors", "log-probabilities")} == {"equal"}
  quantizes = any(subject.inputs for subject in _subjects(made))
  assert found["inputs"] == ("equal" if quantizes else "not checked")
  assert report["numpy"].checks[1].compared == report["transformers"].checks[2].compared > 100_000


def _subjects(made: Any) -> Any:
  from core.export.source import subjects
  from torch_backend.export import ExportHost

  return subjects(ExportHost(made.model))


@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "NVFP4_FOUR_OVER_SIX_CFG"])
def test_nvfp4_passes_through_bfloat16_and_says_so(folder: Made, name: str) -> None:
  made, out = folder("torch", name)
  report = verify(made, out, "numpy", "transformers")
  assert report.passed
  found = statuses(report, "transformers")
  assert found["weights"] == "within" and found["inputs"] == "equal"
  assert found["log-probabilities"] in ("within", "equal", "explained")
  assert "bfloat16" in str(report) and "log-probabilities: with the simulated weights in place" in str(report)


@pytest.mark.parametrize(("name", "reason"), [("INT8_DYNAMIC", "127.5"), ("MXFP4_DEFAULT_CFG", "shared exponent")])
def test_known_differences_of_the_client_are_failures(folder: Made, name: str, reason: str) -> None:
  """transformers computes other inputs than these: the artefact's bytes are right, and the model that runs is another."""
  made, out = folder("torch", name)
  report = verify(made, out, "numpy", "transformers")
  assert not report.passed
  assert report["numpy"].status == "passed" and report["transformers"].status == "failed"
  assert set(report["transformers"].bad()) == {"inputs", "log-probabilities"}
  assert reason in report["transformers"].bad()["inputs"].note


def test_modelopt_layout(folder: Made) -> None:
  made, out = folder("torch", "FP8_DEFAULT_CFG", MODELOPT)
  report = verify(made, out, "numpy", "transformers", "modelopt")
  assert report.passed
  assert report["transformers"].status == "not run" and "silently wrong" in report["transformers"].reason
  assert statuses(report, "modelopt") == {"weights": "equal", "inputs": "not checked"}


def test_transformers_does_read_modelopt_fp8_wrong(folder: Made) -> None:
  """Why it is "not run": the client takes codes for weights, without an error."""
  import torch
  import transformers

  _, out = folder("torch", "FP8_DEFAULT_CFG", MODELOPT)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32, local_files_only=True)
  layer = model.model.layers[0].mlp.down_proj
  assert float(layer.weight.detach().abs().max()) == 448.0


@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG", "MXFP4_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG"])
def test_modelopt_reads_what_is_simulated(folder: Made, name: str) -> None:
  made, out = folder("torch", name, MODELOPT)
  report = verify(made, out, "modelopt", "numpy")
  assert report.passed and report["modelopt"].checks[0].compared > 100_000


def test_modelopt_does_not_read_the_other_layout(folder: Made) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  report = verify(made, out, "modelopt")
  assert not report.passed and report["modelopt"].status == "not run"


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_tied_head(tmp_path: Path, backend: str) -> None:
  """The head has no tensor of its own in the folder; the Flax model holds a copy of the table."""
  sizes: dict[str, Any] = dict(SIZES)
  source = tiny.llama_folder(tmp_path / "tied", **sizes, tie_word_embeddings=True)
  made = q.quantized(backend, source, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
  q.exported(made, tmp_path / "out", "compressed-tensors", source)
  report = made.verify(tmp_path / "out", clients=("numpy", "transformers"), prompts=q.IDS)
  assert report.passed, str(report)


def test_bfloat16_outputs_are_not_compared_with_float32_ones(llama: Path, tmp_path: Path) -> None:
  made = q.quantized("torch", llama, "INT8_DEFAULT_CFG", "bfloat16")
  q.exported(made, tmp_path / "out", "compressed-tensors", llama)
  report = verify(made, tmp_path / "out", "numpy", "transformers", "vllm", vllm_python="/bin/false")
  found = statuses(report, "transformers")
  assert report.passed and found.pop("log-probabilities") == "not checked" and set(found.values()) == {"equal"}
  assert "BF16" in report["vllm"].reason


def test_another_model_is_not_this_one(folder: Made) -> None:
  """The folder of another configuration, and of other weights, is found out."""
  made, _ = folder("torch", "INT8_DEFAULT_CFG")
  _, other = folder("torch", "FP8_DEFAULT_CFG")
  report = verify(made, other, "numpy", "transformers")
  assert report["numpy"].status == report["transformers"].status == "failed"
  assert {"codes", "scales", "configuration"} <= set(report["numpy"].bad())


def test_prompts(folder: Made) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  lengths = []
  for prompts in (None, "w1 w2 w3", ["w1 w2", "w3"], [[1, 2, 3], [4]], np.ones((2, 3), np.int64)):
    report = verify(made, out, "transformers", prompts=prompts)
    assert report.passed
    lengths.append(report["transformers"].checks[-1].compared // 61)
  assert lengths == [32, 3, 3, 4, 6]
  for wrong in ([], [[[1]]], 3, np.zeros((2, 0), np.int32)):
    with pytest.raises(ValueError, match="prompt"):
      verify(made, out, "transformers", prompts=wrong)


def test_a_prompt_of_floats_is_not_run(folder: Made) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  report = verify(made, out, "transformers", prompts=(np.zeros((1, 4), np.float32),))
  assert report["transformers"].status == "not run" and "token ids" in report["transformers"].reason
