"""Whole models as ONNX from both backends, in onnxruntime, beside the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import torch_backend
from core.export.onnx_run import run
from experiments import export_onnx, setup
from tests.calibrate import twins
from tests.experiments import tiny

LLAMA = ("INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")
MINILM = LLAMA[:3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
  return str(tiny.llama_folder(tmp_path_factory.mktemp("llama"), hidden_size=32, intermediate_size=64))


def _row(backend: str, source: str, config: str, ids: np.ndarray, path: Path, **options: Any) -> dict[str, Any]:
  quantized = setup.load(backend, source).quantize(setup.read_configs([config])[0].value, [ids])
  return export_onnx.check(export_onnx.Options(model=source, **options), backend, quantized, ids, path)


def _assert_explained(row: dict[str, Any]) -> None:
  """Equal but for the order of summation where no code differs; the codes of the same inputs are equal, whatever stands before them."""
  if not row["codes_differing"]:
    assert row["relative_difference"] <= export_onnx.TOLERANCE, row
  # the standard form divides where core multiplies by the reciprocal: it may turn a value within 2 ulp of a midpoint, about one in 10^6
  assert row["same_input_differing"] <= 1e-4 * row["same_input_compared"], row


CASES = [("jax", LLAMA[0]), *(("torch", config) for config in LLAMA[:2])]
CASES += [pytest.param("jax", config, marks=pytest.mark.slow) for config in LLAMA[1:]]
CASES += [pytest.param("torch", config, marks=pytest.mark.slow) for config in LLAMA[2:]]


@pytest.mark.parametrize(("backend", "config"), CASES)
def test_llama_in_onnxruntime(llama: str, backend: str, config: str, tmp_path: Path, compared) -> None:
  row = _row(backend, llama, config, tiny.tokens(2, 16), tmp_path / "model.onnx")
  _assert_explained(row)
  assert row["codes_compared"] == (0 if config.startswith("INT4") else 2 * 16 * (6 * 32 + 64) * 2)  # q k v o gate up, down; two layers
  compared(row["codes_compared"])


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("config", MINILM)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_minilm_in_onnxruntime(backend: str, config: str, tmp_path: Path, compared) -> None:
  row = _row(backend, "minilm", config, np.random.default_rng(0).integers(1000, 20000, (1, 64)).astype(np.int32), tmp_path / "model.onnx")
  _assert_explained(row)
  compared(row["codes_compared"])


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[twins.Torch, Path]:
  """A small net with INT4 weights in blocks and INT8 inputs."""
  config = {**twins.FORMATS["int4"], "*input_quantizer": {"num_bits": 8}}
  net = twins.Torch().quantize("max", config)
  path = tmp_path_factory.mktemp("int4") / "net.onnx"
  return net, torch_backend.export_onnx(net.model, (torch.from_numpy(net.data[0]),), path)


def _output(path: Path, x: np.ndarray) -> np.ndarray:
  return next(iter(run(path, [x], codes=False).outputs.values()))


def test_weights_are_packed_and_no_float_copy_is_left(int4: tuple[twins.Torch, Path]) -> None:
  net, path = int4
  model = onnx.load(path)
  held = {i.name: i for i in model.graph.initializer}
  codes = held["layers.0.up_proj.weight_quantizer.codes"]
  assert codes.data_type == onnx.TensorProto.INT4 and len(codes.raw_data) == twins.WIDTH * twins.HIDDEN // 2
  quantized = {tuple(p.shape) for name, p in net.model.named_parameters() if name.endswith("weight")}
  assert not [i.name for i in held.values() if i.data_type == onnx.TensorProto.FLOAT and tuple(i.dims) in quantized]
  assert {node.domain for node in model.graph.node} == {""} and [o.domain for o in model.opset_import] == [""]
  assert "layers.1.down_proj.input_quantizer/codes" in {node.name for node in model.graph.node}
  assert str(Path(__file__).parents[2]) not in str(model)  # no stack traces of the machine that exported


def test_the_model_stays_as_it_was(int4: tuple[twins.Torch, Path]) -> None:
  net, path = int4
  x = net.data[1]
  with torch.no_grad():
    expected = net.model(torch.from_numpy(x)).numpy()
  assert all("_fake_quantize" not in vars(q) for q in torch_backend.quantizers(net.model).values())
  difference = np.abs(_output(path, net.data[0]) - net.output()).max()
  assert difference <= export_onnx.TOLERANCE * np.abs(expected).max()


def _scale(model: onnx.ModelProto, name: str) -> None:
  _change(model, name, lambda a: a * np.float32(1 + 2.0**-7))


def _swap_nibbles(model: onnx.ModelProto, name: str) -> None:
  held = next(i for i in model.graph.initializer if i.name == name)
  packed = np.frombuffer(held.raw_data, np.uint8)
  held.raw_data = ((packed >> 4) | (packed << 4)).astype(np.uint8).tobytes()


def _change(model: onnx.ModelProto, name: str, fn: Any) -> None:
  held = next(i for i in model.graph.initializer if i.name == name)
  held.CopyFrom(onnx.numpy_helper.from_array(fn(onnx.numpy_helper.to_array(held)), name))


FAULTS = {
  "input scale": (_scale, "layers.0.up_proj.input_quantizer.scale"),
  "weight scale": (_scale, "layers.1.down_proj.weight_quantizer.scale"),
  "nibble order": (_swap_nibbles, "layers.0.gate_proj.weight_quantizer.codes"),
  "one code": (lambda m, name: _change(m, name, lambda a: _off_by_one(a)), "layers.0.gate_proj.weight_quantizer.codes"),
}


def _off_by_one(codes: np.ndarray) -> np.ndarray:
  wide = codes.astype(np.int32)
  wide[0, 0] += 1 if wide[0, 0] < 7 else -1
  return wide.astype(codes.dtype)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(int4: tuple[twins.Torch, Path], fault: str, tmp_path: Path) -> None:
  net, path = int4
  model = onnx.load(path)
  break_it, name = FAULTS[fault]
  break_it(model, name)
  onnx.save(model, tmp_path / "broken.onnx")
  expected = net.output()
  difference = np.abs(_output(tmp_path / "broken.onnx", net.data[0]) - expected).max()
  assert difference > 10 * export_onnx.TOLERANCE * np.abs(expected).max()


def test_compressed_models_give_the_same_file(int4: tuple[twins.Torch, Path], tmp_path: Path) -> None:
  import copy

  net, path = int4
  model = torch_backend.compress(copy.deepcopy(net.model))
  again = torch_backend.export_onnx(model, (torch.from_numpy(net.data[0]),), tmp_path / "net.onnx")
  first, second = ({i.name: i.raw_data for i in onnx.load(p).graph.initializer if "quantizer" in i.name} for p in (path, again))
  assert first == second
  assert np.array_equal(_output(again, net.data[1]), _output(path, net.data[1]))
