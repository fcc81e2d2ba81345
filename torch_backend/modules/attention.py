"""Quantizers inside attention: of queries, keys, values and probabilities, the operands of its two products.

A quantizer sees queries, keys and values as [B, heads, T, head_dim], keys after their rotary embedding, and probabilities as
[B, heads, T, S]. Keys and values come as they stand in the cache: a static scale, or one per block of a head, gives the same codes
whether a token is rounded once before the cache or again with every step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from core.attention import ROLES, check_operand
from torch_backend.modules.base import QuantModule
from torch_backend.quantizer import TensorQuantizer
from torch_backend.sequential import Quantizer, tensor_quantizers

LAYOUTS = ("bhtd", "bthd")
NAME = "twinquant"  # of the function in transformers' table of attention functions
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "head_mask")


class QuantAttention(QuantModule):
  """Attention whose forward calls `quantize_bmm`: holds one quantizer per operand, all off until a rule switches them on."""

  q_bmm_quantizer: Quantizer
  k_bmm_quantizer: Quantizer
  v_bmm_quantizer: Quantizer
  p_bmm_quantizer: Quantizer

  def _setup(self) -> None:
    for role in ROLES:
      setattr(self, f"{role}_bmm_quantizer", TensorQuantizer(share_leading=True, enable=False))

  def bmm_quantizer(self, role: str) -> Quantizer:
    """The quantizer of "q", "k", "v" or "p"."""
    held = self._modules[f"{role}_bmm_quantizer"]
    return held  # type: ignore[return-value]

  def quantizes_bmm(self, roles: tuple[str, ...] = ROLES) -> bool:
    """Whether the quantizer of any of these operands does something."""
    return any(one.acts for role in roles for one in tensor_quantizers(self.bmm_quantizer(role)))

  def quantized_operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three, [B, heads, T, head_dim], each through its quantizer."""
    return self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)


def quantize_bmm(module: nn.Module, role: str, x: Tensor, layout: str = "bhtd") -> Tensor:
  """x through a quantizer of the attention module that calls this; x itself where the module is not quantized.

  >>> class Attention(nn.Module):
  ...   def forward(self, x):
  ...     ...
  ...     k = quantize_bmm(self, "k", rotary(k))
  >>> register_attention(Attention)

  Args:
    module: the caller, `self`.
    role: "q", "k", "v", or "p" for the probabilities [B, heads, T, S].
    x: queries, keys or values.
    layout: their axes: "bhtd" ([B, heads, T, head_dim]) or "bthd" ([B, T, heads, head_dim]).

  Raises:
    ValueError: another role or layout.
  """
  check_operand(role, layout, LAYOUTS)
  if not isinstance(module, QuantAttention):
    return x
  quantizer = module.bmm_quantizer(role)
  if layout == "bhtd" or role == "p":
    return quantizer(x)
  return quantizer(x.transpose(-3, -2)).transpose(-3, -2)


class QuantSdpaAttention(QuantAttention):
  """Attention whose own forward calls `torch.nn.functional.scaled_dot_product_attention`, seen through while it runs."""

  def forward(self, *args: Any, **kwargs: Any) -> Any:
    if not self.quantizes_bmm():
      return super().forward(*args, **kwargs)
    with _SdpaOperands(self):
      return super().forward(*args, **kwargs)


class _SdpaOperands(TorchFunctionMode):
  """While open, `scaled_dot_product_attention` gets quantized operands."""

  def __init__(self, module: QuantAttention) -> None:
    super().__init__()
    self._module = module

  def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    given = dict(kwargs or {})
    if func is not F.scaled_dot_product_attention:
      return func(*args, **given)
    return _sdpa(self._module, *args, **given)


