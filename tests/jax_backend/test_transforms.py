"""linen's transforms, collections and rngs around quantized layers."""

from __future__ import annotations

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_backend as jb
from tests.jax_backend import nets
from tests.jax_backend.test_bits import same_bits


@pytest.fixture(scope="module")
def unrolled(llama):
  module, variables, tokens = llama
  loop = lambda model: [model(tokens), model(tokens[::-1])]  # noqa: E731
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, loop)
  return variables, tokens, loop, qmodule, qvariables, jax.jit(qmodule.apply)(qvariables, tokens)


@pytest.mark.parametrize("stack, remat, jit", [(0, False, False), (0, True, True), (1, True, False)], ids=["scan", "remat_jit", "axis1"])
def test_a_scanned_stack_equals_the_unrolled_layers(unrolled, stack, remat, jit):
  variables, tokens, loop, _, reference, expected = unrolled
  # axis 1 is only possible where every parameter of the stack has one; vectors are stacked there too
  params = nets.stacked(variables["params"], 2, stack)
  module = nets.Llama(stack=stack, remat=remat, jit=jit)
  qmodule, qvariables = jb.quantize(module, {"params": params}, jb.INT8_DEFAULT_CFG, loop)
  one, many = jb.quantizers(qvariables), jb.quantizers(reference)
  for name in ("self_attn.q_proj.input_quantizer", "mlp.down_proj.input_quantizer", "mlp.down_proj.weight_quantizer"):
    found = one[f"model.layers.{name}"]
    assert found.amax.shape[0] == 2 and found.stack == (stack,)
    for layer in range(2):
      same_bits(found.amax[layer], many[f"model.layers.{layer}.{name}"].amax)
  apply = jax.jit(qmodule.apply)
  # matmuls of one size in a loop or unrolled: XLA:CPU computes them alike; 1e-5 leaves room for another fusion
  np.testing.assert_allclose(apply(qvariables, tokens), expected, atol=1e-5)
  np.testing.assert_allclose(apply(jb.fold_weight(qmodule, qvariables), tokens), expected, atol=1e-5)
  assert jax.tree.structure(qvariables["params"]) == jax.tree.structure(params)
  grads = jax.jit(jax.grad(lambda p: qmodule.apply({**qvariables, "params": p}, tokens).std()))(params)
  assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_layers_of_a_stack_cannot_have_formats_of_their_own(llama):
  _, variables, tokens = llama
  params = nets.stacked(variables["params"], 2, 0)
  config = jb.INT8_DEFAULT_CFG.copy()
  config["quant_cfg"]["*layers.1.mlp*"] = {"enable": False}
  with pytest.raises(ValueError, match=r"layer 1 of .*another format.*unroll the stack"):
    jb.quantize(nets.Llama(stack=0), {"params": params}, config, example_inputs=tokens)


