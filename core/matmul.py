"""The product of two quantized tensors computed on their codes: another arithmetic than the simulation's.

Simulation multiplies dequantized floats. Here the levels themselves are multiplied and added, and one product with both steps follows:
y[m, n] = (sum_k x[m, k] w[n, k]) * (x_step[m] * w_step[n]). Sums of int8 codes are exact integers, so that the result is the same in both
backends; sums of float8 codes are float32 sums, in whatever order and width the hardware adds.
"""

from __future__ import annotations

from collections.abc import Sequence

from core import formats
from core.arrays import Array, namespace
from core.formats import IntFormat
from core.spec import QuantSpec

INT8, FLOAT8 = "int8", "float8"
MATMULS = (INT8, FLOAT8)


def check_name(matmul: str | None) -> None:
  """Raises:
  ValueError: no name of `MATMULS`, nor None.
  """
  if matmul is not None and matmul not in MATMULS:
    raise ValueError(
      f"matmul {matmul!r} is unknown; allowed are None (dequantize, then the layer's own product) and {', '.join(map(repr, MATMULS))}"
    )


def refusal(matmul: str, weights: Sequence[QuantSpec], inputs: Sequence[QuantSpec]) -> str | None:
  """Why a layer's product cannot be computed on codes; None where it can.

  Args:
    matmul: one of `MATMULS`.
    weights: formats of the enabled quantizers of its weight [N, K].
    inputs: formats of the enabled quantizers of its input [..., K].
  """
  if len(weights) != 1 or len(inputs) != 1:
    return f"a product of codes needs one format of the weight and one of the input; it has {len(weights)} and {len(inputs)}"
  for what, spec in (("weight", weights[0]), ("input", inputs[0])):
    if not _fits(matmul, spec):
      needed = "signed integers" if matmul == INT8 else "E4M3"
      return f"matmul {matmul!r} needs {needed} with a float32 scale and no zero point; its {what} is {spec.element.name}"
  weight, into = weights[0], inputs[0]
  if not (_one_scale(weight) or weight.axis == (0,) or weight.blocks == ((-1, None),)):
    return "a product of codes needs one scale of the weight, or one per output"
  if not (_one_scale(into) or into.blocks == ((-1, None),)):
    return "a product of codes needs one scale of the input, or one per token"
  return None


def rescale(product: Array, x_step: Array, w_step: Array) -> Array:
  """Values of a product of codes.

  Args:
    product: [M, N] int32 or float32, sums of products of codes.
    x_step: float32, one, or M of them in any shape.
    w_step: float32, one, or N of them in any shape.

  Returns:
    [M, N] float32.
  """
  xp = namespace(product)
  rows, columns = x_step.reshape((-1, 1)), w_step.reshape((1, -1))
  (y,) = xp.barrier(xp.float32(product) * (rows * columns))  # a bias comes next, and is not to be fused with the product
  return y


def _fits(matmul: str, spec: QuantSpec) -> bool:
  if spec.zero_point or spec.scale_format is not None:
    return False
  return spec.element == formats.E4M3 if matmul == FLOAT8 else isinstance(spec.element, IntFormat) and spec.element.signed


def _one_scale(spec: QuantSpec) -> bool:
  return spec.axis is None and spec.blocks is None
