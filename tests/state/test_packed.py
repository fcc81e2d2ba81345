"""Compressed models: the codes are saved as they are held, read by the other framework, and not turned into floats on the way."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_backend as jb
import torch_backend as tb
from core.state import read
from jax_backend.state import state_of as jax_state
from tests.state import nets
from torch_backend.state import state_of as torch_state

OFF = {"default": {"enable": False}}
FORMATS = {
  "int8": {"num_bits": 8, "axis": 0},
  "int4": {"num_bits": 4, "block_sizes": {-1: 16}},
  "int8_zero_point": {"num_bits": 8, "axis": 0, "zero_point": True},
  "fp8_2d": {"num_bits": (4, 3), "block_sizes": {-1: 16, -2: 8}},
  "nvfp4": {"format": "nvfp4"},
  "nvfp4_static": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}},
  "mxfp4": {"format": "mxfp4"},
  "mxfp6": {"format": "mxfp6_e3m2"},
  "nf4_double": {"format": "nf4_double"},
  "w4a8": [{"num_bits": 4, "block_sizes": {-1: 16}}, {"num_bits": (4, 3)}],
  "rotated": {"num_bits": 4, "block_sizes": {-1: 16}, "rotate": {"enable": True, "mode": "rotate_back", "seed": 1}},
  "affine": {"num_bits": 8, "axis": 0, "bias": {-1: None, "type": "static"}},
}


def compressed(net: torch.nn.Module) -> torch.nn.Module:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", tb.ConfigWarning)
    return tb.compress(net)


def config(name: str) -> dict:
  return {"quant_cfg": {**OFF, "*weight_quantizer": FORMATS[name], "*head*": {"enable": False}}, "algorithm": "max"}


SLOW = ("int8", "fp8_2d", "nvfp4_static", "mxfp4", "affine")
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FORMATS]


@pytest.mark.parametrize("name", CASES)
def test_torch_to_jax_and_back(name, tmp_path, compared):
  net = compressed(nets.quantized_torch(config(name)))
  tb.save(net, tmp_path / "torch")
  saved = read(tmp_path / "torch")
  assert len(saved.packed) == 6 and "layers.0.mlp.up_proj.weight" not in saved.tensors and "head.weight" in saved.tensors
  qmodule, qvariables = jb.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path / "torch")
  assert jb.is_compressed(qvariables)
  compared(nets.assert_same_state(torch_state(net), jax_state(qmodule, qvariables)))
  expected = nets.torch_weights(net)
  simulated = nets.jax_weights(jb.decompress(qmodule, qvariables))
  for layer, value in expected.items():
    assert np.array_equal(simulated[layer], value), layer
    compared(value.size)
  jb.save(qmodule, qvariables, tmp_path / "jax")
  back = tb.restore(nets.torch_net(seed=2), tmp_path / "jax")
  compared(nets.assert_same_state(torch_state(net), torch_state(back)))
  assert np.array_equal(nets.torch_output(back), nets.torch_output(net))


@pytest.mark.slow
def test_a_compressed_stack(tmp_path):
  net = compressed(nets.quantized_torch(config("nvfp4"), layers=2))
  tb.save(net, tmp_path / "torch")
  module = nets.FlaxNet(2, 0)
  qmodule, qvariables = jb.restore(module, nets.flax_variables(module), tmp_path / "torch")
  nets.assert_same_state(torch_state(net), jax_state(qmodule, qvariables))
  assert np.abs(nets.jax_output(qmodule, qvariables) - nets.torch_output(net)).max() < 1e-4  # sums in another order


def test_half_of_a_stack_cannot_be_compressed(tmp_path):
  net = nets.quantized_torch(config("nvfp4"), layers=2)
  tb.compress(net, "layers.1.mlp.up_proj")
  tb.save(net, tmp_path)
  module = nets.FlaxNet(2, 0)
  with pytest.raises(ValueError, match=r"1 of the 2 stacked copies of 'layers/mlp/up_proj/kernel' are compressed"):
    jb.restore(module, nets.flax_variables(module), tmp_path)


@pytest.mark.parametrize("source", ["compressed", "floats"])
def test_restoring_into_a_compressed_model(source, tmp_path):
  net = nets.quantized_torch(config("int4"))
  net = compressed(net) if source == "compressed" else net
  tb.save(net, tmp_path)
  target = compressed(nets.quantized_torch(config("nvfp4"), seed=5))
  tb.restore(target, tmp_path)
  assert tb.is_compressed(target) == (source == "compressed")
  assert np.array_equal(nets.torch_output(target), nets.torch_output(net))
  qmodule, qvariables = jb.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path)
  other = jb.compress(*nets.quantized_jax({**config("mxfp4"), "algorithm": None}))
  restored = jb.restore(qmodule, other, tmp_path)
  assert jb.is_compressed(restored[1]) == (source == "compressed")
  nets.assert_same_state(jax_state(*restored), jax_state(qmodule, qvariables))


def test_shared_codes_and_a_model_left_alone_by_an_error(tmp_path):
  class Tied(torch.nn.Module):
    def __init__(self, tie: bool = True) -> None:
      super().__init__()
      self.a, self.b = torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 32, bias=False)
      if tie:
        self.b.weight = self.a.weight

    def forward(self, x):
      return self.b(self.a(x))

  net = Tied()
  tb.quantize(net, {"quant_cfg": {**OFF, "*weight_quantizer": FORMATS["nvfp4"]}, "algorithm": "max"}, group_rules=())
  tb.compress(net)
  tb.save(net, tmp_path)
  assert dict(read(tmp_path).tied) == {"b.weight": "a.weight"}
  for other in (tb.restore(Tied(), tmp_path), tb.restore(Tied(False), tmp_path)):
    assert other.a.packed_weight is other.b.packed_weight
    assert np.array_equal(nets.torch_output_of(other), nets.torch_output_of(net))
  plain = nets.torch_net()
  before = {name: id(p) for name, p in plain.named_parameters()}
  with pytest.raises(ValueError, match="lacks 13 of the model's tensors"):
    tb.restore(plain, tmp_path)
  assert {name: id(p) for name, p in plain.named_parameters()} == before and not tb.is_quantized(plain)


def test_a_float_module_cannot_take_codes(tmp_path):
  class Own(torch.nn.Module):
    def __init__(self, linear: bool) -> None:
      super().__init__()
      self.fc = torch.nn.Linear(32, 8, bias=False) if linear else torch.nn.Module()
      self.fc.weight = torch.nn.Parameter(torch.ones(8, 32))

    def forward(self, x):
      return x @ self.fc.weight.T

  net = Own(True)
  tb.quantize(net, {"quant_cfg": {**OFF, "*weight_quantizer": FORMATS["nvfp4"]}, "algorithm": "max"})
  tb.compress(net)
  tb.save(net, tmp_path)
  with pytest.raises(ValueError, match=r"1 compressed weights of what is no quantized layer in the model: fc.weight"):
    tb.restore(Own(False), tmp_path)


def test_the_arithmetic_of_products_is_kept(tmp_path):
  quant_cfg = {**OFF, "*up_proj.weight_quantizer": FORMATS["int8"], "*up_proj.input_quantizer": {"num_bits": 8}}
  net = nets.quantized_torch({"quant_cfg": quant_cfg, "algorithm": "max"})
  tb.compress(net, matmul="int8")
  tb.save(net, tmp_path)
  other = tb.restore(nets.torch_net(seed=2), tmp_path)
  assert other.layers[0].mlp.up_proj.packed_weight.matmul == "int8"
  assert np.array_equal(nets.torch_output(other), nets.torch_output(net))
  _, qvariables = jb.restore(nets.FlaxNet(), nets.flax_variables(), tmp_path)
  assert qvariables["quant"]["layers_0"]["mlp"]["up_proj"]["weight_quantizer"].packed.matmul == "int8"


def test_codes_of_a_bfloat16_model(tmp_path):
  net = compressed(nets.quantized_torch(config("nvfp4"), dtype=torch.bfloat16))
  tb.save(net, tmp_path)
  module = nets.FlaxNet(dtype=jnp.bfloat16)
  restored = jb.restore(module, nets.flax_variables(module), tmp_path)
  nets.assert_same_state(torch_state(net), jax_state(*restored))
  assert restored[1]["quant"]["layers_0"]["mlp"]["up_proj"]["weight_quantizer"].packed.dtype == "bfloat16"
