"""Calibration under Flax's transforms: scanned, rematerialised and jitted layers give what the plain model gives."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.calibrate import Change, register_algorithm, unregister_algorithm
from experiments.models import load_jax
from tests.calibrate import twins
from tests.calibrate.twins import FORMATS, OFF, Jax
from tests.experiments import tiny
from tests.jax_backend import nets

IDS = [np.asarray(nets.tokens(seed)) for seed in range(3)]
REST = {"*lm_head*": OFF, "*embed*": OFF}
ONE_SWEEP = [{"method": "awq_lite"}, {"method": "gptq", "act_order": True}, {"method": "svdquant", "lowrank": 4}, {"method": "awq_clip"}]


def label(options: Any) -> str:
  return str(options.get("method", options)) if isinstance(options, dict) else str(options)


def plain(**options: Any) -> Jax:
  """The Llama of tests/jax_backend with one set of parameters, whatever the transform."""
  params = nets.Llama().init(jax.random.key(0), jnp.asarray(IDS[0]))["params"]
  if options.get("stack") is not None:
    params = nets.stacked(params, 2, options["stack"])
  return Jax(IDS, nets.Llama(**options), {"params": params})


def assert_same_layers(other: Jax, single: Jax, stacked: bool = False) -> None:
  """Layers "layers.up[1]" of a stack are the layers "layers.1.up" of the plain model.

  What is compiled as a whole sums in another order: statistics differ in their last bits, and where no choice is a tie, as here, so does
  what follows from them; 1e-5 of the largest.
  """
  one, two = twins.state(single.host()), twins.state(other.host())
  assert len(one) == len(two)
  for name, value in one.items():
    there = two[re.sub(r"layers\.(\d)\.(.*)\.(\w+)$", r"layers.\2[\1].\3", name) if stacked else name]
    if stacked and name.endswith("pre_quant_scale") and (value is None or there is None):
      assert value is there or (value if there is None else there).all() == 1, name  # a copy without a scale stands in a stack as 1
      continue
    assert (value is None) == (there is None), name
    if value is not None:
      np.testing.assert_allclose(there, value, atol=1e-5 * np.abs(value).max(), rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def singles() -> dict[Any, Jax]:
  """The plain model, calibrated once for each algorithm and format."""
  return {}


@pytest.mark.parametrize("form", ["int4", "nvfp4_static"])
@pytest.mark.parametrize("options", ONE_SWEEP, ids=label)
@pytest.mark.parametrize("transform", [{"stack": 0}, {"stack": 1}, {"stack": 0, "remat": True}, {"remat": True}, {"jit": True}], ids=str)
def test_transforms_change_nothing_in_one_sweep(transform, options, form, singles):
  key = (label(options), form)
  if key not in singles:
    singles[key] = plain().quantize(options, {**FORMATS[form], **REST})
  other = plain(**transform).quantize(options, {**FORMATS[form], **REST})
  assert_same_layers(other, singles[key], "stack" in transform)
  expected = singles[key].output()
  np.testing.assert_allclose(other.output(), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
  assert {row["layer"] for row in other.report} == set(other.host().layers())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.llama_folder(tmp_path_factory.mktemp("llama"), hidden_size=64, intermediate_size=96, head_dim=16)


def checkpoint(folder, **options: Any) -> Jax:
  """The Flax Llama of experiments.models, one checkpoint for every transform."""
  module, variables, _ = load_jax(folder, **options)
  return Jax([tiny.tokens(2, 20, seed) for seed in range(3)], module, variables)


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"scan_layers": True, "remat": True}, {"remat": True}], ids=str)
@pytest.mark.parametrize("method", ["awq_lite", "gptq", "svdquant"])
def test_llama_scanned_or_rematerialised(folder, options, method, singles):
  if method not in singles:
    singles[method] = checkpoint(folder).quantize(method, {**FORMATS["int4"], **REST})
  other = checkpoint(folder, **options).quantize(method, {**FORMATS["int4"], **REST})
  assert_same_layers(other, singles[method], "scan_layers" in options)


@pytest.mark.parametrize("options", [
  {"method": "gptq", "correction": 0.5}, {"method": "gptq", "true_sequential": True}, {"method": "awq_full"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_layerwise_under_remat(folder, options, form):
  """Blocks that recompute are blocks like any other; each is run alone, so that both run the same program."""
  runs = [checkpoint(folder, remat=remat).quantize({**options, "layerwise": True}, {**FORMATS[form], **REST}) for remat in (False, True)]
  assert_same_layers(*runs)
  assert [row["layer"] for row in runs[0].report] == [row["layer"] for row in runs[1].report]
  assert not any("kept" in row for row in runs[1].report)


@pytest.mark.parametrize("transform", [{"jit": True}, {"jit": True, "remat": True}], ids=str)
def test_layerwise_under_jit(transform):
  """Blocks of one kind share a trace under nn.jit, and so do calls; neither may hide a block or a batch. Twice, for what is kept."""
  options = {"method": "gptq", "layerwise": True, "true_sequential": True}
  single = plain().quantize(options, {**FORMATS["int4"], **REST})
  for _ in range(2):
    assert_same_layers(plain(**transform).quantize(options, {**FORMATS["int4"], **REST}), single)


def test_layerwise_on_a_stack_says_what_to_do(folder):
  with pytest.raises(ValueError, match=r"layerwise calibration needs a chain of equal blocks.*nn\.scan.*set layerwise to False"):
    checkpoint(folder, scan_layers=True).quantize({"method": "gptq", "layerwise": True}, FORMATS["int4"])


class Twice(nn.Module):
  """Blocks that are no chain: the first is called twice, or the second does not read what the first returns."""

  shared: bool

  @nn.compact
  def __call__(self, x: Any) -> Any:
    first, second = twins.FlaxBlock(name="layers_0"), twins.FlaxBlock(name="layers_1")
    y = first(x)
    return second(first(y)) if self.shared else second(y + 1.0)


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_that_are_no_chain_are_refused(shared):
  module = Twice(shared)
  one = Jax(module=module, variables=module.init(jax.random.key(0), jnp.ones((1, 1, twins.WIDTH))))
  with pytest.raises(ValueError, match="needs a chain of equal blocks"):
    one.quantize({"method": "gptq", "layerwise": True}, FORMATS["int4"])
  one.quantize("gptq", FORMATS["int4"])
  assert not any("kept" in row for row in one.report)


class Masked(nn.Module):
  """Blocks with further arguments: an array, a flag, and one by keyword; they return a tuple."""

  remat: bool = False

  @nn.compact
  def __call__(self, x: Any) -> Any:
    scale = jnp.arange(twins.WIDTH, dtype=jnp.float32) / twins.WIDTH
    block = nn.remat(MaskedBlock, static_argnums=(3,)) if self.remat else MaskedBlock
    for i in range(2):
      x, _ = block(name=f"layers_{i}")(x, scale, True, shift=scale)
    return nn.Dense(twins.OUT, name="head")(x)


class MaskedBlock(nn.Module):
  @nn.compact
  def __call__(self, x: Any, scale: Any, active: bool, shift: Any = None) -> Any:
    y = nn.Dense(twins.WIDTH, name="up_proj")(x * scale + shift)
    return (x + y if active else x), None


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_keep_their_other_arguments(remat):
  module = Masked(remat)
  variables = module.init(jax.random.key(0), jnp.ones((1, 1, twins.WIDTH)))
  data = twins.batches(3, (2, 20)) + twins.batches(1, (1, 5))
  one = Jax(data, module, variables).quantize({"method": "look"}, FORMATS["int4"])
  other = Jax(data, module, variables).quantize({"method": "look", "layerwise": True, "quantized_prefix": False}, FORMATS["int4"])
  assert [row["layer"] for row in other.report] == ["layers.0.up_proj", "layers.1.up_proj", "head"]
  np.testing.assert_allclose(other.report[0]["trace"], one.report[0]["trace"], rtol=1e-6)


@pytest.fixture(autouse=True)
def look():
  @register_algorithm("look", statistics=("hessian",))
  def look(layer, *, quantized_prefix=True):
    return Change(report={"tokens": layer.tokens, "trace": float(np.trace(layer.statistics["hessian"]))})

  yield
  unregister_algorithm("look")


def test_loops_in_any_spelling_and_nothing_given_changes():
  """`model(x)` or `model.apply(variables, x)`, arrays of numpy or JAX, collections asked for; the variables given stay as they are."""
  held = twins.flax_variables(twins.torch_net())
  copies = jax.tree.map(np.array, held)
  made = []
  for loop in (
    lambda model: [model(x) for x in twins.batches()],
    lambda model: [model.apply(held, jnp.asarray(x)) for x in twins.batches()],
    lambda model: [model(x, mutable=["intermediates"])[0].sum() for x in twins.batches()],
    lambda model: [model(x, mutable=["intermediates"], rngs={"dropout": jax.random.key(0)})[1] for x in twins.batches()],
  ):
    one = Jax(variables=held)
    made.append(twins.state(one.quantize({"method": "gptq", "layerwise": True}, FORMATS["int8"], loop).host()))
    twins.assert_same(made[0], made[-1])
  jax.tree.map(np.testing.assert_array_equal, held, copies)


class FlaxExperts(nn.Module):
  """Three experts; tokens go to the first two by their place, as capacity-based routing does with fixed shapes."""

  @nn.compact
  def __call__(self, x: Any) -> Any:
    x = nn.relu(nn.Dense(twins.WIDTH, name="up")(x)).reshape(-1, twins.WIDTH)
    parts = (x[:15], x[15:], x[:0])
    return jnp.concatenate([nn.Dense(twins.OUT, name=f"experts_{i}")(part) for i, part in enumerate(parts)])


@pytest.mark.parametrize("form", ["int4", "int8", "nvfp4_static"])
@pytest.mark.parametrize("method", ["gptq", "awq_full", "local_hessian", "svdquant"])
def test_experts_without_tokens_keep_max(method, form):
  module = FlaxExperts()
  variables = module.init(jax.random.key(0), jnp.ones((2, 20, twins.WIDTH)))
  one = Jax(module=module, variables=variables).quantize([{"method": method}, "look"], FORMATS[form])
  plain = Jax(module=module, variables=variables).quantize("max", FORMATS[form])
  kept = {row["layer"]: row["kept"] for row in one.report if "kept" in row and row["method"] == method}
  assert kept == {"experts.2": "max calibration (no tokens)"}
  tokens = {row["layer"]: row["tokens"] for row in one.report if "tokens" in row}
  assert tokens == {"up": 120, "experts.0": 45, "experts.1": 75}
  states = [{k: v for k, v in twins.state(twin.host()).items() if k.startswith("experts.2.")} for twin in (one, plain)]
  twins.assert_same(*states)
  assert np.isfinite(one.output()).all()
