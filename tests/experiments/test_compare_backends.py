"""experiments.compare_backends on a tiny random Llama: equal where it must be, and red where a backend is broken."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch

from core.config import preset, save_config
from experiments import carrier, compare_backends, floor, on_jax, on_torch, parity, setup
from experiments.quantities import Codes, Leaf, differing
from jax_backend import quantizer as jax_quantizer
from tests.experiments.tiny import VOCABULARY, llama_folder

# hidden 24, ffn 40, 4 heads of 8 over 2 keys, 2 layers: 2 * (24*32 + 2*24*16 + 32*24 + 3*24*40)
WEIGHTS = 2 * (24 * 32 + 2 * 24 * 16 + 32 * 24 + 3 * 24 * 40)
# per token: q, k, v, gate and up read 24 values, o 32, down 40
ACTIVATIONS = 2 * (5 * 24 + 32 + 40)
TOKENS = 40


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """(Llama folder, text file)."""
  root = tmp_path_factory.mktemp("compare")
  words = np.random.default_rng(0).integers(0, VOCABULARY, 2000)
  (root / "text.txt").write_text(" ".join(f"w{i}" for i in words))
  return llama_folder(root / "llama"), root / "text.txt"


def options(places, *names, **changes):
  sizes = {"tokens": TOKENS, "window_tokens": 16, "calib_samples": 2, "calib_tokens": 16}
  return compare_backends.Options(model=str(places[0]), text_file=str(places[1]), **{**sizes, "config": names, "out": "", **changes})


def test_float32_what_must_be_equal_is(places, tmp_path, capsys, compared):
  # AWQ's scales follow statistics that come through matmuls; two formats in sequence under max do not.
  sequential = tmp_path / "w4a8_max.json"
  save_config(preset("W4A8_AWQ_BETA_CFG") | {"algorithm": "max"}, sequential)
  configs = ("INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", str(sequential))
  chosen = options(places, *configs, out=str(tmp_path))
  assert compare_backends.main(chosen) == 0
  assert "FAILED" not in capsys.readouterr().out
  document = json.loads((tmp_path / "compare.json").read_text())
  assert document["passed"] and document["weight_codes_differing"] == document["activation_codes_differing"] == 0
  assert document["weight_codes_compared"] == len(configs) * WEIGHTS
  assert document["activation_codes_compared"] == len(configs) * TOKENS * ACTIVATIONS
  assert document["logits_max_abs_diff"] > 0 and document["command"].startswith("python -m experiments.compare_backends")
  for result in document["results"]:
    assert result["quantizers"] == len(result["rows"]) == 2 * 7 * 2
    assert all(row["spec_equal"] and row["codes_compared"] > 0 for row in result["rows"])
    assert len(result["layers"]) == 16 and result["floor_logits_rms_diff"] > 0  # 7 a layer, the embedding and the head
  compared(document["weight_codes_compared"] + document["activation_codes_compared"])


def test_float64_every_code_of_the_model_is_equal(places, compared):
  document = compare_backends.run(options(places, "INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", carrier="float64"))
  assert document["passed"] and document["activation_codes_differing"] == 0
  assert document["activation_codes_compared"] == 2 * TOKENS * ACTIVATIONS
  assert document["logits_max_abs_diff"] < 1e-12
  for result in document["results"]:
    assert result["floor_codes_differing"] == 0 and all(row["amax_equal"] for row in result["rows"])
  assert not jax.config.jax_enable_x64, "64-bit types must be off again"
  compared(document["weight_codes_compared"] + document["activation_codes_compared"])


def _break_weight(quantized):
  params = quantized.variables["params"]
  dense = params["model"]["layers_1"]["mlp"]["up_proj"]
  kernel = dense["kernel"].at[3, 5].add(0.5)
  layer = {**params["model"]["layers_1"], "mlp": {**params["model"]["layers_1"]["mlp"], "up_proj": {**dense, "kernel": kernel}}}
  quantized.variables = {**quantized.variables, "params": {**params, "model": {**params["model"], "layers_1": layer}}}


def _change(quantized, name, fn):
  quantized.map_quantizers(lambda own, q: fn(q) if own == name else q)


Q_PROJ = "model.layers.0.self_attn.q_proj"
BROKEN = {
  "a weight": _break_weight,
  "a weight's amax by one part in 10^7": lambda m: _change(m, f"{Q_PROJ}.weight_quantizer", lambda q: q.with_amax(q.amax * (1 + 2e-7))),
  "an input's amax": lambda m: _change(m, f"{Q_PROJ}.input_quantizer", lambda q: q.with_amax(q.amax * 1.01)),
  "a quantizer that is off": lambda m: _change(m, f"{Q_PROJ}.input_quantizer", lambda q: q.disable()),
  "another format": lambda m: _change(
    m, f"{Q_PROJ}.weight_quantizer", lambda q: q.replace(config=q.config.replace(spec=q.config.spec.replace(bound=127.5))).with_amax(q.amax)
  ),
}
MESSAGES = {
  "a weight": "weight codes differing",
  "a weight's amax by one part in 10^7": "calibrated amax differs in 1 quantizers",
  "an input's amax": "amax",
  "a quantizer that is off": "enabled only in torch",
  "another format": "other specifications",
}


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("fault", BROKEN)
def test_control_a_broken_state_is_found(places, monkeypatch, capsys, fault, kind):
  quantize = on_jax.Model.quantize

  def broken(self, *args):
    quantized = quantize(self, *args)
    BROKEN[fault](quantized)
    return quantized

  monkeypatch.setattr(on_jax.Model, "quantize", broken)
  assert compare_backends.main(options(places, "INT8_DEFAULT_CFG", carrier=kind, tokens=16, floor_orders=0)) == 1
  printed = capsys.readouterr().out
  assert "FAILED" in printed and MESSAGES[fault] in printed


def test_control_broken_arithmetic_is_found(places, monkeypatch):
  """A quantizer whose values are right but for one element in a tensor; its codes and scales are untouched."""
  call = jax_quantizer.Quantizer._quantize

  def broken(self, x, key):
    y = call(self, x, key)
    return y if self.param is not None else y.at[(0,) * y.ndim].multiply(1.25)

  monkeypatch.setattr(jax_quantizer.Quantizer, "_quantize", broken)
  document = compare_backends.run(options(places, "INT8_DEFAULT_CFG", tokens=16, floor_orders=0))
  (failures,) = [result["failures"] for result in document["results"]]
  assert any("activation values differing" in failure for failure in failures) and any("do not decode" in failure for failure in failures)


def test_control_a_logit_without_a_differing_code(places, monkeypatch):
  """With a float64 carrier equal codes and far logits mean that something outside the quantizers is wrong."""
  run = on_jax.Quantized.run
  monkeypatch.setattr(on_jax.Quantized, "run", lambda self, *args: run(self, *args) + 1e-6)
  document = compare_backends.run(options(places, "INT8_DEFAULT_CFG", tokens=16, floor_orders=0, carrier="float64"))
  assert [f for r in document["results"] for f in r["failures"]] == ["no code differs, yet logits are 1e-06 apart; allowed is 1e-09"]


def test_a_float64_amax_that_differs_is_replaced_and_reported(places):
  windows = [np.random.default_rng(0).integers(0, VOCABULARY, (1, 16)).astype(np.int32)]
  config = setup.read_configs(["INT8_DEFAULT_CFG"])[0]
  with carrier.precision("float64"):
    models = {b: setup.load(b, str(places[0]), "float64", twin=True).quantize(config.value, windows) for b in setup.BACKENDS}
    BROKEN["an input's amax"](models["jax"])
    result = parity.compare_models("x", models["torch"], models["jax"], windows, parity.Settings("float64", 0, 0, None))
  assert len(result["failures"]) == 1 and "amax of 1 activation quantizers differs" in result["failures"][0]
  assert result["activation_codes_differing"] == 0 and result["logits_max_abs_diff"] < 1e-12


def test_permuted_sums_change_the_order_and_nothing_else():
  torch.manual_seed(0)
  x, layer = torch.randn(8, 300), torch.nn.Linear(300, 50)
  plain = layer(x)
  with floor.PermutedSums(1):
    once, again, wide = layer(x), layer(x), layer.double()(x.double())
  assert torch.equal(once, again) and not torch.equal(once, plain)
  # 300 products of float64: a few times 2^-53 of their sum of magnitudes.
  torch.testing.assert_close(wide, layer(x.double()), rtol=0, atol=1e-13)
  torch.testing.assert_close(once, plain, rtol=0, atol=1e-5)


def test_permuted_sums_reach_every_matmul():
  torch.manual_seed(0)
  a, b = torch.randn(2, 5, 200), torch.randn(2, 7, 200)
  v = torch.randn(2, 7, 200)
  products = {
    "linear": lambda: torch.nn.functional.linear(a, b[0], torch.ones(7)),
    "matmul": lambda: torch.matmul(a, b.mT),
    "method": lambda: a.matmul(b.mT),
    "operator": lambda: a @ b.mT,
    "vector": lambda: a @ b[0, 0],
    "einsum": lambda: torch.einsum("btd,bsd->bts", a, b),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(a, b, v),
  }
  for name, product in products.items():
    plain = product()
    with floor.PermutedSums(0):
      other = product()
    # 200 products of about 1: some 1e-5; and another order must show somewhere in the bits.
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-4)
    assert not torch.equal(plain, other), name


def test_differing_counts_bits():
  one = np.array([0.0, 1.0, np.nan], np.float32)
  assert differing(one, one.copy()) == 0 and differing(one, -one) == 3
  assert differing(one, np.append(one, 1).astype(np.float32)) == 4
  with pytest.raises(TypeError, match="float32 with float64"):
    differing(one, one.astype(np.float64))


def test_weights_that_only_one_side_has_are_skipped():
  from experiments.quantities import Weight

  def named(*names):
    return iter([Weight(n, None, None, ()) for n in names])

  found = parity.pairs(named("a", "b", "d"), named("b", "c", "d", "e"))
  assert [(one.name, other.name) for one, other in found] == [("b", "b"), ("d", "d")]


def test_static_block_scales_fit_any_batch():
  from core.config import QuantizerConfig

  config = QuantizerConfig.from_attributes({"num_bits": 8, "block_sizes": {-1: 8}})
  amax = np.array([[1.0, 2.0]], np.float32)
  x = np.linspace(-1, 1, 3 * 5 * 16, dtype=np.float32).reshape(3, 5, 16)
  leaves = (Leaf(config, amax, None),)
  one, other = on_torch.encode(x, leaves), on_jax.encode(x, leaves)
  assert one.scale.shape == (3, 5, 2) and isinstance(one, Codes)
  assert differing(one.codes, other.codes) == differing(one.scale, other.scale) == 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [({"tokens": 0}, "--tokens=0"), ({"tokens": 5000}, "windows of 16"), ({"config": ("NO_CFG",)}, "NO_CFG")],
)
def test_mistakes(places, changes, message):
  with pytest.raises(ValueError, match=message):
    compare_backends.run(options(places, **{"config": ("INT8_DEFAULT_CFG",), **changes}))


@pytest.mark.models
def test_smollm2_weights_and_inputs_are_equal(compared):
  document = compare_backends.run(
    compare_backends.Options(config=("NVFP4_DEFAULT_CFG",), tokens=16, calib_samples=1, calib_tokens=16, out="")
  )
  assert document["passed"] and document["weight_codes_compared"] == 106_168_320
  compared(document["weight_codes_compared"] + document["activation_codes_compared"])
