"""Algorithms that know which layer reads what, in both backends: the function stays, and both end with the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_backend
import torch_backend
from core import hadamard
from core.calibrate import relations, rotation
from core.calibrate.fold_scales import fold
from core.calibrate.layer import Change
from experiments.models import load_jax, load_torch_twin
from jax_backend.host import JaxHost
from tests.experiments import tiny
from torch_backend.host import TorchHost

IDS = [tiny.tokens(2, 12, seed) for seed in range(2)]
OFF = {"enable": False}
INT8: dict[str, Any] = {
  "quant_cfg": {
    "default": OFF,
    "*weight_quantizer": {"num_bits": 8, "axis": 0},
    "*input_quantizer": {"num_bits": 8},
    "*lm_head*": OFF,
    "*embed*": OFF,
    "*norm*": OFF,
    "*Norm*": OFF,
  }
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
  """Two layers, four heads over two, biases in attention and MLP, tied embeddings."""
  return tiny.llama_folder(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def one_key_each(tmp_path_factory) -> Path:
  return tiny.llama_folder(tmp_path_factory.mktemp("mha"), num_key_value_heads=4)


class Torch:
  def __init__(self, folder: Path, dtype: str = "float32") -> None:
    self.model = load_torch_twin(folder, dtype)[0]
    self.model.eval()
    self.report: list[dict[str, Any]] = []

  def quantize(self, algorithm: Any, config: dict[str, Any] = INT8, loop: bool = True) -> Torch:
    torch_backend.quantize(self.model, {**config, "algorithm": algorithm}, self._loop if loop else None, report=self.report)
    return self

  def _loop(self, model) -> None:
    for ids in IDS:
      model(torch.from_numpy(ids).long())

  def host(self) -> Any:
    return TorchHost(self.model, self._loop)

  def logits(self) -> np.ndarray:
    with torch.no_grad():
      return self.model(torch.from_numpy(IDS[0]).long()).numpy()

  def floating(self) -> np.ndarray:
    torch_backend.disable_quantizer(self.model, "*")
    return self.logits()


class Jax:
  def __init__(self, folder: Path, dtype: str = "float32", **options: Any) -> None:
    self.module: Any
    self.module, self.variables, _ = load_jax(folder, dtype, **options)
    self.report: list[dict[str, Any]] = []

  def quantize(self, algorithm: Any, config: dict[str, Any] = INT8, loop: bool = True) -> Jax:
    given: dict[str, Any] = {} if loop else {"example_inputs": (IDS[0],)}
    self.module, self.variables = jax_backend.quantize(
      self.module, self.variables, {**config, "algorithm": algorithm}, self._loop if loop else None, report=self.report, **given
    )
    return self

  def _loop(self, model) -> None:
    for ids in IDS:
      model(jnp.asarray(ids))

  def host(self) -> Any:
    return JaxHost(self.module, self.variables, self._loop)

  def logits(self) -> np.ndarray:
    return np.asarray(jax.jit(self.module.apply)(self.variables, jnp.asarray(IDS[0])))

  def floating(self) -> np.ndarray:
    self.variables = jax_backend.disable_quantizer(self.variables, "*")
    return self.logits()


BACKENDS = {"torch": Torch, "jax": Jax}


def error(y: np.ndarray, reference: np.ndarray) -> float:
  return float(np.abs(y - reference).max() / np.abs(reference).max())


def same_parameters(a: TorchHost, b: JaxHost) -> int:
  names = [n for n in b.parameter_shapes() if "quantizer" not in n]
  for name in names:
    np.testing.assert_array_equal(a.parameter(name), b.parameter(name), err_msg=name)
  return len(names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_parameter_by_name(llama, backend):
  host = BACKENDS[backend](llama).quantize(None, loop=False).host()
  shapes = host.parameter_shapes()
  assert shapes["model.layers.1.input_layernorm.weight"] == (24,) and shapes["model.embed_tokens.weight"] == (61, 24)
  assert shapes["model.layers.0.mlp.down_proj.weight"] == (24, 40) and shapes["model.layers.0.mlp.down_proj.bias"] == (24,)
  assert "lm_head" in host.weighted() and "model.embed_tokens" in host.weighted()
  for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"):
    value = host.parameter(name)
    host.set_parameter(name, 2 * value)
    np.testing.assert_array_equal(host.parameter(name), 2 * value)
  assert host.parameter("model.nothing.weight") is None
  with pytest.raises(ValueError, match="no parameter"):
    host.set_parameter("model.nothing.weight", np.ones(3))
  assert host.norm("model.norm") == "rms" and host.head_dim() == 8
  assert host.is_table("model.embed_tokens") and not host.is_table("lm_head")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_fold_into_norms_and_layers(llama, backend):
  """The float function stays, and folded scales are gone."""
  make = BACKENDS[backend]
  plain = make(llama).logits()
  one = make(llama).quantize([{"method": "smoothquant", "alpha": 0.5}, "fold_pre_quant_scale"])
  host = one.host()
  folded = {row["layer"] for row in one.report if "folded" in row}
  assert len(folded) == 6  # two norms and up_proj in each of two layers
  for i in range(2):
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
      assert host.pre_quant_scale(f"model.layers.{i}.{name}") is None
    assert host.pre_quant_scale(f"model.layers.{i}.self_attn.o_proj") is not None  # heads of one group have scales of their own
  kept = [row for row in one.report if "repeat one head" in str(row.get("kept"))]
  assert len(kept) == 2
  assert error(one.floating(), plain) < 5e-6  # float32 sums in another order; seen 1e-6


def test_folding_gives_equal_parameters(one_key_each):
  """The same scales, given by hand (what the backends find differs in the last bit of the statistics), fold to the same bits."""
  hosts = [make(one_key_each).quantize("max").host() for make in BACKENDS.values()]
  rng = np.random.default_rng(0)
  for relation in relations.find(hosts[0], (*relations.NORMS, *relations.LINEARS)):
    scale = np.exp(rng.normal(size=hosts[0].layer(relation.readers[0]).weight.shape[1])).astype(np.float32)
    for host in hosts:
      for reader in relation.readers:
        host.apply(reader, Change(pre_quant_scale=scale, weight=host.layer(reader).weight / scale))
      assert "folded" in (fold(host, relation) or {})
  assert same_parameters(*hosts) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_folding_does_not_move_quantized_logits(llama, backend):
  """Input quantizers see the same numbers and keep their amax; only up_proj's weight is calibrated again, per row, so its codes stay."""
  smooth = {"method": "smoothquant", "alpha": 0.5}
  online = BACKENDS[backend](llama).quantize(smooth)
  folded = BACKENDS[backend](llama).quantize([smooth, "fold_pre_quant_scale"])
  name = "model.layers.0.self_attn.q_proj"
  np.testing.assert_array_equal(online.host().layer(name).input_amax, folded.host().layer(name).input_amax)
  assert error(folded.logits(), online.logits()) < 0.01  # a product on the edge between two codes may fall to the other side


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_fold_where_heads_do_not_repeat(one_key_each, backend):
  one = BACKENDS[backend](one_key_each)
  plain = one.logits()
  one.quantize([{"method": "awq_lite", "shared": True}, "fold_pre_quant_scale"])
  assert all(one.host().pre_quant_scale(name) is None for name in one.host().weighted() if "layers" in name)
  assert error(one.floating(), plain) < 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_branches_move_along(one_key_each, backend):
  one = BACKENDS[backend](one_key_each)
  plain = one.logits()
  one.quantize([{"method": "svdquant", "lowrank": 4}, "fold_pre_quant_scale"])
  host = one.host()
  assert host.pre_quant_scale("model.layers.0.mlp.down_proj") is None and host.low_rank("model.layers.0.mlp.up_proj") is not None
  assert error(one.floating(), plain) < 5e-6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"heads": True, "seed": 3}, {"kind": "orthogonal", "heads": True}, {"block_size": 4}])
