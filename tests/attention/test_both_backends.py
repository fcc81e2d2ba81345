"""The same operands give the same statistics and the same values in both frameworks, axis for axis."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import core
import jax_backend
import torch_backend
from core import config
from core.config import ConfigWarning
from experiments import compare_backends, models
from tests.attention import operands
from tests.experiments import tiny

FORMATS = {name: config.preset(name)["quant_cfg"] for name in config.KV_PRESETS} | {
  "all": {
    "*q_bmm_quantizer": {"num_bits": 8},
    "*k_bmm_quantizer": {"num_bits": 6, "axis": (-3,)},
    "*v_bmm_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}},
  },
  "max_min": {"*[kv]_bmm_quantizer": {"num_bits": 8, "bias": {-2: None, -4: None, "type": "static", "method": "max_min"}}},
  "dynamic_bias": {"*[kv]_bmm_quantizer": {"num_bits": 8, "bias": {-2: None, -4: None, "type": "dynamic"}}},
}


def _config(name: str) -> dict[str, Any]:
  return {"quant_cfg": {"default": operands.OFF, **FORMATS[name]}, "algorithm": "max"}


@pytest.mark.parametrize("name", FORMATS)
def test_operands_are_bit_identical(name: str) -> None:
  batches = [operands.inputs(0), operands.inputs(1, offset=-0.5)]
  model: Any = operands.on_torch(_config(name), batches)
  qmodule, qvariables = operands.on_jax(_config(name), batches)
  ours, theirs = torch_backend.quantizers(model), jax_backend.quantizers(qvariables)
  assert list(theirs) == [f"attn.{role}_bmm_quantizer" for role in "qkv"] and set(theirs) < set(ours)
  for key, quantizer in theirs.items():
    for field in ("amax", "bias_value"):
      a, b = getattr(ours[key], field), getattr(quantizer, field)
      assert (a is None) == (b is None), (key, field)
      if a is not None:
        assert np.array_equal(a.numpy(), np.asarray(b)) and a.shape == b.shape, (key, field)
  fresh = operands.inputs(2)
  got = model["attn"](*map(torch.from_numpy, fresh))
  eager, jitted = qmodule.apply(qvariables, *fresh), jax.jit(qmodule.apply)(qvariables, *fresh)
  for plain, a, b, c in zip(fresh, got, eager, jitted, strict=True):
    assert a.numpy().tobytes() == np.asarray(b).tobytes() == np.asarray(c).tobytes()
    assert name == "NVFP4_KV_ROTATE_CFG" or plain is fresh[0] or not np.array_equal(plain, a.numpy())


def test_bias_is_one_value_per_head_and_channel() -> None:
  batch = operands.inputs()
  model: Any = operands.on_torch(_config("FP8_AFFINE_KV_CFG"), [batch])
  bias: Any = model["attn"].v_bmm_quantizer.bias_value
  assert bias is not None and bias.shape == (1, 3, 1, 32)
  # A float64 mean in numpy's order; the bias is a float32 sum in a fixed order of 14 terms, each rounded to 2^-24.
  np.testing.assert_allclose(bias.numpy()[0, :, 0], batch[2].astype(np.float64).mean((0, 1)), rtol=14 * 2**-24, atol=1e-7)


def test_each_operand_has_its_own_quantizer() -> None:
  batch = operands.inputs()
  for role, plain, position in zip("qkv", batch, range(3), strict=True):
    rules = {"default": operands.OFF, f"*{role}_bmm_quantizer": {"num_bits": (4, 3)}}
    wanted = [x.tobytes() for x in batch]
    wanted[position] = core.fake_quantize(plain, core.QuantSpec.named("fp8_e4m3"), np.abs(plain).max()).tobytes()
    model: Any = operands.on_torch({"quant_cfg": rules, "algorithm": "max"}, [batch])
    assert [y.numpy().tobytes() for y in model["attn"](*map(torch.from_numpy, batch))] == wanted
    qmodule, qvariables = operands.on_jax({"quant_cfg": rules, "algorithm": "max"}, [batch])
    assert [np.asarray(y).tobytes() for y in qmodule.apply(qvariables, *batch)] == wanted


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.llama_folder(tmp_path_factory.mktemp("llama") / "model", head_dim=16)


@pytest.mark.parametrize("name", ["FP8_AFFINE_KV_CFG", pytest.param("NVFP4_FP8_MHA_CONFIG", marks=pytest.mark.slow)])
def test_llama_in_three_forms(llama: Path, name: str) -> None:
  """transformers, the plain torch twin and Flax: the same names, and logits as close as sums in other orders are."""
  ids = tiny.tokens(2, 9)
  fragment = config.preset(name)
  full = fragment if "algorithm" in fragment else config.update_quant_cfg_with_kv_cache_quant(torch_backend.INT8_WEIGHT_ONLY_CFG, fragment)
  tokens = torch.from_numpy(ids).long()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    hf, twin = (torch_backend.quantize(load(llama)[0], full, lambda m: m(tokens)) for load in (models.load_torch, models.load_torch_twin))
    module, variables, _ = models.load_jax(llama)
    qmodule, qvariables = jax_backend.quantize(module, variables, full, lambda m: m(ids))
  names = [set(torch_backend.quantizers(hf)), set(torch_backend.quantizers(twin)), set(jax_backend.quantizers(qvariables))]
  assert names[0] == names[1] == names[2] and "model.layers.1.self_attn.p_bmm_quantizer" in names[0]
  rows = {row["name"]: row for row in torch_backend.summary(hf)}
  assert rows["model.layers.0.self_attn.k_bmm_quantizer"]["state"] == "calibrated"
  with torch.no_grad():
    a, b = hf(tokens).logits.numpy(), twin(tokens).numpy()
  c, d = np.asarray(qmodule.apply(qvariables, ids)), np.asarray(jax.jit(qmodule.apply)(qvariables, ids))
  # Sums in another order move a few operands over a rounding boundary: a step of E2M1 is up to a quarter of a value.
  limit = 1e-4 if name == "FP8_AFFINE_KV_CFG" else 0.1 * float(np.abs(a).max())
  assert all(float(np.abs(a - other).max()) <= limit for other in (b, c, d))
  for role in "qkvp":
    key = f"model.layers.0.self_attn.{role}_bmm_quantizer"
    x, y = torch_backend.quantizers(hf)[key].amax, jax_backend.quantizers(qvariables)[key].amax
    if x is not None:
      np.testing.assert_allclose(x.numpy(), np.asarray(y), rtol=1e-4)  # float32 sums of 24 products in another order


def test_padding_is_left_out(llama: Path) -> None:
  ids = tiny.tokens(2, 9)
  ids[1, 6:] = 0
  mask = np.ones((2, 9), np.int32)
  mask[1, 6:] = 0
  rules = {"default": operands.OFF, "*[kv]_bmm_quantizer": {"num_bits": (4, 3)}}
  made = {"quant_cfg": rules, "algorithm": {"method": "max", "exclude_padding": True}}
  seen: dict[str, torch.Tensor] = {}
  model: Any = models.load_torch(llama)[0]
  torch_backend.quantize(model, made, lambda m: m(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)))
  module, variables, _ = models.load_jax(llama)
  _, qvariables = jax_backend.quantize(module, variables, made, lambda m: m(ids, attention_mask=mask))
  quantizers: dict[str, Any] = dict(torch_backend.quantizers(model))
  handles = [q.register_forward_pre_hook(lambda q, x: seen.update({str(q.name): x[0]})) for n, q in quantizers.items() if "bmm" in n]
  for quantizer in quantizers.values():
    quantizer.disable_quant()
  with torch.no_grad():
    model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask))
  assert handles and len(seen) == 6
  for layer in range(2):
    name = f"model.layers.{layer}.self_attn.v_bmm_quantizer"
    kept = seen[name].transpose(1, 2)[torch.from_numpy(mask).bool()]
    assert float(quantizers[name].amax) == float(kept.abs().max())
    np.testing.assert_allclose(float(jax_backend.quantizers(qvariables)[name].amax), float(kept.abs().max()), rtol=1e-5)


@pytest.mark.slow
def test_compare_backends_sees_the_cache(llama: Path, tmp_path: Path) -> None:
  """The experiment compares the codes of keys and values too, axis for axis."""
  merged = config.update_quant_cfg_with_kv_cache_quant(config.preset("INT8_DEFAULT_CFG"), config.preset("NVFP4_KV_CFG"))
  config.save_config(merged, tmp_path / "cache.json")
  (tmp_path / "text.txt").write_text(" ".join(f"w{i % tiny.VOCABULARY}" for i in range(300)))
  sizes = {"tokens": 24, "window_tokens": 12, "calib_samples": 2, "calib_tokens": 12, "carrier": "float64"}
  document = compare_backends.run(
    compare_backends.Options(
      model=str(llama), text_file=str(tmp_path / "text.txt"), config=(str(tmp_path / "cache.json"),), out="", **sizes
    )
  )
  rows = {row["name"]: row for row in document["results"][0]["rows"]}
  assert document["passed"] and document["activation_codes_differing"] == 0
  assert rows["model.layers.1.self_attn.k_bmm_quantizer"]["codes_compared"] == 24 * 2 * 16
