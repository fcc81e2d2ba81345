"""Calibration, what it says when something is wrong, editing, groups, summary, registration."""

from __future__ import annotations

import copy
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import jax_backend as jb
from jax_backend import groups
from tests.jax_backend import nets
from tests.jax_backend.test_bits import same_bits

SIBLING_CFG = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}


def test_amax_is_the_largest_over_all_batches_and_shapes(mlp):
  module, variables, x = mlp
  batches = [x, 3 * x[:2], x[:5]]
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: [model(b) for b in batches])
  found = jb.quantizers(qvariables)
  same_bits(found["up.input_quantizer"].amax, np.float32(max(np.abs(np.asarray(b)).max() for b in batches)))
  hidden = [nn.relu(b @ variables["params"]["up"]["kernel"] + variables["params"]["up"]["bias"]) for b in batches]
  np.testing.assert_allclose(found["down.input_quantizer"].amax, max(float(h.max()) for h in hidden), rtol=1e-6)  # matmul in another order
  again = jb.calibrate(qmodule, qvariables, "max", lambda model: model(10 * x))
  same_bits(jb.quantizers(again)["up.input_quantizer"].amax, np.float32(np.abs(10 * np.asarray(x)).max()))
  assert qvariables["params"] is variables["params"]


def test_runner_returns_what_the_module_returns(cnn):
  module, variables, x = cnn
  seen = []

  def loop(model):
    seen.append(model(x))
    seen.append(model(x=x, train=False))
    seen.append(model(x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}))

  jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, loop)
  # while statistics are gathered nothing is quantized; jit fuses differently than eager
  np.testing.assert_allclose(seen[0], module.apply(variables, x), atol=1e-5)
  np.testing.assert_allclose(seen[0], seen[1], atol=1e-6)
  assert set(seen[2][1]) == {"batch_stats"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_data_name_the_quantizer_and_change_nothing(mlp, bad):
  module, variables, x = mlp
  before = copy.deepcopy(jax.tree.map(np.asarray, variables))
  with pytest.raises(ValueError, match=r"'up.input_quantizer' holds 1 NaN or infinite"):
    jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: [model(x), model(x.at[0, 0].set(bad))])
  broken = jax.tree.map(lambda p: p.at[0].set(bad), variables)
  with pytest.raises(ValueError, match=r"weight_quantizer' holds \d+ NaN or infinite"):
    jb.quantize(module, broken, SIBLING_CFG, example_inputs=x)
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, variables))


def test_static_activations_without_data_warn_by_name_and_act_as_dynamic(mlp):
  module, variables, x = mlp
  with pytest.warns(jb.ConfigWarning, match=r"2 static activation quantizers have no amax .*up.input_quantizer"):
    jb.quantize(module, variables, jb.INT8_DEFAULT_CFG)
  module, variables = nn.Dense(24), {"params": variables["params"]["up"]}
  with pytest.warns(jb.ConfigWarning, match="1 static activation quantizers"):
    qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG)
  calibrated = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))[1]
  same_bits(qmodule.apply(qvariables, x), qmodule.apply(calibrated, x))


def test_errors_say_what_to_do(mlp, cnn):
  module, variables, x = mlp
  with pytest.raises(TypeError, match=r"flax\.linen\.Module"):
    jb.quantize("model", variables, jb.INT8_DEFAULT_CFG)
  with pytest.raises(ValueError, match="has no 'params'"):
    jb.quantize(module, variables["params"], jb.INT8_DEFAULT_CFG)
  with pytest.raises(ValueError, match="quantizes nothing"):
    jb.quantize(module, variables, {"quant_cfg": {"default": {"enable": False}}, "algorithm": None}, example_inputs=x)
  with pytest.raises(ValueError, match="never called the model"):
    jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: None)
  with pytest.raises(TypeError, match="forward_loop"):
    jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, 3)
  with pytest.raises(ValueError, match="call quantize"):
    jb.quantizers(variables)

  class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, a, b):
      return nn.Dense(3)(a + b)

  state = TwoInputs().init(jax.random.key(0), x, x)
  with pytest.raises(ValueError, match="example_inputs"):
    jb.quantize(TwoInputs(), state, SIBLING_CFG)
  for example in ((x, x), {"a": x, "b": jax.ShapeDtypeStruct(x.shape, x.dtype)}):
    assert "Dense.0.weight_quantizer" in jb.quantizers(jb.quantize(TwoInputs(), state, SIBLING_CFG, example_inputs=example)[1])
  blocks = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 5}, "pad": False}}, "algorithm": "max"}
  with pytest.raises(ValueError, match="block size 5 does not divide axis"):
    jb.quantize(module, variables, blocks, example_inputs=x)
  with pytest.raises(ValueError, match="calibrate with tensors of one layout"):
    kept = {"quant_cfg": {"*input_quantizer": {"num_bits": 8, "axis": 1}}, "algorithm": "max"}
    jb.quantize(nn.LayerNorm(), nn.LayerNorm().init(jax.random.key(0), x), kept, lambda model: [model(x), model(x[:, None])])


