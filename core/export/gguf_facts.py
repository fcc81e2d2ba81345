"""What a GGUF file says about a Llama besides its tensors, taken from config.json.

References: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp, convert_hf_to_gguf.py (TextModel, LlamaModel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Facts(NamedTuple):
  """A Llama's sizes, by the names of config.json."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  rms_norm_eps: float
  rope_theta: float


def facts(config: Mapping[str, Any] | None) -> Facts:
  """The facts of a model.

  Args:
    config: content of config.json.

  Raises:
    ValueError: no configuration, another architecture, or something of it that a GGUF file of a Llama cannot say or clients do not read.
  """
  if config is None:
    raise ValueError("layout 'gguf' needs the model's config.json; give `source`, the Hugging Face folder of the float model")
  kind = config.get("model_type")
  if kind != "llama":
    raise ValueError(f"layout 'gguf' is written for model_type 'llama'; config.json says {kind!r}")
  if config.get("hidden_act", "silu") != "silu":
    raise ValueError(f"hidden_act is {config['hidden_act']!r}; a Llama in a GGUF file has 'silu'")
  size = {name: _size(config, name) for name in _SIZES}
  size["num_key_value_heads"] = _size(config, "num_key_value_heads", size["num_attention_heads"])
  size["head_dim"] = _size(config, "head_dim", size["hidden_size"] // size["num_attention_heads"])
  if size["head_dim"] % 2:
    raise ValueError(f"head_dim is {size['head_dim']}; rotary embedding needs an even one")
  return Facts(**size, rms_norm_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"), rope_theta=_theta(config))


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
  value = config.get(name)
  value = default if value is None else value
  if type(value) is not int or value < 1:
    raise ValueError(f"config.json: {name} is {value!r}; a positive integer is needed")
  return value


def _number(value: Any, name: str) -> float:
  if type(value) not in (int, float) or not value > 0:
    raise ValueError(f"config.json: {name} is {value!r}; a positive number is needed")
  return float(value)


def _theta(config: Mapping[str, Any]) -> float:
  rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind != "default":
    raise ValueError(f"rotary embedding {kind!r} is not written as GGUF: transformers drops its factors there; allowed is 'default'")
  part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
  if part != 1:
    raise ValueError(f"partial_rotary_factor is {part!r}; a Llama in a GGUF file rotates all channels")
  return _number(rope.get("rope_theta") or config.get("rope_theta") or 10000.0, "rope_theta")
