"""Rewrites of what converters write and runtimes do not run. None changes a value."""

from __future__ import annotations

from typing import Any

from core.export.onnx_packages import package


def clean(model: Any) -> None:
  """Write selections between booleans as logic (onnxruntime has no Where of booleans), and drop stack traces.

  The traces name folders of the machine that exported, and are most of a small file.

  Args:
    model: onnx_ir.Model, changed in place.
  """
  ir = package("onnx_ir")
  for node in model.graph.all_nodes():
    for key in [key for key in node.metadata_props if key != "namespace"]:
      del node.metadata_props[key]
  for node in list(model.graph):
    if not node.domain and node.op_type == "Where" and node.outputs[0].dtype == ir.DataType.BOOL:
      nodes = _selection(ir, node)
      old, new = node.outputs[0], nodes[-1].outputs[0]
      new.name, new.shape, new.type = old.name, old.shape, old.type
      ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, [old], [new])


def _selection(ir: Any, node: Any) -> list[Any]:
  condition, yes, no = node.inputs
  first = ir.node("And", [condition, yes], name=f"{node.name}/And")
  inverse = ir.node("Not", [condition], name=f"{node.name}/Not")
  second = ir.node("And", [inverse.outputs[0], no], name=f"{node.name}/And_1")
  both = ir.node("Or", [first.outputs[0], second.outputs[0]], name=f"{node.name}/Or")
  return [first, inverse, second, both]
