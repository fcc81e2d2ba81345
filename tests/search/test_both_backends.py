"""The search in PyTorch and in JAX on one checkpoint: equal scores, one configuration, the same model in the other framework."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_backend
import torch_backend
from core.search.scores import probe
from core.search.state import get_auto_quantize_config
from experiments.models import load_jax, load_torch_twin
from jax_backend.auto_quantize import auto_quantize as jax_search
from jax_backend.search_host import JaxSearchHost
from jax_backend.search_scores import Step
from tests.experiments import tiny
from torch_backend.auto_quantize import auto_quantize as torch_search
from torch_backend.search_host import TorchSearchHost

SVD = {
  "quant_cfg": {
    "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}},
    "*input_quantizer": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
    "*lm_head*": {"enable": False},
    "*embed_tokens*": {"enable": False},
    "default": {"enable": False},
  },
  "algorithm": {"method": "svdquant", "lowrank": 1},
}
INT8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*lm_head*": {"enable": False}, "default": {"enable": False}}}
FORMATS: dict[str, Any] = {"svd": SVD, "int8": INT8}
BATCHES = [tiny.tokens(3, 16, seed) for seed in range(2)]


def torch_step(model: Any, ids: np.ndarray) -> Any:
  return model(torch.from_numpy(ids.astype(np.int64)))


def torch_loss(logits: Any, ids: np.ndarray) -> Any:
  return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(ids.astype(np.int64))[:, 1:].flatten())


def jax_loss(logits: Any, ids: np.ndarray) -> Any:
  return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "attention_bias": True}
  return tiny.llama_folder(tmp_path_factory.mktemp("llama"), **sizes)


@pytest.fixture(scope="module")
def hosts(folder):
  """(torch's, JAX's), each with one format calibrated."""
  module, variables, _ = load_jax(folder)
  ours = JaxSearchHost(module, variables, lambda: iter(BATCHES), Step(lambda model, ids: model(ids), jax_loss))
  theirs = TorchSearchHost(load_torch_twin(folder)[0], BATCHES, 2, torch_step, torch_loss)
  for host in (theirs, ours):
    host.prepare("svd", SVD, [])
  return theirs, ours


def choices_of(host: Any) -> dict[str, tuple[str, ...]]:
  return {layer.name: ("svd",) for layer in host.layers() if layer.name not in ("lm_head", "model.embed_tokens")}


def assert_close(found: Any, expected: Any) -> None:
  """Within the 1e-3 that is promised: float32 gradients and logits of two frameworks, and at times one code on a boundary."""
  assert found.keys() == expected.keys()
  for unit, row in expected.items():
    assert list(found[unit]) == list(row)
    for name, value in row.items():
      assert value != 0
      np.testing.assert_allclose(found[unit][name], value, rtol=1e-3, err_msg=f"{unit} {name}")


def test_layers_are_the_same(hosts):
  theirs, ours = hosts
  here = {layer.name: (layer.shape, set(layer.quantizers), layer.copies) for layer in ours.layers()}
  assert here == {layer.name: (layer.shape, set(layer.quantizers), layer.copies) for layer in theirs.layers()}
  assert [layer.name for layer in ours.layers()] == [layer.name for layer in theirs.layers()]


@pytest.mark.parametrize("by_position", [False, True])
def test_gradient_scores_agree(hosts, by_position):
  theirs, ours = hosts
  choices = choices_of(ours)
  assert_close(ours.gradient_scores(0, BATCHES[0], choices, by_position), theirs.gradient_scores(0, BATCHES[0], choices, by_position))


@pytest.mark.slow
def test_kl_scores_agree(hosts):
  theirs, ours = hosts
  choices = choices_of(ours)
  groups = {"qkv": [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"], "down": ["model.layers.0.mlp.down_proj"]}
  assert_close(ours.kl_scores(0, BATCHES[0], choices, groups), theirs.kl_scores(0, BATCHES[0], choices, groups))


def test_weight_errors_agree(hosts):
  theirs, ours = hosts
  choices = choices_of(ours)
  found, expected = ours.weight_errors(choices), theirs.weight_errors(choices)
  for layer, row in expected.items():
    for name, pair in row.items():
      np.testing.assert_allclose(found[layer][name], pair, rtol=1e-5)  # low-rank products: float32 in torch, float64 here


@pytest.mark.slow
def test_hessian_traces_agree(hosts):
  theirs, ours = hosts
  names = [layer.name for layer in ours.layers() if "layers.0" in layer.name]
  shapes = {layer.name: layer.shape for layer in ours.layers()}
  probes = [{name: probe(1, 0, 0, name, shapes[name]) for name in names}]
  found, expected = (host.hessian_traces(0, BATCHES[0], names, probes) for host in (ours, theirs))
  scale = max(map(abs, expected.values()))
  for name in names:  # v H v is a sum of large terms of both signs
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def test_one_search_for_both(folder):
  """One state, but for the backend's name; its configuration makes the searched model in either framework."""
  module, variables, _ = load_jax(folder)
  budget = {"effective_bits": 8.5}
  model, theirs = torch_search(load_torch_twin(folder)[0], budget, FORMATS, BATCHES, torch_step, method="sqnr")
  (qmodule, qvariables), ours = jax_search(module, variables, budget, FORMATS, BATCHES, method="sqnr")
  assert ours["assignment"] == theirs["assignment"] and len(set(ours["assignment"].values())) == 2
  assert ours["effective_bits"] == theirs["effective_bits"] and ours["bits"] == theirs["bits"]
  config = get_auto_quantize_config(json.loads(json.dumps(ours)))
  assert config == get_auto_quantize_config(theirs)
  assert {step["method"] for step in config["algorithm"] if isinstance(step, dict)} == {"svdquant"}
  again = torch_backend.quantize(load_torch_twin(folder)[0], config, lambda m: [torch_step(m, ids) for ids in BATCHES])
  with torch.no_grad():
    expected = torch_step(again, BATCHES[0]).numpy()
    assert np.array_equal(torch_step(model, BATCHES[0]).numpy(), expected)
  found = jax.jit(qmodule.apply)(qvariables, BATCHES[0])
  # Activations are quantized: a float32 sum in another order may move a code by one step.
  assert np.mean(np.abs(np.asarray(found) - expected)) < 1e-3 * np.abs(expected).max()
  held = jax_backend.weight_quantization(qmodule, qvariables)
  for name, quantizer in torch_backend.quantizers(again).items():
    assert (name in held) == (quantizer.is_enabled and name.endswith("weight_quantizer")), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient", "kl_div", "hessian"])
def test_searches_agree(folder, method):
  module, variables, _ = load_jax(folder)
  formats = {**FORMATS, "nvfp4": "NVFP4_DEFAULT_CFG"}
  arguments = {"constraints": {"effective_bits": 8.5}, "quantization_formats": formats, "data_loader": BATCHES, "method": method}
  _, theirs = torch_search(load_torch_twin(folder)[0], forward_step=torch_step, loss_func=torch_loss, **arguments)
  _, ours = jax_search(module, variables, loss_func=jax_loss, **arguments)
  assert ours["assignment"] == theirs["assignment"]
  np.testing.assert_allclose(ours["objective"], theirs["objective"], rtol=1e-3)
