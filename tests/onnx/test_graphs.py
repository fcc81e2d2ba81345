"""Every format as a graph of its own, in onnxruntime and onnx.reference, against `core`, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core
from core import encoding
from core.export.onnx_piece import OnnxOptions, Piece
from core.export.onnx_run import run
from core.formats import E4M3, E8M0, INT4, INT8, int_format
from core.spec import QuantSpec
from tests.onnx import graphs

SHAPE = (4, 6, 64)
NAMED = QuantSpec.named
PER_TENSOR: dict[str, QuantSpec] = {
  "int8": NAMED("int8"),
  "int8_narrow": QuantSpec(int_format(8, narrow_range=True)),
  "uint8": QuantSpec(int_format(8, signed=False)),
  "int4": QuantSpec(INT4),
  "int3": QuantSpec(int_format(3)),
  "int6": QuantSpec(int_format(6)),
  "int8_bound": QuantSpec(INT8, bound=127.5),
  "fp8_e4m3": NAMED("fp8_e4m3"),
  "fp8_e5m2": NAMED("fp8_e5m2"),
  "e2m1": QuantSpec(core.formats.E2M1),
  "e3m2": QuantSpec(core.formats.E3M2),
}
BLOCKED: dict[str, QuantSpec] = {
  "channel": QuantSpec(INT8, axis=(-1,)),
  "int8_token": QuantSpec(INT8, blocks=((-1, None),), dynamic=True),
  "fp8_token": QuantSpec(E4M3, blocks=((-1, None),), dynamic=True),
  "int8_blocks": QuantSpec(INT8, blocks=((-1, 16),), dynamic=True),
  "fp8_two_axes": QuantSpec(E4M3, blocks=((-1, 16), (-2, 3)), dynamic=True),
  **{name: NAMED(name) for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4")},
  **{f"mxfp4_{rule}": NAMED("mxfp4", e8m0_rule=rule) for rule in ("floor", "ceil", "even")},
  **{f"mxint8_{rule}": NAMED("mxint8", e8m0_rule=rule) for rule in ("floor", "ceil", "even")},
  "mxfp8_odd_bound": QuantSpec(E4M3, blocks=((-1, 32),), scale_format=E8M0, dynamic=True, bound=300.0),
  "ragged": NAMED("nvfp4", blocks=((-1, 24),), pad=True),
}


def _same(a: np.ndarray, b: np.ndarray) -> None:
  assert a.shape == b.shape and a.dtype == b.dtype
  # + 0.0: a sum of onnxruntime's may lose the sign of a zero; every other bit counts
  assert np.array_equal(a + 0.0, b + 0.0), f"{int((a != b).sum())} of {a.size} differ"


def _compare(
  tmp_path: Path, x: np.ndarray, piece: Piece, options: OnnxOptions, shape: tuple[Any, ...], runtime: str = "onnxruntime"
) -> int:
  expected = core.fake_quantize(x, piece.spec, piece.amax, tensor_amax=piece.tensor_amax)
  path = graphs.save(tmp_path / "one.onnx", piece, shape, options)
  found = run(path, [x], runtime=runtime)
  (y,) = found.outputs.values()
  _same(y, expected)
  codes = core.quantize(x, piece.spec, piece.amax, tensor_amax=piece.tensor_amax).codes
  levels = encoding.decode(codes, piece.spec.element)
  ((key, shown),) = found.codes.items()
  assert key == (piece.name, 0)
  if shown.size == x.size:  # last blocks that are not full are shown with their padding
    assert np.array_equal(shown.ravel() + 0.0, levels.ravel() + 0.0)
  return x.size


@pytest.mark.parametrize("calibrated", [True, False], ids=["static", "from_input"])
@pytest.mark.parametrize("name", PER_TENSOR)
def test_per_tensor_is_exact(tmp_path, compared, name: str, calibrated: bool) -> None:
  spec = PER_TENSOR[name]
  x = graphs.inputs(SHAPE, 0.037)
  amax = np.float32(0.037 * spec.element_bound) if calibrated else None
  compared(_compare(tmp_path, x, Piece("layer.input_quantizer", spec, amax), OnnxOptions(form="exact"), ("B", "T", SHAPE[2])))


@pytest.mark.parametrize("name", BLOCKED)
def test_groups_of_the_input_are_exact(tmp_path, compared, name: str) -> None:
  x = graphs.inputs(SHAPE, 0.037, seed=1)
  compared(_compare(tmp_path, x, Piece("layer.input_quantizer", BLOCKED[name]), OnnxOptions(form="exact"), ("B", *SHAPE[1:])))


def test_calibrated_groups_are_exact(tmp_path, compared) -> None:
  x = graphs.inputs(SHAPE, 0.037, seed=2)
  shown = np.abs(x).max(axis=(0, 1))
  cases = [
    Piece("a.input_quantizer", QuantSpec(INT8, axis=(-1,)), shown.reshape(1, 1, -1)),
    Piece("a.input_quantizer", QuantSpec(E4M3, blocks=((-1, 16),)), np.broadcast_to(shown.reshape(4, 16).max(1), (4, 6, 4))),
    Piece("a.input_quantizer", NAMED("nvfp4"), np.float32(17.0)),
    Piece("a.input_quantizer", NAMED("nvfp4"), np.float32(0.0)),
    Piece("a.input_quantizer", NAMED("nvfp4", dynamic=False), np.broadcast_to(shown.reshape(4, 16).max(1), (4, 6, 4)), np.float32(40.0)),
    Piece("a.input_quantizer", QuantSpec(INT8, zero_point=True), np.float32([-1.0, 3.0])),
    Piece("a.input_quantizer", QuantSpec(int_format(3), zero_point=True), np.float32([-1.0, 3.0])),
    Piece("a.input_quantizer", QuantSpec(INT8), np.float32(-3.0)),
  ]
  for piece in cases:
    compared(_compare(tmp_path, x, piece, OnnxOptions(form="exact"), SHAPE))


@pytest.mark.parametrize("opset", [23, 25])
def test_native_fp4_in_the_reference_evaluator(tmp_path, compared, opset: int) -> None:
  x = graphs.inputs((2, 3, 32), 0.037, seed=3)
  for name in ("nvfp4", "mxfp4"):
    options = OnnxOptions.make(opset, "exact", "native")
    compared(_compare(tmp_path, x, Piece("layer.input_quantizer", NAMED(name)), options, x.shape, "reference"))


def test_standard_form_divides_and_differs_only_at_midpoints(tmp_path) -> None:
  amax = np.float32(4.75)
  step = amax / np.float32(127)
  x = graphs.inputs(SHAPE, float(step), seed=4)
  piece = Piece("layer.input_quantizer", QuantSpec(INT8), amax)
  path = graphs.save(tmp_path / "one.onnx", piece, SHAPE, OnnxOptions())
  (y,) = run(path, [x]).outputs.values()
  expected = core.fake_quantize(x, piece.spec, piece.amax)
  differs = y != expected
  assert differs.any()  # otherwise the two forms would not need to be two
  distance = np.abs(np.abs(x[differs].astype(np.float64) / step) % 1 - 0.5)
  assert distance.max() < 1e-5  # two float32 roundings of a quotient below 40
  assert np.abs(y - expected).max() <= 1.001 * step


WEIGHTS: dict[str, QuantSpec] = {
  "int8_channel": QuantSpec(INT8, axis=(0,)),
  "int4_blocks": QuantSpec(INT4, blocks=((-1, 16),)),
  "int2_blocks": QuantSpec(int_format(2), blocks=((-1, 16),)),
  "int6": QuantSpec(int_format(6), axis=(0,)),
  "uint4_zero": QuantSpec(int_format(4, signed=False), blocks=((-1, 16),), zero_point=True),
  "int8_zero_channel": QuantSpec(INT8, axis=(0,), zero_point=True),
  "int4_on_inputs": QuantSpec(INT4, blocks=((0, 8),)),
  "fp8": NAMED("fp8_e4m3"),
  "fp8_e5m2": NAMED("fp8_e5m2", axis=(0,)),
  "fp8_tiles": QuantSpec(E4M3, blocks=((-1, 32), (-2, 8))),
  "ragged": QuantSpec(INT4, blocks=((-1, 48),), pad=True),
  "nvfp4_ragged": NAMED("nvfp4", blocks=((-1, 24),), pad=True),
  "nvfp4_tiles": NAMED("nvfp4", blocks=((-1, 16), (-2, 16)), dynamic=False, pad=True),
  "fp16_scales": QuantSpec(INT4, blocks=((-1, 16),), scale_format=core.formats.FLOAT16),
  **{
    name: NAMED(name)
    for name in ("mxfp8_e4m3", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4", "nvfp4_four_over_six", "nf4", "nf4_double")
  },
}


def _weight(spec: QuantSpec) -> core.QuantizedTensor:
  return core.quantize(graphs.inputs((24, 64), 0.01, seed=5), spec)


@pytest.mark.parametrize("name", WEIGHTS)
def test_stored_weights_are_exact(tmp_path, compared, name: str) -> None:
  stored = _weight(WEIGHTS[name])
  piece = Piece("layer.weight_quantizer", WEIGHTS[name], weight=stored)
  path = graphs.save(tmp_path / "one.onnx", piece, stored.shape, OnnxOptions())
  (y,) = run(path, [np.zeros(stored.shape, np.float32)]).outputs.values()
  _same(y, core.dequantize(stored))
  compared(y.size)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvfp4_tiles"])
@pytest.mark.parametrize("opset", [23, 24, 25])
def test_native_fp4_weights(tmp_path, compared, name: str, opset: int) -> None:
  stored = _weight(WEIGHTS[name])
  piece = Piece("layer.weight_quantizer", WEIGHTS[name], weight=stored)
  path = graphs.save(tmp_path / "one.onnx", piece, stored.shape, OnnxOptions.make(opset, "standard", "native"))
  (y,) = run(path, [np.zeros(stored.shape, np.float32)], runtime="reference").outputs.values()
  _same(y, core.dequantize(stored))
  compared(y.size)


@pytest.mark.parametrize("opset", [21, 22, 23, 24, 25])
def test_operator_sets(tmp_path, opset: int) -> None:
  import onnx

  stored = _weight(WEIGHTS["int2_blocks"])
  piece = Piece("layer.weight_quantizer", WEIGHTS["int2_blocks"], weight=stored)
  path = graphs.save(tmp_path / "one.onnx", piece, stored.shape, OnnxOptions.make(opset, "standard", "portable"))
  model = onnx.load(path)
  assert model.opset_import[0].version == opset
  codes = next(i for i in model.graph.initializer if i.name == "layer.weight_quantizer.codes")
  assert codes.data_type == (onnx.TensorProto.INT2 if opset >= 25 else onnx.TensorProto.INT4)
  assert len(codes.raw_data) == stored.codes.size // (4 if opset >= 25 else 2)
  (y,) = run(path, [np.zeros(stored.shape, np.float32)]).outputs.values()
  _same(y, core.dequantize(stored))


def test_float16_saturates_and_casts(tmp_path) -> None:
  x = graphs.inputs(SHAPE, 3.0).astype(np.float16)
  x[1, 2, 7] = 60000.0
  piece = Piece("layer.input_quantizer", QuantSpec(INT8, bound=100.0))  # 127 / 100 of amax leaves the range of float16
  path = graphs.save(tmp_path / "one.onnx", piece, SHAPE, OnnxOptions(form="exact"), "float16")
  (y,) = run(path, [x]).outputs.values()
  _same(y, core.fake_quantize(x, piece.spec))
