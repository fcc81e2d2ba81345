"""What cannot be written says so before anything is written, and files appear whole or not at all."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import core
import jax_backend
import torch_backend
from core.export import onnx_model, onnx_packages
from core.export.onnx_piece import OnnxOptions, Piece
from core.export.onnx_run import run
from core.formats import INT8
from core.spec import QuantSpec
from tests.calibrate import twins
from tests.onnx import graphs


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    (QuantSpec.named("nf4"), "rounding inputs to NF4 cannot be written"),
    (QuantSpec.named("nvfp4_four_over_six"), "four-over-six scales taken from each input"),
    (QuantSpec(INT8, zero_point=True), "a zero point taken from each input"),
    (QuantSpec(INT8, rounding="stochastic"), "rounds stochastically"),
  ],
)
def test_quantizers_that_onnx_cannot_express(spec: QuantSpec, words: str) -> None:
  with pytest.raises(ValueError, match=f"quantizer 'a.input_quantizer'.*{words}"):
    graphs.graph(Piece("a.input_quantizer", spec), (2, 64), OnnxOptions())


def test_blocks_along_an_unknown_length() -> None:
  with pytest.raises(ValueError, match=r"'a.input_quantizer' cuts axis 1 into blocks of 16; export with a fixed length"):
    graphs.graph(Piece("a.input_quantizer", QuantSpec.named("nvfp4")), (2, "K"), OnnxOptions())


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"opset": 20}, "opset 20 is not allowed; use one of 21, 22, 23, 24, 25"),
    ({"form": "qdq"}, "form 'qdq' is unknown; allowed are 'standard', 'exact'"),
    ({"fp4": "packed"}, "fp4 'packed' is unknown"),
    ({"fp4": "native", "opset": 22}, "needs opset 23 or later"),
  ],
)
def test_options(given: dict, words: str) -> None:
  with pytest.raises(ValueError, match=words):
    OnnxOptions.make(**{"opset": None, "form": "standard", "fp4": "portable", **given})


@pytest.mark.parametrize("name", ["onnx", "onnx_ir", "onnxscript", "onnxruntime", "jax2onnx"])
def test_missing_packages_name_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  def missing(asked: str) -> None:
    raise ModuleNotFoundError(f"No module named {asked!r}", name=asked)

  monkeypatch.setattr(importlib, "import_module", missing)
  with pytest.raises(ImportError, match=rf"needs the package '{name}'.*\[onnx\]"):
    onnx_packages.package(name)


def test_models_that_are_not_ready(tmp_path: Path) -> None:
  x = (torch.zeros(1, 2, twins.WIDTH),)
  with pytest.raises(ValueError, match="no quantizers; call quantize first"):
    torch_backend.export_onnx(twins.torch_net(), x, tmp_path / "a.onnx")
  net = twins.Torch().quantize("max", twins.FORMATS["int4"])
  with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
    torch_backend.export_onnx(net.model.train(), x, tmp_path / "a.onnx")
  with pytest.raises(ValueError, match="no quantizers; call quantize first"):
    jax_backend.export_onnx(jax_backend.QuantModule(twins.FlaxNet()), {"params": {}}, (np.zeros((1, 2)),), tmp_path / "a.onnx")
  assert list(tmp_path.iterdir()) == []


def _model() -> object:
  weight = core.quantize(graphs.inputs((64, 64), 0.01), QuantSpec(INT8, axis=(0,)))
  return graphs.graph(Piece("a.weight_quantizer", weight.spec, weight=weight), (64, 64), OnnxOptions())


def test_large_models_have_their_tensors_beside_them(tmp_path: Path) -> None:
  onnx_model.write(_model(), tmp_path / "m.onnx", limit=1000)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
  assert (tmp_path / "m.onnx").stat().st_size < 64 * 64
  onnx_model.write(_model(), tmp_path / "n.onnx")
  x = [np.zeros((64, 64), np.float32)]
  a, b = (next(iter(run(tmp_path / name, x).outputs.values())) for name in ("m.onnx", "n.onnx"))
  assert np.array_equal(a, b) and np.abs(a).max() > 0


def test_an_invalid_model_leaves_the_old_file(tmp_path: Path) -> None:
  path = tmp_path / "m.onnx"
  path.write_bytes(b"old")
  model = _model()
  model.graph[0].attributes["axis"] = importlib.import_module("onnx_ir").AttrString("axis", "first")  # type: ignore[attr-defined]
  with pytest.raises(ValueError, match="not valid ONNX"):
    onnx_model.write(model, path)
  assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
  with pytest.raises(FileNotFoundError, match="does not exist; create it"):
    onnx_model.write(_model(), tmp_path / "no" / "m.onnx")
