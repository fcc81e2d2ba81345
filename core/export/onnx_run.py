"""Running an exported model, and seeing the codes that its activation quantizers choose."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.export.onnx_packages import package

RUNTIMES = ("onnxruntime", "reference")
_SHOWN = re.compile(r"^(?P<name>.+)\.(codes|levels)(#(?P<call>\d+))?$")


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run gave.

  Attributes:
    outputs: of the model, by name.
    codes: by (quantizer, number of its call): what its codes stand for before the scale is applied, float32, zero points included.
    inputs: by the same key, of quantizers in the standard form: the float32 values that were quantized.
  """

  outputs: dict[str, np.ndarray]
  codes: dict[tuple[str, int], np.ndarray]
  inputs: dict[tuple[str, int], np.ndarray]


def run(path: str | Path, inputs: Sequence[np.ndarray], *, runtime: str = "onnxruntime", optimize: bool = False, codes: bool = True) -> Run:
  """Run an exported model on the CPU, by one thread.

  Args:
    path: of the .onnx file.
    inputs: in the order of the graph's inputs.
    runtime: "onnxruntime", or "reference" (onnx's own evaluator, slow, which has every type).
    optimize: let onnxruntime rewrite the graph. Off, it computes what the file says.
    codes: also return what the activation quantizers chose; the graph gets further outputs for that, in memory only.

  Raises:
    ImportError: a package of the `onnx` extra is missing.
    ValueError: unknown runtime, or another number of inputs than the model has.
  """
  if runtime not in RUNTIMES:
    raise ValueError(f"runtime {runtime!r} is unknown; allowed are {', '.join(map(repr, RUNTIMES))}")
  onnx = package("onnx")
  model = onnx.load(str(path))
  shown = expose(model) if codes else {}
  quantized = _expose_inputs(model) if codes else {}
  names = [value.name for value in model.graph.input]
  if len(names) != len(inputs):
    raise ValueError(f"{Path(path).name} takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}")
  given = dict(zip(names, map(np.asarray, inputs), strict=True))
  values = _onnxruntime(model, given, optimize) if runtime == "onnxruntime" else _reference(model, given)
  found = dict(zip([value.name for value in model.graph.output], values, strict=True))
  outputs = {name: value for name, value in found.items() if name not in shown and name not in quantized}
  seen = {key: found[name] for name, keys in quantized.items() for key in keys}
  return Run(outputs, {key: found[name] for name, key in shown.items()}, seen)


def expose(model: Any) -> dict[str, tuple[str, int]]:
  """Add what activation quantizers choose to the outputs of an onnx.ModelProto, as float32.

  Returns:
    Name of the new output -> (quantizer, number of its call).
  """
  onnx = package("onnx")
  make, kinds = onnx.helper, onnx.TensorProto
  shown: dict[str, tuple[str, int]] = {}
  one = make.make_tensor("shown.one", kinds.FLOAT, [], [1.0])
  for node in list(model.graph.node):
    match = _SHOWN.match(node.output[0])
    if match is None:
      continue
    name = node.output[0]
    if node.op_type == "QuantizeLinear":
      name = f"shown.{name}"
      model.graph.node.append(make.make_node("DequantizeLinear", [node.output[0], "shown.one"], [name]))
    shown[name] = (match["name"], int(match["call"] or 0))
    model.graph.output.append(make.make_tensor_value_info(name, kinds.FLOAT, None))
  if shown:
    model.graph.initializer.append(one)
  return shown


def _expose_inputs(model: Any) -> dict[str, list[tuple[str, int]]]:
  """Add what QuantizeLinear nodes of the standard form read to the outputs: name of the output -> quantizers and numbers of their calls."""
  onnx = package("onnx")
  made = {name: node for node in model.graph.node for name in node.output}
  outputs = {value.name for value in model.graph.output}
  shown: dict[str, list[tuple[str, int]]] = {}
  for node in model.graph.node:
    match = _SHOWN.match(node.output[0])
    if match is None or node.op_type != "QuantizeLinear":
      continue
    before = made.get(node.input[0])
    if before is not None and before.output[0].startswith(f"{match['name']}."):
      continue  # a value that the quantizer has scaled, cut or cast itself
    if node.input[0] not in shown and node.input[0] not in outputs:
      model.graph.output.append(onnx.helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, None))
    if node.input[0] not in outputs:
      shown.setdefault(node.input[0], []).append((match["name"], int(match["call"] or 0)))
  return shown


def _onnxruntime(model: Any, inputs: dict[str, np.ndarray], optimize: bool) -> list[np.ndarray]:
  ort = package("onnxruntime")
  options = ort.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  options.log_severity_level = 3
  level = ort.GraphOptimizationLevel
  options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
  # Optimized, onnxruntime rounds the inputs of 4-bit products to INT8 unless it is told that they are float32.
  options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
  return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, inputs)


def _reference(model: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
  return [np.asarray(value) for value in package("onnx.reference").ReferenceEvaluator(model).run(None, inputs)]
