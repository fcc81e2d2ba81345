"""Layout "gguf": Q8_0 and MXFP4 blocks of a Llama in one file, as llama.cpp and transformers read them. Both directions of every block.

Q8_0 is symmetric INT8 in blocks of 32 with a float16 scale: `{"num_bits": 8, "block_sizes": {-1: 32, "scale_bits": (5, 10)}}`. Its scale
is amax / 127, rounded to float32 and then to float16, as ggml's. MXFP4 is E2M1 in blocks of 32 with an E8M0 scale, under any of its rules.

References: ggml, ggml-common.h (block_q8_0, block_mxfp4), ggml-quants.c; llama.cpp, convert_hf_to_gguf.py (LlamaModel).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from core import formats
from core.export.layout import Planned, divides
from core.export.source import Granularity, Refusal, Stage, Subject, granularity
from core.formats import IntFormat
from core.quantize import QuantizedTensor
from core.spec import QuantSpec
from core.tensor_header import Entry

NAME = "gguf"
FILE = "model.gguf"
BLOCK = 32
BYTES = {"Q8_0": 34, "MXFP4": 17}  # of a block: float16 and 32 codes; one exponent and 32 nibbles
SPECS = {
  "Q8_0": QuantSpec(formats.INT8, blocks=((-1, BLOCK),), scale_format=formats.FLOAT16),
  "MXFP4": QuantSpec.named("mxfp4"),
}
_INNER = {
  "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_TO_INNER = {hf: name for name, hf in _INNER.items()}
_TO_OUTER = {hf: name for name, hf in _OUTER.items()}


# -- names -------------------------------------------------------------------------------------------------------------------------


def gguf_name(name: str) -> str | None:
  """ "model.layers.3.self_attn.q_proj.weight" is "blk.3.attn_q.weight"; None is no tensor of a plain Llama."""
  module, _, leaf = name.rpartition(".")
  if leaf != "weight":
    return None
  if module in _TO_OUTER:
    return f"{_TO_OUTER[module]}.weight"
  found = _LAYER.fullmatch(module)
  return f"blk.{found[1]}.{_TO_INNER[found[2]]}.weight" if found and found[2] in _TO_INNER else None


def checkpoint_name(name: str) -> str | None:
  """The inverse of `gguf_name`."""
  kind, _, leaf = name.rpartition(".")
  if leaf != "weight":
    return None
  if kind in _OUTER:
    return f"{_OUTER[kind]}.weight"
  parts = kind.split(".")
  known = len(parts) == 3 and parts[0] == "blk" and parts[1].isascii() and parts[1].isdecimal() and parts[2] in _INNER
  return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.weight" if known else None


def heads_of(name: str, heads: int, kv_heads: int) -> int | None:
  """Heads whose rows llama.cpp interleaves: those of the weights q and k, by their checkpoint name; None of every other tensor."""
  return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])


def interleaved(x: np.ndarray, heads: int | None) -> np.ndarray:
  """Rows of q and k as llama.cpp wants them: it rotates neighbouring channels, Hugging Face channel i with i + head_dim / 2."""
  if heads is None:
    return x
  return np.ascontiguousarray(x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape))


def halved(x: np.ndarray, heads: int | None) -> np.ndarray:
  """The inverse of `interleaved`."""
  if heads is None:
    return x
  return np.ascontiguousarray(x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape))


# -- plan --------------------------------------------------------------------------------------------------------------------------


def plan(subject: Subject) -> Planned:
  """How one layer is written.

  Raises:
    Refusal: GGUF has no place for it.
  """
  if gguf_name(f"{subject.label}.weight") is None:
    raise Refusal("it is no layer of a Llama, the only architecture that is written as GGUF")
  first, *more = subject.weights
  if more:
    raise Refusal("its weight passes several formats in sequence")
  if subject.inputs:
    raise Refusal("its input is quantized, and a GGUF file says nothing about inputs; switch the input quantizers off")
  if subject.scale is not None:
    raise Refusal("it has a pre_quant_scale; fold it before exporting (fold_pre_quant_scale)")
  if subject.low_rank is not None:
    raise Refusal("it has a low-rank branch")
  kind = block_type(subject.spec, first.config.describe())
  divides(subject.shape, BLOCK)
  outputs, columns = subject.shape
  entry = Entry("U8", (outputs, columns // BLOCK * BYTES[kind]))
  return Planned({"format": kind}, {"weight": entry}, lambda q: {"weight": to_blocks(q, kind)})


def block_type(spec: QuantSpec, text: str) -> str:
  """ "Q8_0" or "MXFP4".

  Args:
    spec: of the weight.
    text: what messages call it.

  Raises:
    Refusal: neither.
  """
  blocks = granularity(spec) == Granularity("group", (BLOCK,))
  if spec.is_mx and spec.element == formats.E2M1 and blocks:
    return "MXFP4"
  element = spec.element
  whole = isinstance(element, IntFormat) and element.bits == 8 and element.signed and not spec.zero_point
  if whole and blocks and spec.scale_format == formats.FLOAT16:
    return "Q8_0"
  hint = " (8-bit blocks of 32 lack only the float16 scale)" if whole and blocks and spec.scale_format is None else ""
  raise Refusal(
    f"{text} is neither Q8_0, which is {{'num_bits': 8, 'block_sizes': {{-1: 32, 'scale_bits': (5, 10)}}}}, nor MXFP4 in blocks of 32{hint}"
  )


def cache_args(stage: Stage) -> tuple[dict[str, Any], str]:
  """Raises:
  Refusal: always.
  """
  raise Refusal(f"a key/value cache of {stage.config.describe()}; GGUF files say nothing about caches")


# -- blocks ------------------------------------------------------------------------------------------------------------------------


def to_blocks(q: QuantizedTensor, kind: str) -> np.ndarray:
  """Scales and codes side by side, as ggml stores them.

  Args:
    q: [N, K], codes and scales.
    kind: "Q8_0" or "MXFP4".

  Returns:
    [N, K/32 * bytes of a block] uint8.
  """
  rows, columns = q.shape
  codes = np.asarray(q.codes).reshape(rows, columns // BLOCK, BLOCK)
  if kind == "Q8_0":
    first = np.asarray(q.scale, "<f2").reshape(rows, -1, 1).view(np.uint8)  # exact: it is a float16 already
    rest = codes.astype(np.int8).view(np.uint8)
  else:
    first = np.asarray(q.scale, np.uint8).reshape(rows, -1, 1)
    nibbles = codes.astype(np.uint8) & 0xF
    rest = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)  # by halves, not neighbours
  return np.concatenate([first, rest], axis=-1).reshape(rows, -1)


def from_blocks(data: np.ndarray, kind: str, shape: tuple[int, int]) -> QuantizedTensor:
  """The inverse of `to_blocks`.

  Args:
    data: [N, K/32 * bytes of a block] uint8.
    kind: "Q8_0" or "MXFP4".
    shape: [N, K].

  Raises:
    ValueError: a scale is no finite number.
  """
  rows, columns = shape
  blocks = data.reshape(rows, columns // BLOCK, BYTES[kind])
  if kind == "Q8_0":
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").reshape(blocks.shape[:2]).astype(np.float32)
    finite = bool(np.isfinite(scale).all())
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
  else:
    scale = np.ascontiguousarray(blocks[..., 0])
    finite = bool((scale != 255).all())
    codes = np.concatenate([blocks[..., 1:] & 0xF, blocks[..., 1:] >> 4], axis=-1)
  if not finite:
    raise ValueError(f"a scale of a {kind} block is not finite")
  return QuantizedTensor(codes.reshape(shape), scale, None, None, SPECS[kind], shape)
