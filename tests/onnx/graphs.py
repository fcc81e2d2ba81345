"""One quantizer alone as an ONNX graph, and inputs that are hard for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from core.export.onnx_model import finish, write
from core.export.onnx_piece import DOMAIN, PLACEHOLDER, OnnxOptions, Piece

TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def graph(piece: Piece, shape: tuple[Any, ...], options: OnnxOptions, dtype: str = "float32") -> ir.Model:
  """A model whose output is the quantized input (or the weight that the piece holds); strings in `shape` are unknown lengths."""
  kind = ir.TensorType(TYPES[dtype])
  x = ir.Value(name="x", shape=ir.Shape(shape), type=kind)
  node = ir.node(PLACEHOLDER, [x], {"quantizer": piece.name}, domain=DOMAIN)
  y = node.outputs[0]
  y.name, y.shape, y.type = "y", ir.Shape(shape), kind
  # the placeholder is followed by another node, as in a model, so that the graph's output keeps its name
  out = ir.node("Identity", [y])
  out.outputs[0].name, out.outputs[0].shape, out.outputs[0].type = "out", ir.Shape(shape), kind
  model = ir.Model(ir.Graph([x], [out.outputs[0]], nodes=[node, out], opset_imports={"": 21, DOMAIN: 1}, name="one"), ir_version=10)
  finish(model, {piece.name: piece}, options)
  return model


def save(path: Path, *args: Any, **kwargs: Any) -> Path:
  write(graph(*args, **kwargs), path)
  return path


def inputs(shape: tuple[int, ...], step: float, seed: int = 0) -> np.ndarray:
  """Values around the midpoints of a grid of that step, with zeros, a zero row and outliers among them."""
  rng = np.random.default_rng(seed)
  midpoints = (rng.integers(-40, 40, shape) + 0.5) * step
  near = midpoints * (1 + rng.integers(-2, 3, shape) * 2.0**-23)
  x = np.where(rng.random(shape) < 0.5, near, rng.normal(size=shape) * 20 * step).astype(np.float32)
  x[..., 3] = 0.0
  x[0] = 0.0
  x[-1, ..., 5] = 300 * step
  return x