def test_registered_algorithm_runs(mlp):
  module, variables, x = mlp

  @jb.register_algorithm("test_half_max", options=("factor",))
  def half(qmodule, qvariables, forward_loop, create=None, factor=1.0):
    found = jb.max_calibrate(qmodule, qvariables, forward_loop, create)
    params = jax.tree.map(lambda leaf: leaf, found["quant"], is_leaf=lambda q: isinstance(q, jb.Quantizer))
    change = lambda q: q.with_amax(None if q.amax is None else q.amax * factor)  # noqa: E731
    return {**found, "quant": jax.tree.map(change, params, is_leaf=lambda q: isinstance(q, jb.Quantizer))}

  config = jb.INT8_DEFAULT_CFG.copy() | {"algorithm": {"method": "test_half_max", "factor": 0.5}}
  _, qvariables = jb.quantize(module, variables, config, lambda model: model(x))
  same_bits(jb.quantizers(qvariables)["up.input_quantizer"].amax, np.float32(np.abs(np.asarray(x)).max() * np.float32(0.5)))


def test_set_enable_disable_return_new_variables(mlp):
  module, variables, x = mlp
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  off = jb.disable_quantizer(qvariables, "*up*")
  assert not jb.quantizers(off)["up.weight_quantizer"].is_enabled and jb.quantizers(qvariables)["up.weight_quantizer"].is_enabled
  on = jb.enable_quantizer(off, lambda name: name.startswith("up.") and "output" not in name)
  same_bits(qmodule.apply(on, x), qmodule.apply(qvariables, x))
  same_bits(qmodule.apply(jb.disable_quantizer(qvariables, "*"), x), module.apply(variables, x))
  changed = jb.set_quantizer_by_cfg(qvariables, [{"quantizer_name": "*down.weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}}])
  assert jb.quantizers(changed)["down.weight_quantizer"].amax is None
  assert jb.quantizers(changed)["up.weight_quantizer"].amax is not None
  with pytest.warns(jb.ConfigWarning, match="nothing_here"):
    jb.enable_quantizer(qvariables, "*nothing_here*")
  with pytest.warns(jb.ConfigWarning, match="match no quantizer"):
    jb.set_quantizer_by_cfg(qvariables, {"*nothing_here*": {"enable": False}})
  with pytest.raises(TypeError, match="pattern"):
    jb.enable_quantizer(qvariables, 3)


def test_parent_class_answers_to_torch_and_flax_words(cnn):
  module, variables, x = cnn
  for word, expected in (("nn.Conv2d", {"Conv.0", "Conv.1"}), ("Dense", {"Dense.0"}), ("nn.Linear", {"Dense.0"})):
    config = {
      "quant_cfg": [{"quantizer_name": "*weight_quantizer", "parent_class": word, "cfg": {"num_bits": 8, "axis": 0}}],
      "algorithm": "max",
    }
    found = jb.quantizers(jb.quantize(module, variables, config, example_inputs=x)[1])
    assert {name.removesuffix(".weight_quantizer") for name, q in found.items() if q.is_enabled} == expected


def test_names_are_those_of_torch(llama):
  module, variables, tokens = llama
  _, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(tokens))
  enabled = {name for name, q in jb.quantizers(qvariables).items() if q.is_enabled}
  layers = [
    f"model.layers.{i}.{m}"
    for i in range(2)
    for m in (*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
  ]
  assert enabled == {f"{layer}.{kind}_quantizer" for layer in layers for kind in ("input", "weight")}


@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "NVFP4_FOUR_OVER_SIX_CFG"])
@pytest.mark.filterwarnings("ignore::core.config.ConfigWarning")
def test_siblings_share_their_tensor_scale(llama, preset):
  module, variables, tokens = llama
  config = jb.preset(preset) | {"algorithm": "max"}
  qmodule, shared = jb.quantize(module, variables, config, lambda model: model(tokens))
  _, alone = jb.quantize(module, variables, config, lambda model: model(tokens), group_rules=())
  one, own = jb.quantizers(shared), jb.quantizers(alone)
  names = [f"model.layers.0.self_attn.{p}_proj.weight_quantizer" for p in "qkv"]
  largest = max(float(groups.tensor_level_amax(own[name])) for name in names)
  assert len({float(groups.tensor_level_amax(own[name])) for name in names}) == 3
  assert [float(groups.tensor_level_amax(one[name])) for name in names] == [largest] * 3
  other = "model.layers.0.self_attn.o_proj.weight_quantizer"
  same_bits(one[other].amax, own[other].amax)
  rows = {row["name"]: row for row in jb.summary(shared)}
  assert rows[names[0]]["group"] == "model.layers.0.self_attn.(q_proj|k_proj|v_proj).weight_quantizer"
  assert all(row["cost_db"] is None for row in jb.summary(alone))
  assert all(np.isfinite(rows[name]["cost_db"]) for name in names)
  weight, config, _ = jb.weight_quantization(qmodule, shared)[names[0]]
  folded = jb.fold_weight(qmodule, shared)["params"]["model"]["layers_0"]["self_attn"]["q_proj"]["kernel"]
  amax = core.amax(np.asarray(weight), config.spec)
  given = (
    {"amax": np.float32(largest)}
    if config.spec.dynamic or not config.spec.two_level
    else {"amax": amax, "tensor_amax": np.float32(largest)}
  )
  same_bits(np.ascontiguousarray(np.asarray(folded).T), core.fake_quantize(np.asarray(weight), config.spec, **given))


def test_int8_siblings_keep_their_scales(llama):
  module, variables, tokens = llama
  _, shared = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(tokens))
  assert all(row["group"] is None for row in jb.summary(shared))


