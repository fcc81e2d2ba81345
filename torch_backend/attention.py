"""Quantizers inside attention: `<module>.q_bmm_quantizer`, `k_bmm_quantizer`, `v_bmm_quantizer` and `p_bmm_quantizer`.

transformers' attention modules and nn.MultiheadAttention get them by themselves. A class of your own gets them through
`register_attention`: it calls `quantize_bmm` on its operands, or calls torch's `scaled_dot_product_attention` and stays as it is.
"""

from __future__ import annotations

from torch import nn

from torch_backend.modules.attention import LAYOUTS, QuantAttention, QuantSdpaAttention, quantize_bmm
from torch_backend.modules.registry import register

__all__ = ["LAYOUTS", "QuantAttention", "quantize_bmm", "register_attention"]


def register_attention(attention_cls: type[nn.Module], sdpa: bool = False) -> None:
  """Give modules of a class the quantizers of attention; `unregister(attention_cls)` undoes it.

  Args:
    attention_cls: a class whose forward calls `quantize_bmm(self, ...)`.
    sdpa: the class is unmodified and calls `torch.nn.functional.scaled_dot_product_attention`, itself or through a function, but not
      through a module with attention of its own; its operands are quantized on their way in.

  Raises:
    TypeError: it is no nn.Module class.
  """
  register(attention_cls, QuantSdpaAttention if sdpa else QuantAttention)
