"""Nodes and initializers of one graph, made in order, with readable names."""

from __future__ import annotations

from typing import Any

import numpy as np

from core.export.onnx_packages import package

SHARED = "constant"


class Builder:
  """Makes nodes that go before one node of a graph; constants become initializers, equal scalars are shared.

  Args:
    graph: an onnx_ir graph.
    constants: shared by the builders of one graph: name -> value.
    owner: prefix of the names, the quantizer's dotted name.
    use: number of the quantizer's call; names of later calls carry it.
  """

  def __init__(self, graph: Any, constants: dict[str, Any], owner: str, use: int = 0) -> None:
    self.ir = package("onnx_ir")
    self.nodes: list[Any] = []
    self.owner = owner
    self._used: set[str] = set()
    self._graph = graph
    self._constants = constants
    self.suffix = f"#{use}" if use else ""

  def op(self, kind: str, *inputs: Any, name: str = "", **attributes: Any) -> Any:
    """The output of a new node of the standard domain.

    Args:
      kind: operator.
      *inputs: values; None is left out.
      name: of the output, behind the quantizer's; by default the operator's name and a number.
      **attributes: of the node; None is left out.
    """
    name = name or f"{kind}_{len(self.nodes)}"
    name = name if name not in self._used else f"{name}_{len(self.nodes)}"
    self._used.add(name)
    given = {key: value for key, value in attributes.items() if value is not None}
    node = self.ir.node(kind, list(inputs), given, name=f"{self.owner}/{name}{self.suffix}")
    node.outputs[0].name = f"{self.owner}.{name}{self.suffix}"
    self.nodes.append(node)
    return node.outputs[0]

  def constant(self, name: str, array: Any) -> Any:
    """An initializer of the quantizer, the same for all of its calls.

    Args:
      name: behind the quantizer's.
      array: numpy array; ml_dtypes' types are ONNX's small ones.
    """
    return self._initializer(f"{self.owner}.{name}", np.asarray(array))

  def shared(self, name: str, array: np.ndarray) -> Any:
    """An initializer of the whole graph."""
    return self._initializer(f"{SHARED}.{name}", array)

  def scalar(self, value: float, kind: Any = np.float32) -> Any:
    """A number, shared in the graph."""
    return self.shared(f"{np.dtype(kind).name}.{value!r}", np.asarray(value, kind))

  def integers(self, *values: int) -> Any:
    """A list of int64, shared in the graph."""
    return self.shared(f"int64.{'x'.join(map(str, values))}", np.asarray(values, np.int64))

  def has(self, name: str) -> Any:
    """An initializer made before by `constant`, or None."""
    return self._constants.get(f"{self.owner}.{name}")

  def cast(self, x: Any, dtype: Any, name: str = "") -> Any:
    return self.op("Cast", x, name=name, to=int(dtype))

  def _initializer(self, name: str, array: np.ndarray) -> Any:
    known = self._constants.get(name)
    if known is not None:
      return known
    if not array.flags.c_contiguous:
      array = np.array(array, order="C")
    tensor = self.ir.Tensor(array, name=name)
    value = self.ir.Value(name=name, shape=self.ir.Shape(array.shape), type=self.ir.TensorType(tensor.dtype), const_value=tensor)
    self._graph.register_initializer(value)
    self._constants[name] = value
    return value
