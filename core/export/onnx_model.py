"""An ONNX model with placeholders for quantizers -> one with standard operators and packed weights, in a file.

Both backends trace their model with one placeholder node per quantizer call; all that quantizers become is decided here.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.export.onnx_activation import fake_quantized
from core.export.onnx_builder import Builder
from core.export.onnx_cleanup import clean
from core.export.onnx_packages import package
from core.export.onnx_piece import DOMAIN, PLACEHOLDER, OnnxOptions, Piece
from core.export.onnx_weight import dequantized

PROTOBUF_LIMIT = 2**31 - 2**20  # a file of one message cannot be larger than 2 GiB; the graph itself needs a little


def finish(model: Any, pieces: Mapping[str, Piece], options: OnnxOptions) -> None:
  """Replace every placeholder, drop what is not used any more, and set the operator set's version.

  Args:
    model: onnx_ir.Model, changed in place. A placeholder is a node twinquant::Quantizer with one input, one output of the same type and
      shape, and the attribute `quantizer`, a key of `pieces`.
    pieces: quantizers by name.
    options: how to write them.

  Raises:
    ValueError: a quantizer cannot be written with standard operators, or stands inside a loop.
  """
  ir = package("onnx_ir")
  constants: dict[str, Any] = {}
  uses: Counter[str] = Counter()
  for node in list(model.graph.all_nodes()):
    if node.domain == DOMAIN and node.op_type == PLACEHOLDER:
      name = node.attributes["quantizer"].value
      if node.graph is not model.graph:
        raise ValueError(f"quantizer {name!r} stands inside a loop or a function of the graph; unroll it (scan_layers=False) to export")
      b = Builder(model.graph, constants, name, uses[name])
      uses[name] += 1
      _replace(ir, b, node, pieces[name], options)
  clean(model)
  model.opset_imports.pop(DOMAIN, None)
  model.opset_imports[""] = options.opset
  passes = package("onnx_ir.passes.common")
  ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.RemoveUnusedOpsetsPass(), passes.TopologicalSortPass())(model)
  model.ir_version = package("onnx").helper.find_min_ir_version_for([package("onnx").helper.make_opsetid("", options.opset)])


def _replace(ir: Any, b: Builder, node: Any, piece: Piece, options: OnnxOptions) -> None:
  (x,), (out,) = node.inputs, node.outputs
  float32 = ir.DataType.FLOAT
  dtype = out.dtype or x.dtype or float32
  if piece.weight is not None:
    y = dequantized(b, piece, options)
  else:
    shape = tuple(n if isinstance(n, int) else None for n in (x.shape if x.shape is not None else out.shape))
    wide = x if dtype == float32 else b.cast(x, float32)
    y = fake_quantized(b, wide, shape, piece, options)
  if dtype == ir.DataType.FLOAT16:
    y = b.op("Clip", y, b.scalar(-65504.0), b.scalar(65504.0))  # `core.cast_saturating`
  if dtype != float32:
    y = b.cast(y, dtype)
  y.shape, y.type, y.name = out.shape, ir.TensorType(dtype), f"{b.owner}{b.suffix}"
  ir.convenience.replace_nodes_and_values(node.graph, node, [node], b.nodes, [out], [y])


def write(model: Any, path: str | Path, *, limit: int = PROTOBUF_LIMIT) -> None:
  """Check the model and write it beside `path`, then rename; tensors go to `<name>.data` where the file would be too large for protobuf.

  Args:
    model: onnx_ir.Model.
    path: of the .onnx file; an older file there is replaced.
    limit: bytes of tensors above which they get a file of their own.

  Raises:
    FileNotFoundError: the folder does not exist.
    ValueError: the model is not valid ONNX.
  """
  ir, onnx = package("onnx_ir"), package("onnx")
  path = Path(path)
  if not path.parent.is_dir():
    raise FileNotFoundError(f"folder {str(path.parent)!r} does not exist; create it before exporting to {path.name!r}")
  size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
  data = f"{path.name}.data" if size > limit else None
  with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
    written = Path(folder) / path.name
    ir.save(model, written, external_data=data)
    try:
      onnx.checker.check_model(str(written), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
      raise ValueError(f"the exported model is not valid ONNX: {error}") from error
    if data is not None:
      os.replace(Path(folder) / data, path.parent / data)
    os.replace(written, path)
