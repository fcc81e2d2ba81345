"""Calibration on a mesh of four virtual CPU devices, in a process of its own (the number of devices is fixed at start)."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jax_backend as jb
from tests.jax_backend import nets

assert jax.device_count() == 4
module = nets.MLP(hidden=32, out=8)
x = jax.random.normal(jax.random.key(0), (8, 16))
variables = module.init(jax.random.key(1), x)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

def place(path, leaf):
  names = {("up", "kernel"): P(None, "model"), ("down", "kernel"): P("model", None), ("up", "bias"): P("model")}
  return jax.device_put(leaf, NamedSharding(mesh, names.get((path[-2].key, path[-1].key), P())))

sharded = jax.tree_util.tree_map_with_path(place, variables)
batch = jax.device_put(x, NamedSharding(mesh, P("data", None)))
config = jb.INT8_DEFAULT_CFG
for config in (jb.INT8_DEFAULT_CFG, jb.NVFP4_DEFAULT_CFG, jb.INT4_BLOCKWISE_WEIGHT_ONLY_CFG):
  one, single = jb.quantize(module, variables, config, lambda model: model(x))
  many, spread = jb.quantize(module, sharded, config, lambda model: model(batch))
  a, b = jb.quantizers(single), jb.quantizers(spread)
  for name, quantizer in a.items():
    if quantizer.amax is not None:
      left, right = np.asarray(quantizer.amax), np.asarray(b[name].amax)
      if "down.input" in name:
        np.testing.assert_allclose(left, right, rtol=1e-5)  # behind a matmul that is summed in another order
      else:
        assert left.tobytes() == right.tobytes(), name
  y = jax.jit(many.apply)(spread, batch)
  np.testing.assert_allclose(y, one.apply(single, x), atol=0.05 * float(jnp.abs(y).max()))  # a code behind a matmul may flip
  if config is jb.INT8_DEFAULT_CFG:
    assert b["up.weight_quantizer"].amax.sharding.spec == P("model", None), b["up.weight_quantizer"].amax.sharding
    assert not b["up.weight_quantizer"].amax.sharding.is_fully_replicated
print("sharded as one")
"""


def test_sharded_calibration_equals_that_of_one_device():
  environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "sharded as one" in done.stdout
