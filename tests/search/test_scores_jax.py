"""Scores in JAX against what the words of `core.search.host` say, computed another way; through every transform; on every kind of layer."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import jax_backend
from core.search.scores import probe
from jax_backend.search_host import JaxSearchHost
from jax_backend.search_scores import Step
from tests.jax_backend import nets

INT4 = {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}}], "algorithm": "max"}
INT8_OUT = {
  "quant_cfg": [{"quantizer_name": f"*{role}_quantizer", "cfg": {"num_bits": 8}} for role in ("weight", "input", "output")],
  "algorithm": "max",
}


def loss_func(output: Any, batch: Any) -> Any:
  return jnp.mean(jnp.sin(output * 2.0))


def forward_step(model: Any, batch: Any) -> Any:
  return model(batch)


def host_of(module: nn.Module, variables: Any, batches: list[Any], formats: dict[str, Any], step: Step | None = None) -> JaxSearchHost:
  host = JaxSearchHost(module, variables, lambda: iter(batches), step or Step(forward_step, loss_func))
  for name, config in formats.items():
    host.prepare(name, config, [])
  return host


def choices_of(host: JaxSearchHost, *formats: str) -> dict[str, tuple[str, ...]]:
  return {layer.name: formats for layer in host.layers()}


def perturbed(module: nn.Module, variables: Any, x: Any, path: tuple[str, ...]) -> Any:
  """(gradient of the loss with respect to a layer's float output, that output), by adding a perturbation to it."""

  def run(offset: Any) -> Any:
    kept: list[Any] = []

    def add(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
      y = next_fun(*args, **kwargs)
      if tuple(context.module.path) == path and context.method_name == "__call__":
        kept.append(y)
        return y if offset is None else y + offset
      return y

    with nn.intercept_methods(add):
      return loss_func(module.apply(variables, x), x), kept[0]

  shape = jax.eval_shape(lambda: run(None)[1])
  return jax.jit(jax.grad(run, has_aux=True))(jnp.zeros(shape.shape))


def output_in(module: nn.Module, variables: Any, x: Any, layer: str) -> Any:
  """A layer's output with this layer alone quantized, by `quantize` and Flax's own capture."""
  rules = [{"quantizer_name": "*", "enable": False}]
  rules += [{**rule, "quantizer_name": rule["quantizer_name"].replace("*", f"{layer}.")} for rule in INT8_OUT["quant_cfg"]]
  qmodule, qvariables = jax_backend.quantize(module, variables, {"quant_cfg": rules, "algorithm": "max"}, lambda model: model(x))
  _, state = jax.jit(functools.partial(qmodule.apply, capture_intermediates=True, mutable=["intermediates"]))(qvariables, x)
  quantizer = qvariables["quant"][layer]["output_quantizer"]
  return quantizer(state["intermediates"][layer]["__call__"][0])  # Flax captures inside of the interceptor, before the quantizer


class Mixed(nn.Module):
  """Convolution, joined axes both ways, an einsum, a layer that runs twice, and mapped experts."""

  @nn.compact
  def __call__(self, x: Any) -> Any:
    x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x)).reshape(x.shape[0], -1, 8)
    x = nn.DenseGeneral((2, 4), name="split")(x)
    x = nn.DenseGeneral(8, axis=(-2, -1), name="join")(x)
    x = nn.Einsum((8, 8), "...i,io->...o", name="sum")(x)
    twice = nn.Dense(8, name="twice")
    x = twice(nn.gelu(twice(x)))
    mapped: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}  # flax has its types wrong
    experts = nn.vmap(nn.Dense, axis_size=3, **mapped)
    return jnp.sum(jnp.tanh(experts(4, name="experts")(x)), axis=0)


@pytest.fixture(scope="module")
def mixed():
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  module = Mixed()
  variables = jax.jit(module.init)(jax.random.key(1), x)
  return module, variables, x, host_of(module, variables, [x], {"int8": INT8_OUT})


@pytest.mark.slow
def test_gradient_scores_are_those_of_a_perturbation(mixed):
  """g from a perturbation of the output, Q(y) from `quantize` of the layer alone: (g (Q(y) - y))^2, summed, in float64."""
  module, variables, x, host = mixed
  found = host.gradient_scores(0, x, choices_of(host, "int8"))
  assert list(found) == ["conv", "split", "join", "sum", "twice", "experts"]
  for layer in ("conv", "join"):
    gradient, y = perturbed(module, variables, x, (layer,))
    q = output_in(module, variables, x, layer)
    expected = np.sum((np.asarray(gradient, np.float64) * (np.asarray(q, np.float64) - np.asarray(y, np.float64))) ** 2)
    assert expected > 0
    np.testing.assert_allclose(found[layer]["int8"], expected, rtol=1e-4)  # float32 gradients, summed in another order
  assert all(score > 0 for scores in found.values() for score in scores.values())


