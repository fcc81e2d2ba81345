"""compress in JAX: bit for bit the simulation in three float types, under jit, scan, vmap; the same codes as in PyTorch."""

from __future__ import annotations

import warnings

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import jax_backend as jb
import torch_backend as tb
from jax_backend import tree, weights
from jax_backend.host import JaxHost
from tests.calibrate import twins
from tests.jax_backend import nets
from torch_backend.host import TorchHost

# Presets of different weight formats; the others are slow tests: each case compiles half a dozen functions.
QUICK = [("NVFP4_DEFAULT_CFG", "float32"), ("W4A8_AWQ_BETA_CFG", "bfloat16"), ("INT8_DEFAULT_CFG", "float16")]
ALL = [name for name in sorted(jb.choices) if "_KV_" not in name and name != "NVFP4_EXPERTS_ONLY_CFG"]
CASES = [pytest.param(n, d, marks=() if (n, d) in QUICK else pytest.mark.slow) for n in ALL for d in ("float32", "bfloat16", "float16")]
BITS = {2: np.uint16, 4: np.uint32}


class Net(nn.Module):
  """Two layers whose names every preset knows."""

  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(64, name="o_proj", param_dtype=self.dtype, dtype=self.dtype)(x)
    return nn.Dense(64, use_bias=False, name="mlp", param_dtype=self.dtype, dtype=self.dtype)(nn.relu(x))


def quantized(module, variables, config, *inputs):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", jb.ConfigWarning)
    return jb.quantize(module, variables, config, lambda m: m(*inputs))


def assert_same_bits(a, b) -> None:
  a, b = np.asarray(a), np.asarray(b)
  assert a.dtype == b.dtype and a.shape == b.shape
  assert np.array_equal(a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize]))


def all_weights(qvariables):
  return {tree.full_name(path, name): (q, w) for path, name, q, w in weights.each(qvariables)}


def computed(qvariables):
  """What each layer computes with: simulated, or from the codes."""
  return {
    n: weights.quantized(q, w) if q.leaves[0].packed is None else weights.unpacked(q)
    for n, (q, w) in all_weights(qvariables).items()
    if q.is_enabled
  }


@pytest.mark.parametrize(("preset", "dtype"), CASES)
def test_every_preset(preset, dtype, compared):
  """fake == compress == decompress: every weight, and the outputs under jit; bytes as `effective_bits` counts them."""
  module, x = Net(dtype), jax.random.normal(jax.random.key(1), (4, 64)).astype(dtype)
  qmodule, fake = quantized(module, module.init(jax.random.key(0), x), jb.preset(preset), x)
  packed = jb.compress(qmodule, fake)
  run = jax.jit(qmodule.apply)
  expected = run(fake, x)
  assert jb.is_compressed(packed) and not jb.is_compressed(fake)
  assert_same_bits(run(packed, x), expected)
  after = computed(packed)
  for name, weight in computed(fake).items():
    assert weight.dtype == dtype
    assert_same_bits(after[name], weight)
    compared(weight.size)
  specs = {name.removesuffix(".weight_quantizer"): q.leaves[0].spec for name, (q, _) in all_weights(fake).items()}
  for one in jb.compression_report(packed).compressed:
    assert 8 * one.nbytes == core.effective_bits(specs[one.name], one.shape) * one.numel
  plain = jb.decompress(qmodule, packed)
  assert_same_bits(plain["params"]["mlp"]["kernel"], after["mlp.weight_quantizer"])
  assert jax.tree.structure(plain["params"]) == jax.tree.structure(fake["params"])
  compared(expected.size)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [None, 0, 1])
def test_scanned_stacks(stack, compared):
  """A scanned stack's codes are sliced with it, wherever its parameters have the stacked axis."""
  module, tokens = nets.Llama(stack=stack), nets.tokens()
  qmodule, fake = quantized(module, module.init(jax.random.key(0), tokens), jb.NVFP4_DEFAULT_CFG, tokens)
  packed = jb.compress(qmodule, fake, "*mlp*")
  run = jax.jit(qmodule.apply)
  assert_same_bits(run(packed, tokens), run(fake, tokens))
  report = jb.compression_report(packed)
  assert sum(w.numel for w in report.compressed) == 2 * 3 * 32 * 48 and 4.5 < report.bits_per_weight < 4.6
  hosts = JaxHost(qmodule, packed, None), JaxHost(qmodule, fake, None)
  for name in (n for n in hosts[0].layers() if "mlp" in n):
    held, layer = hosts[0].stored(name), hosts[1].layer(name)
    assert held is not None and hosts[1].stored(name) is None
    q = core.quantize(layer.weight, layer.specs[0], np.float32(fake_amax(fake, name)))
    assert held.codes.tobytes() == q.codes.tobytes() and held.scale.tobytes() == q.scale.tobytes()
    assert_same_bits(hosts[0].layer(name).weight, core.dequantize(held))
    compared(q.codes.size)


