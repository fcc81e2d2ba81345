"""Attention modules of Flax: nn.MultiHeadDotProductAttention as it is, and the functions for modules of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import jax_backend

OFF = {"enable": False}
FORMATS = {"q": {"num_bits": 8}, "k": {"num_bits": 6}, "v": {"num_bits": 4}, "p": {"num_bits": (4, 3)}}
RULES = {"default": OFF} | {f"*{role}_bmm_quantizer": attributes for role, attributes in FORMATS.items()}
CONFIG = {"quant_cfg": RULES, "algorithm": "max"}
X = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
MASK = nn.make_causal_mask(np.ones((2, 5)))


class Encoder(nn.Module):
  """An unmodified layer of Flax in a model."""

  layer: Any = nn.MultiHeadDotProductAttention
  options: Any = ()

  @nn.compact
  def __call__(self, x: Any, mask: Any = None) -> Any:
    return self.layer(num_heads=2, name="attn", **dict(self.options))(x, mask=mask)


class Own(nn.Module):
  """The same with a module of one's own."""

  @nn.compact
  def __call__(self, x: Any, mask: Any = None) -> Any:
    heads = [nn.DenseGeneral((2, 8), name=name)(x) for name in ("query", "key", "value")]
    return nn.DenseGeneral(16, axis=(-2, -1), name="out")(jax_backend.dot_product_attention(self, *heads, mask=mask))


def by_hand(params: Any, quantizers: Any) -> np.ndarray:
  """Attention out of `core` alone, each operand with its own format and amax."""

  def quantized(role: str, x: Any) -> Any:
    x = np.asarray(x)
    spec = core.QuantSpec.from_attributes(FORMATS[role])
    amax = np.abs(x).max()
    np.testing.assert_allclose(np.asarray(quantizers[f"attn.{role}_bmm_quantizer"].amax), amax, rtol=1e-6)  # sums in another order
    return core.fake_quantize(x, spec, np.asarray(quantizers[f"attn.{role}_bmm_quantizer"].amax))

  q, k, v = (np.einsum("bte,ehd->bthd", X, params[n]["kernel"]) + params[n]["bias"] for n in ("query", "key", "value"))
  q, k, v = quantized("q", q), quantized("k", k), quantized("v", v)
  scores = jnp.where(MASK, jnp.einsum("bthd,bshd->bhts", q / np.sqrt(np.float32(8)), k), jnp.finfo(jnp.float32).min)
  y = jnp.einsum("bhts,bshd->bthd", quantized("p", jax.nn.softmax(scores)), v)
  return np.asarray(jnp.einsum("bthd,hde->bte", y, params["out"]["kernel"]) + params["out"]["bias"])


