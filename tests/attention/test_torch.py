"""Attention modules of torch and transformers: what each quantizer sees, and what comes out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_backend
from core.config import ConfigWarning, update_quant_cfg_with_kv_cache_quant
from torch_backend.attention import QuantAttention
from torch_backend.modules.attention import explicit

OFF = {"enable": False}
DIFFERENT = {
  "default": OFF,
  "*q_bmm_quantizer": {"num_bits": 8},
  "*k_bmm_quantizer": {"num_bits": 6},
  "*v_bmm_quantizer": {"num_bits": 4},
}
WITH_P = {**DIFFERENT, "*p_bmm_quantizer": {"num_bits": (4, 3)}}
IDS = torch.arange(18).reshape(2, 9) % 31


def config(rules: dict[str, Any]) -> dict[str, Any]:
  return {"quant_cfg": rules, "algorithm": "max"}


def llama(implementation: str = "sdpa") -> Any:
  import transformers

  sizes: dict[str, Any] = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
  made = transformers.LlamaConfig(
    **sizes,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.3,
    max_position_embeddings=64,
    eos_token_id=None,
  )
  made._attn_implementation = implementation
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(made).eval()


def shown(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
  """(input, output) of every bmm quantizer in the calls to come."""
  found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
  for name, quantizer in torch_backend.quantizers(model).items():
    if name.endswith("bmm_quantizer"):
      quantizer.register_forward_hook(lambda q, x, y, name=name: found.update({name.rpartition(".")[2][0]: (x[0], y)}))
  return found


def _held(model: nn.Module) -> list[Any]:
  return list(torch_backend.quantizers(model).values())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_transformers_attention(implementation: str) -> None:
  """Queries and keys behind their rotary embedding, values as projected, and the output is that of the quantized three."""
  from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

  model = llama(implementation)
  before = model.config.to_dict()
  torch_backend.quantize(model, config(DIFFERENT), lambda m: m(IDS))
  attention = model.model.layers[0].self_attn
  found = shown(attention)
  into, out, rotary = [], [], []
  attention.o_proj.register_forward_pre_hook(lambda m, x: out.append(x[0]))
  attention.k_proj.register_forward_pre_hook(lambda m, x: into.append(x[0]))
  attention.register_forward_pre_hook(lambda m, a, k: rotary.append(k["position_embeddings"]), with_kwargs=True)
  model(IDS)
  heads = [proj(into[0]).unflatten(-1, (-1, 16)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)]
  q, k = apply_rotary_pos_emb(heads[0], heads[1], *rotary[0])
  for role, x in (("q", q), ("k", k), ("v", heads[2])):
    assert torch.equal(found[role][0], x), role
    quantizer = attention.bmm_quantizer(role)
    assert torch.equal(quantizer.amax, x.abs().max()) and not torch.equal(found[role][1], x)
  q, k, v = (found[role][1] for role in "qkv")
  wanted = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
  # Two ways to sum 16 products and 9 weighted values in float32; sdpa itself is one of them.
  torch.testing.assert_close(out[0], wanted.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)
  assert model.config.to_dict() == before and model.config._attn_implementation == implementation


@torch.no_grad()
def test_probabilities() -> None:
  model = llama()
  torch_backend.quantize(model, config(WITH_P), lambda m: m(IDS))
  found, out = shown(model.model.layers[1]), []
  model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, x: out.append(x[0]))
  model(IDS)
  q, k, v = (found[role][1] for role in "qkv")
  scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
  torch.testing.assert_close(found["p"][0], scores.softmax(-1), rtol=1e-5, atol=1e-6)  # softmax of a sum in another order
  assert torch.equal(out[0], (found["p"][1] @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))
  padded = torch.ones_like(IDS)
  padded[0, :4] = 0
  eager = llama("eager")
  torch_backend.quantize(eager, config(WITH_P), lambda m: m(IDS))
  a, b = (m(IDS, attention_mask=padded).logits[1] for m in (model, eager))
  torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # a bool mask and an added one: the same sums


def test_probabilities_are_refused_where_they_cannot_be_seen() -> None:
  model = llama()
  torch_backend.quantize(model, config(WITH_P), lambda m: m(IDS))
  model.set_attn_implementation("flex_attention")
  with pytest.raises(
    ValueError, match=r"self_attn.p_bmm_quantizer' cannot quantize probabilities with attn_implementation='flex_attention'"
  ):
    model.model.layers[0].self_attn(torch.zeros(1, 3, 32), position_embeddings=(torch.ones(1, 3, 16), torch.zeros(1, 3, 16)))


@pytest.mark.parametrize("name", ["FP8_KV_CFG", "NVFP4_AFFINE_KV_CFG", "NVFP4_KV_ROTATE_CFG"])
@torch.no_grad()
def test_a_cache_gives_what_a_full_pass_gives(name: str) -> None:
  """A token is rounded to the same codes whether it comes first or stands in the cache."""
  model = llama()
  merged = update_quant_cfg_with_kv_cache_quant(
    {"quant_cfg": {"default": OFF}, "algorithm": "max"}, torch_backend.preset(name)["quant_cfg"]
  )
  torch_backend.quantize(model, merged, lambda m: m(IDS))
  full = model(IDS).logits
  start = model(IDS[:, :8], use_cache=True)
  step = model(IDS[:, 8:], past_key_values=start.past_key_values).logits
  # Values round to other codes where a sum over 16 in another order crosses a boundary; here none does.
  torch.testing.assert_close(step[:, 0], full[:, 8], rtol=1e-4, atol=1e-4)
  assert torch.equal(model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False), _greedy(model, IDS[:1, :4], 4))


def _greedy(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
  for _ in range(count):
    ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
  return ids


@torch.no_grad()
def test_compiled_copied_saved_and_switched_off(tmp_path: Path) -> None:
  model = llama()
  plain = model(IDS).logits
  torch_backend.quantize(model, config(WITH_P), lambda m: m(IDS))
  quantized = model(IDS).logits
  assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(IDS).logits, quantized)
  assert torch.equal(copy.deepcopy(model)(IDS).logits, quantized)
  torch_backend.save(model, tmp_path)
  assert torch.equal(torch_backend.restore(llama(), tmp_path)(IDS).logits, quantized)
  torch_backend.disable_quantizer(model, "*bmm_quantizer")
  assert torch.equal(model(IDS).logits, plain) and model.model.layers[0].self_attn.config is model.config


class Sdpa(nn.Module):
  """Attention as many write it."""

  def __init__(self) -> None:
    super().__init__()
    self.qkv = nn.Linear(32, 96)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rules", [DIFFERENT, WITH_P])
@torch.no_grad()
def test_unmodified_module_that_calls_sdpa(rules: dict[str, Any]) -> None:
  torch.manual_seed(0)
  torch_backend.register_attention(Sdpa, sdpa=True)
  try:
    x = torch.randn(2, 5, 32)
    model: Any = nn.Sequential(Sdpa())
    torch_backend.quantize(model, config(rules), lambda m: m(x))
  finally:
    torch_backend.unregister(Sdpa)
  found = shown(model)
  y = model(x)
  assert isinstance(model[0], QuantAttention) and sorted(found) == (["k", "p", "q", "v"] if rules is WITH_P else ["k", "q", "v"])
  q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in model[0].qkv(x).chunk(3, -1))
  assert all(torch.equal(found[role][0], x) for role, x in (("q", q), ("k", k), ("v", v)))
  q, k, v = (found[role][1] for role in "qkv")
  wanted = found["p"][1] @ v if rules is WITH_P else F.scaled_dot_product_attention(q, k, v, is_causal=True)
  assert torch.equal(y, wanted.transpose(1, 2).flatten(2))
  assert torch.equal(torch.compile(model, backend="eager")(x), y)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"batch_first": True, "bias": False}])
@torch.no_grad()
def test_multihead_attention(options: dict[str, Any]) -> None:
  """With quantizers that let everything pass it is torch's own layer, masks and weights included; then it is not."""
  torch.manual_seed(0)
  model: Any = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **options)}).eval()
  float_model = copy.deepcopy(model)
  q, k, v = torch.randn(5, 3, 8), torch.randn(5, 3, options.get("kdim", 8)), torch.randn(5, 3, options.get("vdim", 8))
  tokens = 3 if options.get("batch_first") else 5
  mask = ~torch.ones(tokens, tokens, dtype=torch.bool).tril()
  padding = torch.zeros(8 - tokens, tokens, dtype=torch.bool)
  padding[0, -1] = True
  calls = [{}, {"need_weights": False}, {"attn_mask": mask}, {"key_padding_mask": padding, "average_attn_weights": False}]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    torch_backend.quantize(model, config({"default": OFF, "*bmm_quantizer": {"num_bits": 8}}), lambda m: model["attn"](q, k, v))
  for quantizer in _held(model):
    quantizer.disable_quant()
  for call in calls:
    got, wanted = model["attn"](q, k, v, **call), float_model["attn"](q, k, v, **call)
    for a, b in zip(got, wanted, strict=True):
      assert (a is None) == (b is None)
      if a is not None:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32 sums of 8 products in another order
  found = shown(model)
  for quantizer in _held(model):
    quantizer.enable_quant()
  torch_backend.set_quantizer_by_cfg(model, {key: value for key, value in WITH_P.items() if key != "default"})
  assert not torch.equal(model["attn"](q, k, v)[0], float_model["attn"](q, k, v)[0]) and sorted(found) == ["k", "p", "q", "v"]
  torch_backend.disable_quantizer(model, "*")
  assert torch.equal(model["attn"](q, k, v)[0], float_model["attn"](q, k, v)[0])