def test_summary_prints_and_returns_data(mlp, capsys, tmp_path):
  module, variables, x = mlp
  _, qvariables = jb.quantize(module, variables, jb.W4A8_AWQ_BETA_CFG.copy() | {"algorithm": "max"}, lambda model: model(x))
  rows = jb.print_quant_summary(qvariables, tmp_path)
  text = capsys.readouterr().out
  assert "up.weight_quantizer.0" in text and "quantizers, 6 enabled" in text
  assert (tmp_path / "quant_summary.txt").read_text() == text
  by_name = {row["name"]: row for row in rows}
  assert by_name["up.input_quantizer"]["state"] == "calibrated" and by_name["up.output_quantizer"]["state"] == "off"


def test_fold_is_exact_and_final(llama):
  module, variables, tokens = llama
  for preset in ("INT8_DEFAULT_CFG", "W4A16_NVFP4_CFG"):
    qmodule, qvariables = jb.quantize(module, variables, jb.preset(preset), lambda model: model(tokens))
    folded = jb.fold_weight(qmodule, qvariables)
    same_bits(qmodule.apply(folded, tokens), qmodule.apply(qvariables, tokens))
    assert not any(q.is_enabled for name, q in jb.quantizers(folded).items() if "weight" in name)
    same_bits(qmodule.apply(jb.enable_quantizer(folded, "*_proj.weight_quantizer"), tokens), qmodule.apply(folded, tokens))