def test_experts_of_a_vmap_have_state_of_their_own():
  experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)(5)
  x = jax.random.normal(jax.random.key(0), (3, 4, 16)) * jnp.array([1.0, 2.0, 3.0])[:, None, None]
  variables = experts.init(jax.random.key(1), x)
  qmodule, qvariables = jb.quantize(experts, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  found = jb.quantizers(qvariables)
  same_bits(found["input_quantizer"].amax, np.abs(np.asarray(x)).max((1, 2)))
  assert found["weight_quantizer"].amax.shape == (3, 5, 1)
  single, state = jb.quantize(nn.Dense(5), jax.tree.map(lambda p: p[1], variables), jb.INT8_DEFAULT_CFG, lambda model: model(x[1]))
  np.testing.assert_allclose(qmodule.apply(qvariables, x)[1], single.apply(state, x[1]), atol=1e-6)  # batched or single matmul


def test_a_vmapped_apply_maps_quantized_models(mlp):
  module, variables, x = mlp
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  y = jax.vmap(qmodule.apply, in_axes=(None, 0))(qvariables, jnp.stack([x, 2 * x]))
  np.testing.assert_allclose(y[0], qmodule.apply(qvariables, x), atol=1e-6)  # batched or single matmul


def test_lifted_and_inherited_calls_quantize_once():
  class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
      return super().__call__(inputs) * 2

  x = jax.random.normal(jax.random.key(0), (4, 16))
  for module in (nn.remat(nn.Dense)(5), nn.jit(nn.Dense)(5), Doubled(5)):
    variables = module.init(jax.random.key(1), x)
    qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
    plain, state = jb.quantize(nn.Dense(5), variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
    factor = 2 if isinstance(module, Doubled) else 1
    np.testing.assert_allclose(qmodule.apply(qvariables, x), plain.apply(state, x) * factor, rtol=1e-6)  # jit or eager matmul


def test_parameters_shared_over_a_mapped_axis_say_what_to_do():
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  module = nn.RNN(nn.SimpleCell(4))
  variables = module.init(jax.random.key(1), x)
  with pytest.raises(ValueError, match="shares its parameters over a mapped axis"):
    jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  qmodule, qvariables = jb.quantize(module, variables, jb.FP8_PER_CHANNEL_PER_TOKEN_CFG, lambda model: model(x))
  assert not jnp.array_equal(qmodule.apply(qvariables, x), module.apply(variables, x))


def test_tied_embedding_is_quantized_in_lookup_and_in_attend():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      embed = nn.Embed(11, 16, name="embed")
      return embed.attend(embed(tokens))

  tokens = jnp.array([[1, 2, 3]])
  variables = Tied().init(jax.random.key(0), tokens)
  config = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 4, "axis": 0}}, "algorithm": "max"}
  qmodule, qvariables = jb.quantize(Tied(), variables, config)  # without data: token inputs are guessed
  table = jb.fold_weight(qmodule, qvariables)["params"]["embed"]["embedding"]
  same_bits(qmodule.apply(qvariables, tokens), jnp.dot(table[tokens], table.T))


def test_collections_and_rngs_are_those_of_flax(cnn, llama):
  module, variables, x = cnn
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  rngs = {"dropout": jax.random.key(3)}
  y, updates = qmodule.apply(qvariables, x, train=True, rngs=rngs, mutable=["batch_stats"])
  assert set(updates) == {"batch_stats"}
  assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
  again, _ = qmodule.apply(qvariables, x, train=True, rngs=rngs, mutable=["batch_stats"])
  other, _ = qmodule.apply(qvariables, x, train=True, rngs={"dropout": jax.random.key(4)}, mutable=["batch_stats"])
  same_bits(y, again)
  assert not jnp.array_equal(y, other)
  off = jb.disable_quantizer(qvariables, "*")
  same_bits(
    qmodule.apply(off, x, train=True, rngs=rngs, mutable=["batch_stats"])[0],
    module.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])[0],
  )
  _, every = qmodule.apply(qvariables, x, mutable=True)
  assert jax.tree.structure(every["params"]) == jax.tree.structure(variables["params"])

  module, variables, tokens = llama
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_WEIGHT_ONLY_CFG, example_inputs=tokens)
  _, sown = qmodule.apply(qvariables, tokens, mutable=["intermediates"])
  _, plain = module.apply(variables, tokens, mutable=["intermediates"])
  assert jax.tree.structure(sown) == jax.tree.structure(plain)


