"""ModelOpt's NVFP4 fake quantization on a CPU.

ModelOpt 0.47 computes it in a Triton kernel or a CUDA extension and refuses CPU tensors, so AWQ, SVDQuant and max on NVFP4 run only on a
GPU. `nvfp4_on_cpu` puts `core.fake_quantize` in the place of that one operation; everything else (statistics, searches, SVD, folding) is
ModelOpt's own code. What runs is therefore the peer's algorithm on OUR arithmetic of the format, not the peer's kernel. The substitute
equals ModelOpt's `NVFP4QTensor`, which its export writes, bit for bit (tests/oracles/test_elements.py). The Triton kernel differs from
both where a block scale is below 1e-5: it takes 1.0 there. CPU seconds of such runs say nothing of the peer's speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import core

_NVFP4 = core.QuantSpec.named("nvfp4")


def dynamic_block_quantize(
  inputs: torch.Tensor,
  block_size: int,
  amax: torch.Tensor | None,
  num_bits: int,
  exponent_bits: int,
  scale_num_bits: int,
  scale_exponent_bits: int,
) -> torch.Tensor:
  """In place of `modelopt.torch.quantization.tensor_quant.dynamic_block_quantize_op`; the same arguments.

  Args:
    inputs: [..., n].
    block_size: along the last axis.
    amax: amax of the whole tensor, which sets the tensor scale; its largest element counts. None takes it from the input.
    num_bits: of the element, with its sign.
    exponent_bits: of the element.
    scale_num_bits: of the block scale, with its sign.
    scale_exponent_bits: of the block scale.

  Returns:
    The shape and dtype of inputs.

  Raises:
    ValueError: a format other than NVFP4 (E2M1 with E4M3 block scales).
  """
  if (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) != (4, 2, 8, 4):
    raise ValueError(
      f"element of {num_bits} bits with {exponent_bits} of exponent, scale of {scale_num_bits} with {scale_exponent_bits}: on a CPU "
      "only NVFP4 is replaced (4, 2, 8, 4); choose another format or run ModelOpt on a GPU"
    )
  spec = _NVFP4.replace(blocks=((-1, block_size),))
  with torch.no_grad():
    return core.fake_quantize(inputs, spec, None if amax is None else amax.float().amax())


@contextlib.contextmanager
def nvfp4_on_cpu() -> Iterator[None]:
  """While open, ModelOpt's dynamic NVFP4 quantizers run on a CPU, by `dynamic_block_quantize`.

  Raises:
    ImportError: ModelOpt is not installed.
  """
  from modelopt.torch.quantization import tensor_quant

  before = tensor_quant.dynamic_block_quantize_op
  tensor_quant.dynamic_block_quantize_op = dynamic_block_quantize
  try:
    yield
  finally:
    tensor_quant.dynamic_block_quantize_op = before