class Two(nn.Module):
  @nn.compact
  def __call__(self, x: Any) -> Any:
    return nn.Dense(5, use_bias=False, name="second")(jnp.tanh(nn.Dense(6, use_bias=False, name="first")(x)))


def test_gradient_scores_are_finite_differences_to_first_order():
  """score = sum over outputs of (the loss's change by that output's error alone)^2, here by central differences in float64."""
  rng = np.random.default_rng(0)
  x, w, head = (rng.normal(size=s).astype(np.float32) for s in ((3, 16), (16, 6), (6, 5)))
  variables = {"params": {"first": {"kernel": jnp.asarray(w)}, "second": {"kernel": jnp.asarray(head)}}}
  host = host_of(Two(), variables, [x], {"int4": INT4})
  found = host.gradient_scores(0, x, choices_of(host, "int4"))["first"]["int4"]
  y = x.astype(np.float64) @ w.astype(np.float64)
  quantized = core.fake_quantize(w.T, jax_backend.Quantizer(INT4["quant_cfg"][0]["cfg"]).spec).T
  error = x.astype(np.float64) @ quantized.astype(np.float64) - y

  def loss(y: np.ndarray) -> float:
    return float(np.mean(np.sin(2.0 * (np.tanh(y) @ head.astype(np.float64)))))

  total, step = 0.0, 1e-4
  for place in np.ndindex(y.shape):
    moved = np.zeros_like(y)
    moved[place] = step * error[place]
    total += ((loss(y + moved) - loss(y - moved)) / (2 * step)) ** 2
  np.testing.assert_allclose(found, total, rtol=1e-3)


@pytest.mark.slow
def test_kl_scores_are_the_divergence_of_the_outputs(mixed):
  module, variables, x, _ = mixed
  host = host_of(module, variables, [x], {"int4": INT4, "int8": INT8_OUT})
  choices = {"conv": ("int8", "int4"), "sum": ("int4",), "experts": ("int4",)}
  found = host.kl_scores(0, x, choices, {"both": ("conv", "sum"), "experts": ("experts",)})
  assert {group: list(row) for group, row in found.items()} == {"both": ["int8", "int4"], "experts": ["int4"]}
  reference = log_softmax(module.apply(variables, x))

  def expected(*layers: str) -> float:
    rules = [{"quantizer_name": "*", "enable": False}]
    rules += [{"quantizer_name": f"{layer}.weight_quantizer", "cfg": INT4["quant_cfg"][0]["cfg"]} for layer in layers]
    qmodule, qvariables = jax_backend.quantize(module, variables, {"quant_cfg": rules, "algorithm": "max"}, lambda model: model(x))
    other = log_softmax(qmodule.apply(qvariables, x))
    return float(np.sum(np.exp(reference) * (reference - other)))

  # float32 logits of two compilations of one model differ by 1e-6; a divergence of 1e-3 is the square of 5e-2.
  np.testing.assert_allclose(found["both"]["int4"], expected("conv", "sum"), rtol=1e-3)
  np.testing.assert_allclose(found["experts"]["int4"], expected("experts"), rtol=1e-3)


def log_softmax(logits: Any) -> np.ndarray:
  values = np.asarray(logits, np.float64)
  values = values - values.max(-1, keepdims=True)
  return values - np.log(np.exp(values).sum(-1, keepdims=True))


@pytest.mark.slow
def test_hessian_traces_are_those_of_the_whole_hessian():
  module, x = nets.MLP(hidden=5, out=3), jax.random.normal(jax.random.key(0), (7, 4))
  variables: Any = module.init(jax.random.key(1), x)
  host = host_of(module, variables, [x], {})
  shapes = {layer.name: layer.shape for layer in host.layers()}
  probes = [{name: probe(3, 0, i, name, shape) for name, shape in shapes.items()} for i in range(2)]
  found = host.hessian_traces(0, x, list(shapes), probes)

  def loss(weights: Any) -> Any:
    params = {name: {**variables["params"][name], "kernel": w.T} for name, w in weights.items()}
    return loss_func(module.apply({"params": params}, x), x)

  hessian = jax.hessian(loss)({name: variables["params"][name]["kernel"].T for name in shapes})
  for name in shapes:
    expected = 0.0
    for vectors in probes:
      for other in shapes:  # a probe moves all layers at once
        expected += np.einsum("ab,abcd,cd->", vectors[name](), np.asarray(hessian[name][other], np.float64), vectors[other]()) / 2
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)  # float32 sums of a few dozen terms of size 0.1


