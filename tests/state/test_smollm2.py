"""A real language model saved from one framework and restored in the other: equal codes, equal logits in the framework that saved it."""

from __future__ import annotations

import functools
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_backend
import torch_backend
from experiments import models
from jax_backend.state import state_of as jax_state
from tests.state import nets
from torch_backend.state import state_of as torch_state

pytestmark = [pytest.mark.slow, pytest.mark.models]
# Name of a preset, and whether its weights are compressed before they are saved.
CASES = (("NVFP4_DEFAULT_CFG", False), ("NVFP4_DEFAULT_CFG", True), ("INT8_SMOOTHQUANT_CFG", False), ("INT4_AWQ_CFG", False))


@functools.cache
def ids() -> np.ndarray:
  tokenizer = models.load_tokenizer("smollm2")
  text = "One arithmetic, two frameworks: what is saved from the one is restored in the other, with equal codes. " * 4
  return np.array([tokenizer(text)["input_ids"][:64]])


def _logits(model) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(ids())).logits.numpy()


@pytest.mark.parametrize("name, compressed", CASES)
def test_torch_to_jax_and_back(name, compressed, tmp_path, compared):
  batch = torch.from_numpy(ids())
  model, _ = models.load_torch("smollm2")
  torch_backend.quantize(model, torch_backend.preset(name), lambda m: m(batch))
  if compressed:
    torch_backend.compress(model)
  expected, count = _logits(model), 0
  started = time.perf_counter()
  torch_backend.save(model, tmp_path / "torch")
  saved = time.perf_counter() - started
  size = sum(f.stat().st_size for f in (tmp_path / "torch").iterdir())

  module, variables, _ = models.load_jax("smollm2")
  abstract = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
  del variables
  started = time.perf_counter()
  qmodule, qvariables = jax_backend.restore(module, abstract, tmp_path / "torch")
  restored = time.perf_counter() - started
  count += nets.assert_same_state(torch_state(model), jax_state(qmodule, qvariables))
  simulated = nets.jax_weights(qvariables)
  assert len(simulated) == 212  # 30 layers of 7, table and head
  for layer, value in nets.torch_weights(model).items():
    assert np.array_equal(simulated[layer], value), layer
    count += value.size
  # Another order of summation moves single activation codes, and one code moves everything behind it (README).
  apart = np.abs(np.asarray(qmodule.apply(qvariables, jnp.asarray(ids()))) - expected).max()
  times = f"saved in {saved:.1f} s, restored in JAX in {restored:.1f} s"
  print(f"\n{name}{' compressed' * compressed}: {size:,} bytes, {times}; logits up to {apart:.3g} apart")

  jax_backend.save(qmodule, qvariables, tmp_path / "jax")
  del qvariables, simulated
  other, _ = models.load_torch("smollm2")
  torch_backend.restore(other, tmp_path / "jax")
  count += nets.assert_same_state(torch_state(model), torch_state(other))
  assert np.array_equal(_logits(other), expected)
  compared(count)
  print(f"{count:,} values equal; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
