"""ONNX from JAX: symbolic lengths, compressed variables, and what cannot be exported."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import jax_backend
from core.export.onnx_run import run
from experiments.export_onnx import TOLERANCE
from tests.calibrate import twins

CONFIG = {**twins.FORMATS["int4"], "*input_quantizer": {"num_bits": (4, 3)}}


@pytest.mark.slow
def test_symbolic_lengths_and_compressed_variables(tmp_path: Path) -> None:
  net = twins.Jax().quantize("max", CONFIG)
  batch, tokens = jax.export.symbolic_shape("B,T")
  shape = jax.ShapeDtypeStruct((batch, tokens, twins.WIDTH), jnp.float32)
  path = jax_backend.export_onnx(net.module, net.variables, (shape,), tmp_path / "net.onnx", input_names=["x"], output_names=["y"])
  x = np.concatenate([net.data[1], net.data[2]])[:, :13]
  expected = np.asarray(net.module.apply(net.variables, jnp.asarray(x)))
  found = run(path, [x])
  assert list(found.outputs) == ["y"] and found.outputs["y"].shape == expected.shape
  assert np.abs(found.outputs["y"] - expected).max() <= TOLERANCE * np.abs(expected).max()
  codes = next(i for i in onnx.load(path).graph.initializer if i.name == "layers.0.up_proj.weight_quantizer.codes")
  assert codes.data_type == onnx.TensorProto.INT4 and list(codes.dims) == [twins.WIDTH, twins.HIDDEN]  # in the stored layout, [in, out]

  variables = jax_backend.compress(net.module, net.variables)
  again = jax_backend.export_onnx(net.module, variables, (shape,), tmp_path / "again.onnx", input_names=["x"], output_names=["y"])
  assert again.read_bytes() == path.read_bytes()


class Step(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(8)(x), None


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return stack()(x, None)[0]


def test_scanned_stacks_are_refused_by_name(tmp_path: Path) -> None:
  x = jnp.ones((2, 8))
  variables = Scanned().init(jax.random.key(0), x)
  module, variables = jax_backend.quantize(Scanned(), variables, jax_backend.INT8_DEFAULT_CFG, lambda m: m(x))
  with pytest.raises(ValueError, match=r"Dense.*is a stack .nn.scan or nn.vmap.; build the model without it"):
    jax_backend.export_onnx(module, variables, (x,), tmp_path / "net.onnx")
  assert list(tmp_path.iterdir()) == []


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
  net = twins.Jax().quantize("max", CONFIG)
  variables = {**net.variables, "params": jax.tree.map(lambda a: a.astype(jnp.bfloat16), net.variables["params"])}
  with pytest.raises(ValueError, match=r"parameter .* is bfloat16; jax2onnx writes float32 models only"):
    jax_backend.export_onnx(net.module, variables, (jnp.zeros((1, 2, twins.WIDTH)),), tmp_path / "net.onnx")