def test_multihead_attention_refusals() -> None:
  model: Any = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, add_zero_attn=True)})
  x = torch.randn(2, 3, 8)
  with warnings.catch_warnings(), pytest.raises(ValueError, match="add_bias_kv or add_zero_attn has no quantized form"):
    warnings.simplefilter("ignore", ConfigWarning)
    torch_backend.quantize(model, config(DIFFERENT), lambda m: model["attn"](x, x, x))


def test_gradients_pass() -> None:
  model = llama()
  torch_backend.quantize(model, config(WITH_P), lambda m: m(IDS))
  model(IDS, labels=IDS).loss.backward()
  for proj in ("q_proj", "k_proj", "v_proj"):
    assert float(getattr(model.model.layers[0].self_attn, proj).weight.grad.abs().sum()) > 0


def test_a_row_that_sees_nothing_stays_finite() -> None:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    model: Any = torch_backend.quantize(nn.Sequential(nn.MultiheadAttention(8, 2)), config(WITH_P))
  module = model[0]
  x = torch.randn(1, 2, 3, 4)
  y, p = explicit(module, x, x, x, torch.zeros(3, 3, dtype=torch.bool))
  assert bool(torch.isfinite(y).all()) and bool(torch.isfinite(p).all())


def test_wrong_role_or_layout() -> None:
  with pytest.raises(ValueError, match="role 'x' with layout 'bhtd' is unknown; roles are 'q', 'k', 'v', 'p', layouts 'bhtd', 'bthd'"):
    torch_backend.quantize_bmm(nn.Linear(1, 1), "x", torch.zeros(1))
  with pytest.raises(ValueError, match="layout 'tbhd'"):
    torch_backend.quantize_bmm(nn.Linear(1, 1), "k", torch.zeros(1), "tbhd")
