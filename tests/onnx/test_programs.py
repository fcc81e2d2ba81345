"""torch.export and jax.export programs of quantized models: the same bits after saving and loading."""

from __future__ import annotations

import copy
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_backend
import torch_backend
from tests.calibrate import twins

CASES = [("int8", "simulated"), ("int8", "compressed"), ("nvfp4", "compressed"), pytest.param("nvfp4", "simulated", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_torch_export(name: str, kind: str) -> None:
  net = twins.Torch().quantize("max", twins.FORMATS[name])
  model = copy.deepcopy(net.model)
  if kind == "compressed":
    torch_backend.compress(model)
  x = torch.from_numpy(net.data[0])
  with torch.no_grad():
    program = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shown in (x, torch.from_numpy(net.data[1])):
      assert torch.equal(loaded(shown), net.model(shown))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_jax_export(name: str, kind: str) -> None:
  net = twins.Jax().quantize("max", twins.FORMATS[name])
  module, variables = net.module, net.variables
  if kind == "compressed":
    variables = jax_backend.compress(module, variables)
  x = jnp.asarray(net.data[0])
  leaves, tree = jax.tree.flatten(variables)  # leaves are plain arrays, which every exported program takes
  run = jax.jit(lambda leaves, x: module.apply(jax.tree.unflatten(tree, leaves), x))
  blob = jax.export.export(run)(leaves, x).serialize()
  found = jax.export.deserialize(blob).call(leaves, x)
  assert np.array_equal(found, run(leaves, x))
  if name != "int8":
    return
  inside = jax.jit(lambda x: module.apply(variables, x))  # the weights as constants of the program
  blob = jax.export.export(inside)(jax.ShapeDtypeStruct(x.shape, x.dtype)).serialize()
  assert np.array_equal(jax.export.deserialize(blob).call(x), inside(x))