def fake_amax(qvariables, name):
  layer, _, index = name.partition("[")
  amax = np.asarray(jb.quantizers(qvariables)[f"{layer}.weight_quantizer"].amax)
  return amax[int(index[:-1])] if index else amax


ROWS = {
  "nf4, double quantization": {"format": "nf4_double"},  # in torch's order of elements
  "signed scales": {"num_bits": 4, "block_sizes": {-1: 32}},
  "turned": {"num_bits": 4, "axis": 0, "rotate": {"enable": True, "mode": "rotate_back"}},
  "blocks with zero points": {"num_bits": 4, "block_sizes": {-1: 16}, "unsigned": True, "zero_point": True},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name.startswith("nf4") else pytest.mark.slow) for name in ROWS])
def test_more_formats(name, compared):
  """Formats that no preset has: each weight from its codes, and the codes that torch would store."""
  x = jax.random.normal(jax.random.key(1), (4, 64))
  config = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": ROWS[name]}, "algorithm": "max"}
  qmodule, fake = quantized(Net(), Net().init(jax.random.key(0), x), config, x)
  if name == "signed scales":
    flipped = {key: q.with_amax(-q.amax) for key, q in tree_of(fake).items() if q.param is not None}
    fake = {**fake, "quant": tree.build({**tree_of(fake), **flipped})}
  packed = jb.compress(qmodule, fake)
  after = computed(packed)
  for key, weight in computed(fake).items():
    assert_same_bits(after[key], weight)
    compared(weight.size)
  held, first = JaxHost(qmodule, packed, None).stored("mlp"), jb.quantizers(fake)["mlp.weight_quantizer"]
  assert held is not None
  if name != "turned":
    amax = None if first.amax is None else np.asarray(first.amax)
    q = core.quantize(np.asarray(fake["params"]["mlp"]["kernel"]).T.copy(), first.spec, amax)
    assert held.codes.tobytes() == q.codes.tobytes() and held.scale.tobytes() == q.scale.tobytes()
    assert name != "signed scales" or (held.scale < 0).all()


def tree_of(qvariables):
  return {(path, name): q for path, name, q in tree.items(qvariables["quant"])}


KINDS = {
  "affine": {"num_bits": 4, "axis": 0, "bias": {0: None, "type": "static"}},
  "per channel": {"num_bits": 8, "axis": 0},
  "zero points": {"num_bits": 4, "axis": 0, "unsigned": True, "zero_point": True},
  "two axes": {"num_bits": 3, "axis": (0, 1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind, compared):
  """Convolutions in Flax's layouts, grouped and transposed."""
  module, x = nets.CNN(), jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  config = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": KINDS[kind]}, "algorithm": "max"}
  qmodule, fake = quantized(module, module.init(jax.random.key(0), x), config, x)
  packed = jb.compress(qmodule, fake)
  assert_same_bits(jax.jit(qmodule.apply)(packed, x), jax.jit(qmodule.apply)(fake, x))
  after = computed(packed)
  for name, weight in computed(fake).items():
    assert_same_bits(after[name], weight)
    compared(weight.size)


@pytest.mark.parametrize("formats", [pytest.param(n, marks=() if n == "nvfp4_static" else pytest.mark.slow) for n in twins.FORMATS])
def test_codes_are_those_of_torch(formats, compared):
  """Both backends store the same codes and scales, and a host shows them alike."""
  config = {"quant_cfg": twins.FORMATS[formats], "algorithm": "max"}
  net, batches = twins.torch_net(), twins.batches()
  qmodule, qvariables = jb.quantize(twins.FlaxNet(), twins.flax_variables(net), config, lambda m: [m(jnp.asarray(b)) for b in batches])
  import torch

  tb.compress(tb.quantize(net, config, lambda m: [m(torch.from_numpy(b)) for b in batches]))
  ours, theirs = TorchHost(net, None), JaxHost(qmodule, jb.compress(qmodule, qvariables), None)
  assert ours.weighted() == theirs.weighted()
  for name in ours.weighted():
    a, b = ours.stored(name), theirs.stored(name)
    assert a is not None and b is not None and a.spec == b.spec and a.shape == b.shape
    for one, other in zip(a[:4], b[:4], strict=True):
      assert (one is None) == (other is None)
      if one is not None and other is not None:
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    compared(a.codes.size + a.scale.size)


@pytest.fixture(scope="module")
def compressed():
  module, x = Net(), jax.random.normal(jax.random.key(1), (4, 64))
  qmodule, fake = quantized(module, module.init(jax.random.key(0), x), jb.MXFP6_DEFAULT_CFG, x)
  return qmodule, fake, jb.compress(qmodule, fake), x


def test_pytree_round_trips(compressed):
  """Flattened, through numpy, through Flax's bytes: the same codes and outputs."""
  qmodule, _, packed, x = compressed
  leaves, structure = jax.tree.flatten(packed)
  again = jax.tree.unflatten(structure, [np.array(leaf) for leaf in leaves])
  expected = jax.jit(qmodule.apply)(packed, x)
  assert_same_bits(jax.jit(qmodule.apply)(again, x), expected)
  data = flax.serialization.msgpack_serialize([np.asarray(leaf) for leaf in leaves])
  read = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in flax.serialization.msgpack_restore(data)])
  assert_same_bits(jax.jit(qmodule.apply)(read, x), expected)
  assert "kernel" not in packed["params"]["mlp"] and packed["params"]["o_proj"].keys() == {"bias"}


