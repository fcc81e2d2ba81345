"""Clients that are absent, artefacts that are damaged, and the program."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torch_backend
from core.verify.vllm_client import PROGRAM
from experiments import verify as program
from tests.export import quantized as q
from tests.verify.conftest import Made

BOTH = ("numpy", "transformers", "vllm")


@pytest.mark.parametrize("missing", ["transformers", "compressed_tensors"])
def test_a_missing_package_is_not_run(folder: Made, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  real = importlib.import_module

  def absent(name: str, package: str | None = None) -> Any:
    if name.partition(".")[0] == missing:
      raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    return real(name, package)

  monkeypatch.setattr("core.verify.job.importlib.import_module", absent)
  report = torch_backend.verify(made.model, out, BOTH, q.IDS)
  assert report.passed
  assert report["transformers"].status == report["vllm"].status == "not run"
  assert f"'{missing}', which is not installed; run pip install" in report["transformers"].reason
  assert "vllm_python" in report["vllm"].reason
  assert not torch_backend.verify(made.model, out, ("transformers", "vllm"), q.IDS).passed


def test_wrong_arguments(folder: Made, tmp_path: Path) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  with pytest.raises(ValueError, match="clients 'vlm'; allowed are 'numpy', 'transformers'"):
    torch_backend.verify(made.model, out, ("vlm",))
  with pytest.raises(ValueError, match="clients are none"):
    torch_backend.verify(made.model, out, ())
  with pytest.raises(FileNotFoundError, match="export the model first"):
    torch_backend.verify(made.model, tmp_path / "nothing")
  made.model.train()
  try:
    with pytest.raises(ValueError, match=r"call model\.eval"):
      torch_backend.verify(made.model, out)
  finally:
    made.model.eval()


@pytest.mark.parametrize("damage", ["cut", "header", "config", "lost"])
def test_damage_is_an_error_that_names_the_file(folder: Made, tmp_path: Path, damage: str) -> None:
  made, out = folder("torch", "NVFP4_DEFAULT_CFG")
  copy = tmp_path / "copy"
  shutil.copytree(out, copy)
  weights, config = copy / "model.safetensors", copy / "config.json"
  data = weights.read_bytes()
  if damage == "cut":
    weights.write_bytes(data[:-100])
  elif damage == "header":
    weights.write_bytes(data[:9] + b"}}}}" + data[13:])
  elif damage == "config":
    config.write_text("{")
  else:
    weights.unlink()
  with pytest.raises((ValueError, FileNotFoundError), match="config.json" if damage == "config" else "model.safetensors"):
    torch_backend.verify(made.model, copy, BOTH, q.IDS)


def test_damage_that_only_a_client_meets_is_its_failure(folder: Made, tmp_path: Path) -> None:
  """A layer without one of its tensors: the folder opens, and no client gets further."""
  from core.export.read import open_files
  from core.export.safetensors_file import Writer
  from core.tensor_header import Entry

  made, out = folder("torch", "NVFP4_DEFAULT_CFG")
  copy = tmp_path / "copy"
  shutil.copytree(out, copy)
  (file,) = open_files(out)
  lost = "model.layers.0.mlp.up_proj.weight_global_scale"
  kept = {name: Entry(entry.dtype, entry.shape) for name, entry in file.entries.items() if name != lost}
  with Writer(copy / "model.safetensors", kept, file.metadata) as writer:
    for name in kept:
      writer.write(name, file.read(name))
  report = torch_backend.verify(made.model, copy, BOTH, q.IDS)
  assert report["numpy"].status == report["transformers"].status == "failed" and not report.passed
  assert "up_proj" in str(report)


FAKE = """
import json, sys
class LLM:
  def __init__(self, model, **options): self.dtype = options["dtype"]
  def generate(self, prompts, sampling): return [Answer(p["prompt_token_ids"]) for p in prompts]
class Logprob:
  def __init__(self, value): self.logprob = value
class Answer:
  def __init__(self, ids):
    held = json.load(open(r"{held}"))[json.dumps(ids)]
    self.prompt_logprobs = [None, *({{int(k): Logprob(v) for k, v in position.items()}} for position in held)]
class SamplingParams:
  def __init__(self, **options): assert options["prompt_logprobs"] == 20