def test_two_models_and_the_plain_module_do_not_disturb_each_other(mlp):
  module, variables, x = mlp
  plain = jax.jit(module.apply)
  before = plain(variables, x)
  config = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 2, "axis": 0}}, "algorithm": "max"}
  first, one = jb.quantize(module, variables, config, example_inputs=x)
  second, two = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  a, b = jax.jit(first.apply)(one, x), jax.jit(second.apply)(two, x)
  assert first == second and hash(first) == hash(second)  # no arrays: what differs is in the variables
  assert not jnp.array_equal(a, b) and not jnp.array_equal(a, before)
  same_bits(jax.jit(first.apply)(one, x), a)
  same_bits(plain(variables, x), before)
  same_bits(jax.jit(module.apply)(variables, x), before)

  class Distil(nn.Module):
    """A module that runs a quantized teacher inside: its own layers stay float."""

    @nn.compact
    def __call__(self, x):
      return nn.Dense(6)(x), first.apply(one, x)

  outer = Distil()
  state = outer.init(jax.random.key(0), x)
  qouter, qstate = jb.quantize(outer, state, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  np.testing.assert_allclose(qouter.apply(qstate, x)[1], first.apply(one, x), rtol=1e-6)  # jit or eager matmul
  assert set(jb.quantizers(qstate)) == {f"Dense.0.{kind}_quantizer" for kind in ("input", "weight", "output")}


def test_another_format_retraces(mlp):
  module, variables, x = mlp
  qmodule, qvariables = jb.quantize(module, variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  apply = jax.jit(qmodule.apply)
  eight = apply(qvariables, x)
  changed = jb.set_quantizer_by_cfg(qvariables, {"*weight_quantizer": {"num_bits": 4, "axis": 0}})
  four = apply(jb.calibrate(qmodule, changed), x)
  assert not jnp.array_equal(eight, four)
  same_bits(apply(qvariables, x), eight)
  assert apply._cache_size() == 2


def test_module_level_jit_does_not_freeze_the_format():
  block = nn.jit(nets.MLP)()
  x = jax.random.normal(jax.random.key(0), (8, 16))
  variables = block.init(jax.random.key(1), x)
  before = block.apply(variables, x)
  config = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 2, "axis": 0}}, "algorithm": "max"}
  qmodule, qvariables = jb.quantize(block, variables, config, example_inputs=x)
  assert not jnp.array_equal(qmodule.apply(qvariables, x), before)
  same_bits(block.apply(variables, x), before)


@pytest.mark.parametrize("pass_through", [True, False])
def test_straight_through_gradient(pass_through):
  x = jnp.linspace(-2.0, 2.0, 9)
  quantizer = jb.Quantizer(jb.QuantizerConfig.from_attributes({"num_bits": 8, "pass_through_bwd": pass_through})).with_amax(1.0)
  expected = np.ones(9) if pass_through else (np.abs(np.asarray(x)) <= 1.0)
  same_bits(jax.grad(lambda v: quantizer(v).sum())(x), expected.astype(np.float32))
  y, tangent = jax.jvp(quantizer.__call__, (x,), (jnp.ones(9),))
  same_bits(tangent, expected.astype(np.float32))
  same_bits(y, quantizer(x))
  through_jit = jax.grad(jax.jit(lambda q: q(x).sum()))(quantizer)
  assert float(through_jit.amax) == 0.0


def test_stochastic_rounding_draws_from_its_rng(mlp):
  module, variables, x = mlp
  config = {
    "quant_cfg": {"default": {"enable": False}, "*weight_quantizer": {"num_bits": 4, "axis": 0, "rounding": "stochastic"}},
    "algorithm": "max",
  }
  qmodule, qvariables = jb.quantize(module, variables, config, example_inputs=x)
  with pytest.raises(ValueError, match="rngs"):
    qmodule.apply(qvariables, x)
  one = qmodule.apply(qvariables, x, rngs={"quantize": jax.random.key(0)})
  same_bits(one, qmodule.apply(qvariables, x, rngs={"quantize": jax.random.key(0)}))
  assert not jnp.array_equal(one, qmodule.apply(qvariables, x, rngs={"quantize": jax.random.key(1)}))


def test_boxed_and_frozen_parameters():
  kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))

  class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(16, use_bias=False, kernel_init=kernel)(x), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = {"variable_axes": {"params": 1}, "metadata_params": {nn.PARTITION_NAME: "layers"}}
      return nn.scan(Body, split_rngs={"params": True}, length=3, **axes)()(x, None)[0]

  x = jax.random.normal(jax.random.key(0), (4, 16))
  variables = Stack().init(jax.random.key(1), x)
  qmodule, qvariables = jb.quantize(Stack(), variables, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  folded = jb.fold_weight(qmodule, qvariables)
  same_bits(qmodule.apply(folded, x), qmodule.apply(qvariables, x))
  assert jax.tree.structure(folded["params"]) == jax.tree.structure(variables["params"])  # boxes and all
  frozen = flax.core.freeze(flax.core.meta.unbox(variables))
  _, plain = jb.quantize(Stack(), frozen, jb.INT8_DEFAULT_CFG, lambda model: model(x))
  same_bits(qmodule.apply(plain, x), qmodule.apply(qvariables, x))