def test_registered_module(mlp):
  class Bilinear(nn.Module):
    @nn.compact
    def __call__(self, x):
      left = self.param("left", nn.initializers.normal(1.0), (16, 4))
      right = self.param("right", nn.initializers.normal(1.0), (4, 16))
      self.sow("intermediates", "left", left)
      return (x @ left) * (x @ right.T)

  _, _, x = mlp
  module = Bilinear()
  variables = module.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="quantizes nothing"):
    jb.quantize(module, variables, SIBLING_CFG, example_inputs=x)
  jb.register(Bilinear, {"left": "io", "right": "oi"})
  try:
    qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
    found = jb.quantizers(qvariables)
    same_bits(found["right_weight_quantizer"].amax, np.abs(np.asarray(variables["params"]["right"])).max(1, keepdims=True))
    _, sown = qmodule.apply(qvariables, x, mutable=["intermediates"])
    spec = found["left_weight_quantizer"].config.spec
    left = core.fake_quantize(np.ascontiguousarray(np.asarray(variables["params"]["left"]).T), spec)
    same_bits(np.ascontiguousarray(np.asarray(sown["intermediates"]["left"][0]).T), left)
  finally:
    jb.unregister(Bilinear)
  with pytest.raises(ValueError, match="is not registered"):
    qmodule.apply(qvariables, x)
  with pytest.raises(KeyError):
    jb.unregister(Bilinear)
  with pytest.raises(ValueError, match="one letter per stored axis"):
    jb.register(Bilinear, {"left": "xy"})
  with pytest.raises(TypeError, match=r"flax\.linen\.Module"):
    jb.register(int, {})


def test_affine_bias_and_rotation(mlp):
  module, variables, x = mlp
  x = x + 5.0
  for bias in ({-2: None, "type": "static", "method": "max_min"}, {-2: None, "type": "dynamic"}):
    config = {"quant_cfg": {"*input_quantizer": {"num_bits": 4, "bias": bias}}, "algorithm": "max"}
    qmodule, qvariables = jb.quantize(module, variables, config, lambda model: model(x))
    shifted = jnp.abs(qmodule.apply(qvariables, x) - module.apply(variables, x)).mean()
    plain = jb.quantize(module, variables, {"quant_cfg": {"*input_quantizer": {"num_bits": 4}}, "algorithm": "max"}, lambda model: model(x))
    assert shifted < jnp.abs(plain[0].apply(plain[1], x) - module.apply(variables, x)).mean()
  rotated = jb.Quantizer(jb.QuantizerConfig.from_attributes({"num_bits": 8, "rotate": {"enable": True, "mode": "rotate_back"}}))
  half_step = np.abs(np.asarray(x)).max() * 4 / 127 / 2  # the rotation may add 16 elements up, with factor 1/4
  np.testing.assert_allclose(rotated(x), x, atol=4 * half_step)
  assert not jnp.array_equal(rotated(x), jb.Quantizer(jb.QuantizerConfig.from_attributes({"num_bits": 8}))(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_models(dtype):
  module = nets.MLP(dtype=dtype)
  x = jax.random.normal(jax.random.key(0), (4, 16), dtype)
  variables = module.init(jax.random.key(1), x)
  qmodule, qvariables = jb.quantize(module, variables, jb.NVFP4_DEFAULT_CFG, lambda model: model(x))
  assert qmodule.apply(qvariables, x).dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(qvariables["quant"]))


def test_float64_model_keeps_its_carrier(mlp):
  _, variables, x = mlp
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), variables)
    x = jnp.asarray(x, jnp.float64)
    qmodule, qvariables = jb.quantize(nets.MLP(dtype=jnp.float64), wide, jb.INT8_DEFAULT_CFG, lambda model: model(x))
    assert qmodule.apply(qvariables, x).dtype == jnp.float64
    folded = jb.fold_weight(qmodule, qvariables)["params"]["up"]["kernel"]
    kernel = np.asarray(variables["params"]["up"]["kernel"]).T
    spec = jb.quantizers(qvariables)["up.weight_quantizer"].config.spec
    same_bits(np.ascontiguousarray(np.asarray(folded).T), core.fake_quantize(np.ascontiguousarray(kernel), spec).astype(np.float64))


def test_quantizer_is_a_pytree(mlp):
  module, variables, x = mlp
  _, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  leaves, structure = jax.tree.flatten(qvariables)
  again = jax.tree.unflatten(structure, leaves)
  assert jax.tree.structure(again) == structure and hash(structure) == hash(jax.tree.structure(again))
  quantizer = jb.quantizers(qvariables)["up.input_quantizer"]
  assert quantizer.is_enabled and not quantizer.disable().is_enabled and quantizer.disable().enable().is_enabled


def test_no_warning_on_the_plain_road(mlp):
  module, variables, x = mlp
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
    qmodule.apply(qvariables, x)