def _sdpa(
  module: QuantAttention,
  query: Tensor,
  key: Tensor,
  value: Tensor,
  attn_mask: Tensor | None = None,
  dropout_p: float = 0.0,
  is_causal: bool = False,
  scale: float | None = None,
  enable_gqa: bool = False,
) -> Tensor:
  q, k, v = module.quantized_operands(query, key, value)
  if module.quantizes_bmm(("p",)):
    return explicit(module, q, k, v, attn_mask, scale, dropout_p, is_causal)[0]
  return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def explicit(
  module: QuantAttention,
  query: Tensor,
  key: Tensor,
  value: Tensor,
  mask: Tensor | None = None,
  scale: float | None = None,
  dropout: float = 0.0,
  is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
  """Attention step by step, so that the probabilities can be quantized. The softmax is float32, as in transformers.

  Args:
    module: whose `p_bmm_quantizer` is used.
    query: [B, heads, T, D].
    key: [B, shared heads, S, D].
    value: [B, shared heads, S, D].
    mask: bool (True is seen) or added to the scores; broadcasts to [B, heads, T, S].
    scale: of the scores; None is D ** -0.5.
    dropout: share of the probabilities that are set to zero.
    is_causal: position t sees positions up to t.

  Returns:
    ([B, heads, T, D], probabilities [B, heads, T, S]).
  """
  shared = query.shape[-3] // key.shape[-3]
  if shared > 1:
    key, value = key.repeat_interleave(shared, dim=-3), value.repeat_interleave(shared, dim=-3)
  scores = torch.matmul(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
  if is_causal:
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
  if mask is not None:
    # Not minus infinity: a row of padding that sees nothing would be NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
  weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
  weights = module.p_bmm_quantizer(weights)
  if dropout:
    weights = F.dropout(weights, dropout)
  return torch.matmul(weights, value), weights


# -- transformers ------------------------------------------------------------------------------------------------------------------


class QuantTransformersAttention(QuantAttention):
  """An attention module of transformers, which asks `config._attn_implementation` for the function that computes attention.

  The module alone sees a configuration that names our function, which quantizes and calls the one that the model was set to. The model's
  own configuration stays as it is.
  """

  _eager_attention: Callable[..., Any]

  def _setup(self) -> None:
    super()._setup()
    self.__dict__["_eager_attention"] = _forward(type(self).__dict__["_original_class"]).__globals__["eager_attention_forward"]
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    if NAME not in functions:
      functions.register(NAME, _through_quantizers)

  @property
  def config(self) -> Any:
    held = self.__dict__["config"]
    return _ConfigView(held) if self.quantizes_bmm() else held

  @config.setter
  def config(self, value: Any) -> None:
    self.__dict__["config"] = value

  @property
  def attention_in_use(self) -> str | None:
    """The implementation that the model was set to: "sdpa", "eager", ..."""
    return self.__dict__["config"]._attn_implementation


class _ConfigView:
  """A model's configuration with another name for the attention function. It is made for one look and never kept."""

  def __init__(self, config: Any) -> None:
    self._config = config

  @property
  def _attn_implementation(self) -> str:
    return NAME

  def __getattr__(self, name: str) -> Any:
    return getattr(self._config, name)


def _through_quantizers(
  module: QuantTransformersAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> Any:
  """What stands in transformers' table: attention on quantized operands."""
  query, key, value = module.quantized_operands(query, key, value)
  used = module.attention_in_use
  if module.quantizes_bmm(("p",)):
    return _explicit_transformers(module, query, key, value, attention_mask, used, kwargs)
  functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
  attend = functions.get_interface(used, module._eager_attention)
  return attend(module, query, key, value, attention_mask, **kwargs)


def _explicit_transformers(
  module: QuantTransformersAttention, query: Tensor, key: Tensor, value: Tensor, mask: Any, used: str | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
  extra = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
  if used not in ("sdpa", "eager", None) or extra:
    why = f"the attention arguments {', '.join(extra)}" if extra else f"attn_implementation={used!r}"
    raise ValueError(
      f"{module.p_bmm_quantizer.name!r} cannot quantize probabilities with {why}; use attn_implementation 'sdpa' or 'eager', or switch "
      "'*p_bmm_quantizer' off"
    )
  asked = kwargs.get("is_causal")
  causal = mask is None and query.shape[-2] > 1 and bool(module.__dict__.get("is_causal", True) if asked is None else asked)
  output, weights = explicit(module, query, key, value, mask, kwargs.get("scaling"), kwargs.get("dropout", 0.0), causal)
  return output.transpose(1, 2).contiguous(), weights


def is_transformers_attention(cls: type[nn.Module]) -> bool:
  """Whether a class computes attention through transformers' table of attention functions, by its own name `eager_attention_forward` for
  the plain one: LlamaAttention and its like, in whatever modeling file."""
  library = sys.modules.get("transformers.modeling_utils")
  forward = _forward(cls)
  if library is None or forward is None:
    return False
  names, outside = forward.__code__.co_names, forward.__globals__
  known = {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "config"} <= set(names) and "eager_attention_forward" in outside
  return known and outside.get("ALL_ATTENTION_FUNCTIONS") is library.ALL_ATTENTION_FUNCTIONS


def _forward(cls: type[nn.Module]) -> Any:
  """The plain function behind a class's forward; None where it is something else."""
  found = inspect.unwrap(cls.forward)
  return found if inspect.isfunction(found) else None
