"""Saved from PyTorch, restored in JAX, and back: equal weights, codes, statistics and settings, for every preset."""

from __future__ import annotations

import numpy as np
import pytest

import jax_backend
import torch_backend
from jax_backend.state import state_of as jax_state
from tests.state import nets
from torch_backend.state import state_of as torch_state


def _without_search(name: str) -> dict:
  """The preset's formats, with max calibration: what its algorithm does to a model is tested by `test_algorithms`."""
  return {**torch_backend.preset(name), "algorithm": "max"}


# One preset of every format; the others differ in which layers they name and in their algorithms.
FAST = (
  "INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "W4A8_AWQ_BETA_CFG",
  "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "NVFP4_DEFAULT_CFG", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "MXFP8_DEFAULT_CFG", "MXFP4_DEFAULT_CFG",
)  # fmt: skip
EVERY = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in nets.PRESETS]


@pytest.mark.parametrize("name", EVERY)
def test_presets(name, tmp_path, compared):
  net = nets.quantized_torch(_without_search(name))
  torch_backend.save(net, tmp_path / "torch")
  qmodule, qvariables = jax_backend.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path / "torch")
  compared(nets.assert_same_state(torch_state(net), jax_state(qmodule, qvariables)))
  simulated, expected = nets.jax_weights(qvariables), nets.torch_weights(net)
  assert set(simulated) == set(expected)
  for layer, value in expected.items():
    assert np.array_equal(simulated[layer], value), layer
    compared(value.size)

  jax_backend.save(qmodule, qvariables, tmp_path / "jax")
  back = torch_backend.restore(nets.torch_net(seed=2), tmp_path / "jax")
  compared(nets.assert_same_state(torch_state(net), torch_state(back)))
  assert np.array_equal(nets.torch_output(back), nets.torch_output(net))


SIGNED = {"num_bits": 4, "block_sizes": {-1: 16}}
STATIC_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
ALGORITHMS = {
  "awq_lite": (torch_backend.preset("INT4_AWQ_CFG")["quant_cfg"], "awq_lite"),
  "smoothquant": (torch_backend.preset("INT8_SMOOTHQUANT_CFG")["quant_cfg"], "smoothquant"),
  "svdquant": (torch_backend.preset("NVFP4_SVDQUANT_DEFAULT_CFG")["quant_cfg"], {"method": "svdquant", "lowrank": 4}),
  "gptq_signed": ({"*weight_quantizer": SIGNED}, {"method": "gptq", "scale_search": "signed"}),
  "lsq": ({"*weight_quantizer": STATIC_NVFP4}, {"method": "lsq", "steps": 2}),
}


# Calibration in JAX compiles the model for every statistic that an algorithm asks for.
CASES = [pytest.param(b, n, marks=[pytest.mark.slow] if b == "jax" else []) for b in ("torch", "jax") for n in ALGORITHMS]


@pytest.mark.parametrize("backend, name", CASES)
def test_algorithms(backend, name, tmp_path, compared):
  quant_cfg, algorithm = ALGORITHMS[name]
  config = {"quant_cfg": {"default": {"enable": False}, **quant_cfg}, "algorithm": algorithm}
  if backend == "torch":
    net = nets.quantized_torch(config)
    torch_backend.save(net, tmp_path)
    state, output = torch_state(net), nets.torch_output(net)
  else:
    saved = nets.quantized_jax(config)
    jax_backend.save(*saved, tmp_path)
    state, output = jax_state(*saved), nets.jax_output(*saved)
  net = torch_backend.restore(nets.torch_net(seed=2), tmp_path)
  restored = jax_backend.restore(nets.FlaxNet(), nets.flax_variables(seed=2), tmp_path)
  compared(nets.assert_same_state(state, torch_state(net)) + nets.assert_same_state(state, jax_state(*restored)))
  same = nets.torch_output(net) if backend == "torch" else nets.jax_output(*restored)
  assert np.array_equal(same, output)
  for layer, value in nets.torch_weights(net).items():
    assert np.array_equal(nets.jax_weights(restored[1])[layer], value), layer