def test_rotation_keeps_the_function(llama, options, dtype):
  """float64: rounding once, far below 1e-6. Tied embeddings come apart, the forward stays right."""
  made = {}
  with jax.enable_x64(dtype == "float64"):
    for backend, make in BACKENDS.items():
      one = made[backend] = make(llama, dtype)
      plain = one.logits()
      before = one.quantize(None).host().parameter("model.layers.0.self_attn.q_proj.weight")
      if backend == "torch":
        with pytest.warns(torch_backend.ConfigWarning, match="shared"):
          torch_backend.calibrate(one.model, {"method": "rotate", **options}, one._loop, report=one.report)
        assert not one.model.config.tie_word_embeddings
      else:
        one.variables = jax_backend.calibrate(one.module, one.variables, {"method": "rotate", **options}, one._loop, report=one.report)
      host = one.host()
      assert (host.parameter("model.norm.weight") == 1).all()
      assert error(host.parameter("model.layers.0.self_attn.q_proj.weight"), before) > 0.1
      layer = host.layer("model.layers.0.self_attn.q_proj")
      np.testing.assert_array_equal(layer.amax, np.abs(layer.weight).max(axis=1, keepdims=True))
      assert error(one.floating(), plain) < (1e-6 if dtype == "float64" else 1e-5)
    same_parameters(made["torch"].host(), made["jax"].host())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_without_data(llama, backend):
  one = BACKENDS[backend](llama)
  plain = one.logits()
  one.quantize("rotate", {"quant_cfg": {"default": OFF, "*proj.weight_quantizer": {"num_bits": 4, "axis": 0}}}, loop=False)
  assert error(one.floating(), plain) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_layer_equalization_keeps_the_function(llama, backend):
  one = BACKENDS[backend](llama)
  plain = one.logits()
  one.quantize("cross_layer_equalization")
  host = one.host()
  up, down = (host.parameter(f"model.layers.1.mlp.{name}.weight") for name in ("up_proj", "down_proj"))
  np.testing.assert_allclose(np.abs(up).max(axis=1), np.abs(down).max(axis=0), rtol=1e-6)
  v, o = (host.parameter(f"model.layers.1.self_attn.{name}.weight") for name in ("v_proj", "o_proj"))
  shared = np.abs(o).reshape(24, 2, 2, 8).max(axis=(0, 2)).reshape(-1)  # groups, heads of a group, head size
  np.testing.assert_allclose(np.abs(v).max(axis=1), shared, rtol=1e-6)
  assert error(one.floating(), plain) < 5e-6