def test_transforms(compressed):
  """vmap over inputs, gradients to inputs, and eager calls agree with the simulation."""
  qmodule, fake, packed, x = compressed

  def loss(held, x):
    return jax.vmap(lambda row: qmodule.apply(held, row[None]).sum())(x).sum()

  assert_same_bits(*(jax.jit(jax.grad(loss, argnums=1))(held, x) for held in (packed, fake)))
  assert_same_bits(*(qmodule.apply(held, x) for held in (packed, fake)))


def test_what_needs_floats_says_so(compressed, capsys):
  qmodule, fake, packed, x = compressed
  calls = {
    "quantize": lambda: jb.quantize(Net(), packed, jb.INT8_DEFAULT_CFG, lambda m: m(x)),
    "auto_quantize": lambda: jb.auto_quantize(Net(), packed, data_loader=[x], method="sqnr"),
    "calibration": lambda: jb.calibrate(qmodule, packed, "mse", lambda m: m(x)),
    "changing a weight quantizer": lambda: jb.disable_quantizer(packed, "*weight_quantizer"),
  }
  for what, call in calls.items():
    with pytest.raises(ValueError, match=f"{what} needs float weights, but .* are compressed .*call decompress first"):
      call()
  jb.disable_quantizer(packed, "*input_quantizer")
  folded = jb.fold_weight(qmodule, packed)
  assert not jb.is_compressed(folded)
  assert_same_bits(folded["params"]["mlp"]["kernel"], jb.fold_weight(qmodule, fake)["params"]["mlp"]["kernel"])
  rows = {row["name"]: row["state"] for row in jb.print_quant_summary(packed)}
  assert rows["mlp.weight_quantizer"] == "compressed"
  jb.print_compression_report(packed)
  assert "2 of 2 weights compressed: 8,192 values in 6,400 bytes, 6.2500 bits per weight" in capsys.readouterr().out


def test_selection_and_refusals(compressed):
  qmodule, fake, _, _ = compressed
  one = jb.compress(qmodule, fake, "*mlp")
  assert [w.name for w in jb.compression_report(one).compressed] == ["mlp"]
  assert jb.is_compressed(jb.compress(qmodule, one)) and not jb.is_compressed(jb.decompress(qmodule, one))
  with pytest.raises(ValueError, match=r"include: '\*nowhere\*' matches none of the layers"):
    jb.compress(qmodule, fake, "*nowhere*")
  broken = {**fake, "params": {**fake["params"], "mlp": {"kernel": fake["params"]["mlp"]["kernel"].at[0, 0].set(jnp.nan)}}}
  with pytest.warns(jb.ConfigWarning, match="mlp: its codes do not stand for what the simulation computes"):
    assert [w.name for w in jb.compression_report(jb.compress(qmodule, broken)).compressed] == ["o_proj"]
  with pytest.raises(ValueError, match="nothing was compressed"):
    jb.compress(qmodule, jb.fold_weight(qmodule, fake))
  with pytest.raises(ValueError, match="no quantizers"):
    jb.compress(qmodule, {"params": fake["params"]})