@pytest.mark.parametrize("layer", [nn.MultiHeadDotProductAttention, nn.MultiHeadAttention, nn.SelfAttention])
@pytest.mark.filterwarnings("ignore:.*SelfAttention.*:DeprecationWarning")
def test_unmodified_layers(layer: Any) -> None:
  module = Encoder(layer)
  variables = module.init(jax.random.key(0), X, MASK)
  qmodule, qvariables = jax_backend.quantize(module, variables, CONFIG, lambda m: m(X, MASK))
  quantizers = jax_backend.quantizers(qvariables)
  y = np.asarray(qmodule.apply(qvariables, X, MASK))
  # Another order of sums of 16 products; a value on a rounding boundary would show as 1e-2.
  np.testing.assert_allclose(y, by_hand(variables["params"]["attn"], quantizers), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(y, np.asarray(jax.jit(qmodule.apply)(qvariables, X, MASK)), rtol=1e-4, atol=1e-5)
  assert not np.allclose(y, np.asarray(module.apply(variables, X, MASK)), atol=1e-3)
  off = jax_backend.disable_quantizer(qvariables, "*")
  assert np.array_equal(np.asarray(qmodule.apply(off, X, MASK)), np.asarray(module.apply(variables, X, MASK)))


def test_own_module_is_the_same_as_flax() -> None:
  outer, own = Encoder(), Own()
  variables = outer.init(jax.random.key(0), X, MASK)
  a, b = (
    jax_backend.quantize(module, {"params": params}, CONFIG, lambda m: m(X, MASK))
    for module, params in ((outer, variables["params"]), (own, variables["params"]["attn"]))
  )
  assert np.array_equal(np.asarray(a[0].apply(a[1], X, MASK)), np.asarray(b[0].apply(b[1], X, MASK)))
  assert "p_bmm_quantizer" in jax_backend.quantizers(b[1])
  assert np.array_equal(np.asarray(own.apply({"params": variables["params"]["attn"]}, X)), np.asarray(outer.apply(variables, X)))


def test_options_of_the_layer() -> None:
  """Weights that are sown, einsums of the user's, a precision, and an attention function of one's own, whose probabilities no one sees."""

  def plain(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    return nn.dot_product_attention(query, key, value, mask=mask)

  einsums = {"qk_attn_weights_einsum_cls": lambda: jnp.einsum, "attn_weights_value_einsum_cls": lambda: jnp.einsum}
  variables = Encoder().init(jax.random.key(0), X)
  made = {}
  for name, options in {"plain": {}, "einsum": einsums, "precision": {"precision": "highest"}, "own": {"attention_fn": plain}}.items():
    module = Encoder(options=tuple(options.items()))
    rules = {**RULES, "*p_bmm_quantizer": OFF}
    qmodule, qvariables = jax_backend.quantize(module, variables, {"quant_cfg": rules, "algorithm": "max"}, lambda m: m(X))
    assert ("attn.p_bmm_quantizer" in jax_backend.quantizers(qvariables)) == (name != "own")
    made[name] = np.asarray(qmodule.apply(qvariables, X))
  for name, y in made.items():
    np.testing.assert_allclose(y, made["plain"], rtol=1e-5, atol=1e-6, err_msg=name)  # the same sums, perhaps in another order
  module = Encoder()
  qmodule, qvariables = jax_backend.quantize(module, variables, CONFIG, lambda m: m(X))
  _, held = qmodule.apply(qvariables, X, mutable=["intermediates"], capture_intermediates=True)
  assert "attn" in held["intermediates"]


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x: Any) -> Any:
    body = nn.remat(Step)
    return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(x, None)[0]


class Step(nn.Module):
  @nn.compact
  def __call__(self, x: Any, _: Any) -> Any:
    return x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x), None


def test_a_scanned_stack_has_one_amax_per_layer(tmp_path: Path) -> None:
  module = Scanned()
  variables = module.init(jax.random.key(0), X)
  qmodule, qvariables = jax_backend.quantize(module, variables, CONFIG, lambda m: m(X))
  name = "layers.attn.k_bmm_quantizer"
  amax = np.asarray(jax_backend.quantizers(qvariables)[name].amax)
  assert amax.shape == (3,) and len(set(amax.tolist())) == 3
  y = np.asarray(jax.jit(qmodule.apply)(qvariables, X))
  jax_backend.save(qmodule, qvariables, tmp_path)
  again = jax_backend.restore(module, variables, tmp_path, example_inputs=X)
  assert np.array_equal(np.asarray(jax_backend.quantizers(again[1])[name].amax), amax)
  assert np.array_equal(np.asarray(jax.jit(again[0].apply)(again[1], X)), y)
  grads = jax.grad(lambda p: jnp.sum(qmodule.apply({**qvariables, "params": p}, X) ** 2))(qvariables["params"])
  assert all(float(jnp.abs(grads["layers"]["attn"][part]["kernel"]).sum()) > 0 for part in ("query", "key", "value"))


def test_wrong_role_or_layout() -> None:
  with pytest.raises(ValueError, match="role 'x' with layout 'bthd' is unknown; roles are 'q', 'k', 'v', 'p'"):
    jax_backend.quantize_bmm(nn.Dense(1), "x", X)