__version__ = "0.0-test"
"""


def test_vllm_is_asked_through_its_interpreter(folder: Made, tmp_path: Path) -> None:
  """The protocol, with a module of vLLM's names that returns log-probabilities from a file: right ones, then one that is off."""
  from core.verify.outputs import log_softmax

  made, out = folder("torch", "INT8_DEFAULT_CFG")
  held = tmp_path / "held.json"
  right = {
    json.dumps(ids.tolist()): [{str(k): float(p[k]) for k in range(20)} for p in log_softmax(made(ids[None]))[0, :-1]] for ids in q.IDS
  }
  held.write_text(json.dumps(right))
  (tmp_path / "vllm.py").write_text(FAKE.format(held=held))
  python = tmp_path / "python"
  python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
  python.chmod(0o755)
  report = torch_backend.verify(made.model, out, ("vllm",), q.IDS, vllm_python=str(python))
  (check,) = report["vllm"].checks
  assert report.passed and check.compared == 2 * 11 * 20 and "vLLM 0.0-test" in check.note
  right[json.dumps(q.IDS[1].tolist())][3]["7"] += 0.01
  held.write_text(json.dumps(right))
  report = torch_backend.verify(made.model, out, ("vllm",), q.IDS, vllm_python=str(python))
  assert report["vllm"].status == "failed" and report["vllm"].checks[0].differing == 1


def test_a_vllm_that_does_not_start_is_not_run(folder: Made, tmp_path: Path) -> None:
  made, out = folder("torch", "INT8_DEFAULT_CFG")
  for python in (tmp_path / "nothing", Path("/bin/false")):
    report = torch_backend.verify(made.model, out, ("numpy", "vllm"), q.IDS, vllm_python=str(python))
    assert report["vllm"].status == "not run" and report.passed
  assert PROGRAM.is_file()


class TestProgram:
  def options(self, llama: Path, out: Path, **more: Any) -> program.Options:
    common = {"artefact": str(out), "model": str(llama), "clients": ("numpy", "transformers"), "tokens": 8, "calib_tokens": 16}
    return program.Options(**{**common, **more})

  @pytest.fixture
  def text(self, tmp_path: Path) -> str:
    words = np.random.default_rng(0).integers(0, 61, 4000)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in words))
    return str(path)

  def test_saved_state(self, folder: Made, llama: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = folder("torch", "INT8_DEFAULT_CFG")
    torch_backend.save(made.model, tmp_path / "state")
    report = tmp_path / "report.json"
    options = self.options(llama, out, reference=str(tmp_path / "state"), text_file=text, report=str(report), controls=True)
    assert program.main(options) == 0
    printed = capsys.readouterr().out
    assert "passed" in printed and "caught (inputs, log-probabilities)" in printed
    assert json.loads(report.read_text())["clean"]["passed"] is True

  @pytest.mark.slow
  def test_torch_state_and_artefact_in_jax(self, folder: Made, llama: Path, tmp_path: Path, text: str) -> None:
    """What PyTorch saved and exported, against the JAX simulation of it."""
    made, out = folder("torch", "INT8_DEFAULT_CFG")
    torch_backend.save(made.model, tmp_path / "state")
    options = self.options(llama, out, reference=str(tmp_path / "state"), text_file=text, backend="jax")
    assert program.main(options) == 0

  def test_difference_is_status_1(self, folder: Made, llama: Path, tmp_path: Path, text: str) -> None:
    made, _ = folder("torch", "INT8_DEFAULT_CFG")
    torch_backend.save(made.model, tmp_path / "state")
    _, other = folder("torch", "FP8_DEFAULT_CFG")
    options = self.options(llama, other, reference=str(tmp_path / "state"), text_file=text, clients=("numpy",))
    assert program.main(options) == 1

  def test_config(self, llama: Path, tmp_path: Path, text: str) -> None:
    from experiments import export

    given = {"model": str(llama), "config": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "calib_tokens": 16, "text_file": text}
    export.run(export.Options(out=str(tmp_path / "out"), **given))
    options = self.options(llama, tmp_path / "out", config=given["config"], text_file=text)
    assert program.main(options) == 0

  def test_mistakes(self, folder: Made, llama: Path) -> None:
    _, out = folder("torch", "INT8_DEFAULT_CFG")
    with pytest.raises(ValueError, match="--artefact is empty"):
      program.run(program.Options())
    with pytest.raises(ValueError, match="name either --reference"):
      program.run(self.options(llama, out))