class Block(nn.Module):
  @nn.compact
  def __call__(self, x: Any, _: Any = None) -> Any:
    y = nn.Dense(24, name="up")(x)
    return x + nn.Dense(16, use_bias=False, name="down")(nn.silu(y)), None


class Stack(nn.Module):
  """`axis`: None unrolls the blocks; a number scans them with parameters stacked on that axis."""

  axis: int | None = None
  remat: bool = False
  jit: bool = False

  @nn.compact
  def __call__(self, x: Any) -> Any:
    block = nn.remat(Block) if self.remat else Block
    block = nn.jit(block) if self.jit else block
    if self.axis is None:
      for i in range(2):
        x, _ = block(name=f"layers_{i}")(x)
      return x
    x, _ = nn.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2)(name="layers")(x, None)
    return x


CASES = [(1, True, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, False, True), (None, True, True)))]


@pytest.fixture(scope="module")
def unrolled():
  """(module, parameters, input, host with one format whose algorithm changes weights and scales inputs)."""
  x = jax.random.normal(jax.random.key(0), (2, 5, 16))
  variables = jax.jit(Stack().init)(jax.random.key(1), x)
  return Stack(), variables["params"], x, awq_host(Stack(), variables["params"], x)


def awq_host(module: nn.Module, params: Any, x: Any) -> JaxSearchHost:
  return host_of(module, {"params": params}, [x], {"awq": {"quant_cfg": INT8_OUT["quant_cfg"], "algorithm": "awq_lite"}})


def transformed(params: Any, x: Any, axis: int | None, remat: bool, jit: bool) -> JaxSearchHost:
  if axis is not None:
    params = {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), params["layers_0"], params["layers_1"])}
  return awq_host(Stack(axis, remat, jit), params, x)


def assert_sums_agree(found: Any, expected: Any, rtol: float) -> None:
  """A stack's scores are the sums of its layers'."""
  for layer in ("up", "down"):
    here, there = ([np.asarray(value) for name, value in row.items() if name.endswith(layer)] for row in (found, expected))
    assert there and np.all(sum(there) != 0)
    np.testing.assert_allclose(sum(here), sum(there), rtol=rtol)


@pytest.mark.parametrize(("axis", "remat", "jit"), CASES)
def test_gradient_scores_through_transforms(unrolled, axis, remat, jit):
  """1e-5: the same float32 operations, fused and summed in another order."""
  _, params, x, plain = unrolled
  host = transformed(params, x, axis, remat, jit)
  found, expected = (one.gradient_scores(0, x, choices_of(one, "awq")) for one in (host, plain))
  assert_sums_agree({n: row["awq"] for n, row in found.items()}, {n: row["awq"] for n, row in expected.items()}, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "remat", "jit"), CASES)
def test_other_scores_through_transforms(unrolled, axis, remat, jit):
  _, params, x, plain = unrolled
  results = []
  for host in (transformed(params, x, axis, remat, jit), plain):
    choices = choices_of(host, "awq")
    shapes = {s.name: (s.copies, *s.shape) if s.copies > 1 else s.shape for s in host.layers()}
    # One vector for all copies, so that an unrolled stack has the same.
    vectors = {n: functools.partial(np.broadcast_to, probe(0, 0, 0, n.rpartition(".")[2], s[-2:])(), s) for n, s in shapes.items()}
    errors = {name: row["awq"] for name, row in host.weight_errors(choices).items()}
    results.append((host.kl_scores(0, x, choices, {"all": tuple(choices)}), errors, host.hessian_traces(0, x, list(choices), [vectors])))
  (divergence, errors, traces), (expected, other_errors, other_traces) = results
  np.testing.assert_allclose(divergence["all"]["awq"], expected["all"]["awq"], rtol=1e-3)
  assert_sums_agree(errors, other_errors, 1e-6)
  assert_sums_agree(traces, other_traces, 1e-3)  # differences of large terms
