"""The product of two quantized tensors computed on their codes: another arithmetic than the simulation's, and the same in both backends.

Simulation multiplies dequantized floats and rounds every partial sum; here codes are multiplied and added as integers, exactly, and one
product with both steps follows: y[m, n] = (sum_k x[m, k] w[n, k]) * (x_step[m] * w_step[n]).
"""

from __future__ import annotations

from collections.abc import Sequence

from core.arrays import Array, namespace
from core.formats import IntFormat
from core.spec import QuantSpec

INT8 = "int8"
MATMULS = (INT8,)


def check_name(matmul: str | None) -> None:
  """Raises:
  ValueError: no name of `MATMULS`, nor None.
  """
  if matmul is not None and matmul not in MATMULS:
    raise ValueError(
      f"matmul {matmul!r} is unknown; allowed are None (dequantize, then the layer's own product) and {', '.join(map(repr, MATMULS))}"
    )


def refusal(weights: Sequence[QuantSpec], inputs: Sequence[QuantSpec]) -> str | None:
  """Why a layer's product cannot be computed on int8 codes; None where it can.

  Args:
    weights: formats of the enabled quantizers of its weight [N, K].
    inputs: formats of the enabled quantizers of its input [..., K].
  """
  if len(weights) != 1 or len(inputs) != 1:
    return f"an integer product needs one format of the weight and one of the input; it has {len(weights)} and {len(inputs)}"
  for what, spec in (("weight", weights[0]), ("input", inputs[0])):
    element = spec.element
    if not isinstance(element, IntFormat) or not element.signed or spec.zero_point or spec.scale_format is not None:
      return f"an integer product needs signed integers with a float32 scale and no zero point; its {what} is {element.name}"
  weight, into = weights[0], inputs[0]
  if not (_one_scale(weight) or weight.axis == (0,) or weight.blocks == ((-1, None),)):
    return "an integer product needs one scale of the weight, or one per output"
  if not (_one_scale(into) or into.blocks == ((-1, None),)):
    return "an integer product needs one scale of the input, or one per token"
  return None


def rescale(product: Array, x_step: Array, w_step: Array) -> Array:
  """Values of a product of codes.

  Args:
    product: [M, N] int32, sums of products of codes.
    x_step: [] or [M, 1] float32.
    w_step: [] or [1, N] float32.

  Returns:
    [M, N] float32.
  """
  xp = namespace(product)
  (y,) = xp.barrier(xp.float32(product) * (x_step * w_step))  # a bias comes next, and is not to be fused with the product
  return y


def _one_scale(spec: QuantSpec) -> bool:
  return spec.axis is None and spec.blocks is None
