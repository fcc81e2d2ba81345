"""The same clients on what the JAX backend exports."""

from __future__ import annotations

import pytest

import jax_backend
from tests.export import quantized as q
from tests.verify.conftest import Made


def test_folder(folder: Made) -> None:
  made, out = folder("jax", "INT8_DEFAULT_CFG")
  found = jax_backend.verify_controls(made.module, made.variables, out, ("numpy", "transformers"), q.IDS)
  assert found.clean.passed, str(found.clean)
  checks = {check.name: check for check in found.clean["transformers"].checks}
  assert {checks[name].status for name in ("weights", "inputs", "tensors placed", "unquantized tensors")} == {"equal"}
  assert checks["log-probabilities"].status in ("within", "explained") and checks["inputs"].compared > 10_000
  assert found.passed, str(found)
  for row in found.rows:
    assert set(row.cells.values()) <= {"caught"}, row.fault


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_more_folders(folder: Made, name: str) -> None:
  made, out = folder("jax", name)
  report = jax_backend.verify(made.module, made.variables, out, ("numpy", "transformers"), q.IDS)
  assert report.passed, str(report)


@pytest.mark.slow
def test_onnx(graph: Made) -> None:
  made, path = graph("jax", "INT8_DEFAULT_CFG")
  report = jax_backend.verify(made.module, made.variables, path, ("numpy", "onnxruntime", "onnx.reference"))
  assert report.passed, str(report)


def test_float_variables_are_refused(folder: Made) -> None:
  made, out = folder("jax", "INT8_DEFAULT_CFG")
  with pytest.raises(ValueError, match="call quantize"):
    jax_backend.verify(made.module, {"params": made.variables["params"]}, out)