def test_equalization_gives_equal_parameters(llama):
  made = [make(llama).quantize("cross_layer_equalization").host() for make in BACKENDS.values()]
  same_parameters(*made)


def test_stacked_layers_under_scan(llama):
  """The names of stacked copies carry their index, and every copy is treated like a layer of its own."""
  for algorithm in ([{"method": "awq_lite", "shared": True}, "fold_pre_quant_scale"], "rotate", "cross_layer_equalization"):
    plain = Jax(llama).logits()
    one = Jax(llama, scan_layers=True).quantize(algorithm)
    assert error(one.floating(), plain) < 1e-5
    single, stacked = Jax(llama).quantize(algorithm).host(), one.host()
    np.testing.assert_allclose(
      stacked.parameter("model.layers.mlp.down_proj[1].weight"),
      single.parameter("model.layers.1.mlp.down_proj.weight"),
      rtol=1e-3,
      atol=1e-4,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_false_relation_is_caught(llama, backend):
  """The norm feeds q and k too: scaling it for v alone changes them."""
  with pytest.raises(ValueError, match="relations does not hold"):
    BACKENDS[backend](llama).quantize(
      [{"method": "smoothquant", "alpha": 0.5}, {"method": "fold_pre_quant_scale", "relations": ["input_layernorm -> self_attn.v_proj"]}]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_refuses(llama, backend):
  with pytest.raises(ValueError, match=r"'model\.norm|model\.norm\.weight"):
    BACKENDS[backend](llama).quantize({"method": "rotate", "relations": list(relations.NORMS)})
  with pytest.raises(ValueError, match="put rotate before"):
    BACKENDS[backend](llama).quantize(["awq_lite", "rotate"])
  with pytest.raises(ValueError, match="finds none"):
    BACKENDS[backend](llama).quantize({"method": "rotate", "relations": ["ln -> fc"]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_is_told_apart(tmp_path, backend):
  folder = tiny.bert_folder(tmp_path)
  rule = "attention.output.LayerNorm -> intermediate.dense"
  if backend == "torch":
    from experiments.models import load_torch

    model, _ = load_torch(folder, "float32")
    ids = torch.from_numpy(IDS[0]).long()
    config = {**INT8, "algorithm": {"method": "rotate", "relations": [rule]}}
    with pytest.raises(ValueError, match=r"LayerNorm'.*subtracts the mean"):
      torch_backend.quantize(model, config, lambda m: m(ids))
  else:
    module, variables, _ = load_jax(folder, "float32")
    config = {**INT8, "algorithm": {"method": "rotate", "relations": [rule]}}
    with pytest.raises(ValueError, match=r"LayerNorm'.*subtracts the mean"):
      jax_backend.quantize(module, variables, config, lambda m: m(jnp.asarray(IDS[0])))


def test_post_norms_do_not_take_scales(tmp_path):
  """BERT's norm feeds the residual as well: no rule folds into it by default, and a rule that would is caught."""
  module, variables, _ = load_jax(tiny.bert_folder(tmp_path), "float32")

  def loop(model):
    model(jnp.asarray(IDS[0]))

  smooth = {"method": "smoothquant", "alpha": 0.5}
  report: list[dict[str, Any]] = []
  jax_backend.quantize(module, variables, {**INT8, "algorithm": [smooth, "fold_pre_quant_scale"]}, loop, report=report)
  assert {row["layer"].rpartition(".")[2] for row in report if "folded" in row} == {"value"}
  bad = {"method": "fold_pre_quant_scale", "relations": ["attention.output.LayerNorm -> intermediate.dense"]}
  with pytest.raises(ValueError, match="relations does not hold"):
    jax_backend.quantize(module, variables, {**INT8, "algorithm": [smooth, bad]}, loop)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotate_attributes_cancel(llama, backend):
  """`rotate` on input and weight: (x H)(W H)^T = x W^T, so with nothing rounded the function stays; 8 bits move it."""
  turned = {"num_bits": 8, "rotate": True}
  config = {"quant_cfg": {"default": OFF, "*mlp*weight_quantizer": {**turned, "axis": 0}, "*mlp*input_quantizer": turned}}
  one = BACKENDS[backend](llama)
  plain = one.logits()
  one.quantize("max", config)
  assert 1e-4 < error(one.logits(), plain) < 0.1
  assert error(one.floating(), plain) < 5e-6


def test_hadamard_spreads_a_spike():
  spike = np.zeros((1, 64), np.float32)
  spike[0, 17] = 8
  turned = hadamard.rotate(spike, 64, 5)
  assert np.abs(turned).max() / np.sqrt(np.mean(turned**2)) == 1  # all 64 values have magnitude 1
  np.testing.assert_array_equal(rotation.rotation(64, seed=5)(spike), turned)


@pytest.mark.parametrize(
  ("length", "kind", "block"), [(24, "hadamard", None), (24, "orthogonal", None), (24, "orthogonal", 6), (32, "hadamard", 32)]
)
def test_rotations_are_orthogonal(length, kind, block):
  turn = rotation.rotation(length, kind, block, 3)
  matrix = turn(np.eye(length))
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(length), atol=1e-14)
  rng = np.random.default_rng(0)
  w, g, x = rng.normal(size=(5, length)), rng.normal(size=length), rng.normal(size=(3, length))
  np.testing.assert_allclose(turn(x) @ turn.inputs(w, g).T, (x * g) @ w.T, atol=1e-12)
  np.testing.assert_allclose(turn.outputs(w.T), matrix.T @ w.T, atol=1e-12)


def test_rules():
  found = relations.parse("input_layernorm -> self_attn.(q_proj|k_proj)")
  assert found.source == "input_layernorm" and found.readers == ("self_attn.q_proj", "self_attn.k_proj")
  assert relations.parse("a -> b").readers == ("b",) and relations.parse("a -> (b|c).d").readers == ("b.d", "c.d")
  for bad in ("a", "a -> ", "-> b", "a|b -> c", "a -> b|c", "a -> b c"):
    with pytest.raises(ValueError, match="not understood"):
      relations.parse(bad)
  with pytest.raises(ValueError, match="allowed are 'hadamard', 'orthogonal'"):
    rotation.rotation(8, "fourier")
  with pytest.raises(ValueError, match="does not divide"):
    rotation.rotation(8, "orthogonal", 3)


def test_channels_of_repeated_heads():
  values = np.arange(12.0)  # two groups of two heads of size 3
  split = relations.by_source(values, 6, 3)
  np.testing.assert_array_equal(split, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
  np.testing.assert_array_equal(relations.by_reader(np.arange(6.0), 12, 3), [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
  with pytest.raises(ValueError, match="head_dim"):
    relations.by_source(values, 6, None)
  with pytest.raises(ValueError, match="cannot feed"):
    relations.by_source(values, 5, 1)


def test_norms_are_told_by_what_they_do():
  def rms(x, w):
    return w * x / np.sqrt(np.mean(x * x, axis=1, keepdims=True))

  def layer(x, w):
    return rms(x - x.mean(axis=1, keepdims=True), w)

  assert relations.norm_kind(rms, 24) == "rms" and relations.norm_kind(layer, 24) == "layer"
  assert relations.norm_kind(lambda x, w: rms(x, 1 + w), 24) == "other" and relations.norm_kind(lambda x, w: w * x, 24) == "other"
