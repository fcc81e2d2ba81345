"""What a model folder's `config.json` says, as frozen (hashable) values; whatever is not supported is refused here by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARCHITECTURES = {"llama": "LlamaForCausalLM", "bert": "BertModel"}
_ROPE_TYPES = ("default", "linear", "llama3")
_BERT_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding: `theta` is the base wavelength, the rest belongs to `rope_type` "linear" and "llama3"."""

  theta: float = 10000.0
  rope_type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """A Llama-architecture language model; the fields are named as in Hugging Face's `config.json`."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float = 1e-6
  max_position_embeddings: int = 2048
  tie_word_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  rope: Rope = dataclasses.field(default_factory=Rope)


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """A BERT encoder; the fields are named as in Hugging Face's `config.json`."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_act: str = "gelu"


def read_config(folder: str | Path) -> LlamaConfig | BertConfig:
  """The configuration of a Hugging Face model folder.

  Raises:
    FileNotFoundError: the folder has no `config.json`.
    ValueError: another architecture than Llama or BERT, or a variant of them that is not supported.
  """
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; a model folder is what save_pretrained of Hugging Face transformers writes")
  raw = json.loads(path.read_text(encoding="utf-8"))
  kind = raw.get("model_type")
  given = raw.get("architectures") or [ARCHITECTURES.get(kind)]
  if kind not in ARCHITECTURES or not any(_matches(kind, name) for name in given):
    raise ValueError(
      f"{path}: model_type {kind!r} with architectures {given} is not supported; allowed are 'llama' (LlamaForCausalLM) and 'bert' (Bert*)"
    )
  if raw.get("quantization_config"):
    raise ValueError(f"{path}: the folder holds quantized weights (quantization_config); use the folder of the float model")
  return (_llama if kind == "llama" else _bert)(raw, path)


def _matches(kind: str, architecture: Any) -> bool:
  return str(architecture) == "LlamaForCausalLM" if kind == "llama" else str(architecture).startswith("Bert")


def _require(raw: Mapping[str, Any], path: Path, *names: str) -> dict[str, Any]:
  missing = [name for name in names if raw.get(name) is None]
  if missing:
    raise ValueError(f"{path}: {', '.join(missing)} missing")
  return {name: raw[name] for name in names}


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _optional(raw: Mapping[str, Any], *names: str) -> dict[str, Any]:
  return {name: raw[name] for name in names if raw.get(name) is not None}


def _llama(raw: Mapping[str, Any], path: Path) -> LlamaConfig:
  sizes = _require(raw, path, *_SIZES)
  if raw.get("hidden_act", "silu") != "silu":
    raise ValueError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported for Llama; allowed is 'silu'")
  heads = sizes["num_attention_heads"]
  kv_heads = raw.get("num_key_value_heads") or heads
  if heads % kv_heads:
    raise ValueError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
  head_dim = raw.get("head_dim") or sizes["hidden_size"] // heads
  if head_dim % 2:
    raise ValueError(f"{path}: head_dim {head_dim} is odd; rotary position embedding rotates pairs of channels")
  more = _optional(raw, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias")
  return LlamaConfig(**sizes, num_key_value_heads=kv_heads, head_dim=head_dim, rope=_rope(raw, path), **more)


def _rope(raw: Mapping[str, Any], path: Path) -> Rope:
  # transformers 5 writes everything into rope_parameters, earlier versions wrote rope_theta and rope_scaling.
  found = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
  kind = found.get("rope_type") or found.get("type") or "default"
  if kind not in _ROPE_TYPES:
    raise ValueError(f"{path}: rope_type {kind!r} is not supported; allowed are {', '.join(_ROPE_TYPES)}")
  partial = found.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
  if partial != 1.0:
    raise ValueError(f"{path}: partial_rotary_factor {partial} is not supported; allowed is 1.0")
  theta = found.get("rope_theta") or raw.get("rope_theta") or Rope.theta
  if kind == "default":
    return Rope(float(theta))
  if kind == "linear":
    return Rope(float(theta), kind, float(_require(found, path, "factor")["factor"]))
  values = _require(found, path, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  return Rope(float(theta), kind, **values)


def _bert(raw: Mapping[str, Any], path: Path) -> BertConfig:
  sizes = _require(raw, path, *_SIZES)
  if sizes["hidden_size"] % sizes["num_attention_heads"]:
    raise ValueError(f"{path}: hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads {sizes['num_attention_heads']}")
  config = BertConfig(**sizes, **_optional(raw, "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_act"))
  for name, allowed in (("position_embedding_type", ("absolute",)), ("is_decoder", (False,)), ("hidden_act", _BERT_ACTIVATIONS)):
    if raw.get(name, allowed[0]) not in allowed:
      raise ValueError(f"{path}: {name} {raw[name]!r} is not supported for BERT; allowed are {', '.join(map(repr, allowed))}")
  return config
