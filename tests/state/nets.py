"""A small net in torch and in Flax in which every preset finds something, and what it means that two saved models are the same."""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch

import jax_backend
import torch_backend
from core.state import State
from jax_backend import tree, weights
from torch_backend.modules import QuantWeight

WIDTH, HIDDEN, OUT = 32, 64, 16
# Those of the key/value cache name quantizers inside attention, which no module here has.
PRESETS = [name for name in sorted(torch_backend.choices) if "_KV_" not in name]


class TorchAttention(torch.nn.Module):
  def __init__(self) -> None:
    super().__init__()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
      self.add_module(name, torch.nn.Linear(WIDTH, WIDTH, bias=name == "q_proj"))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


class TorchMLP(torch.nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.up_proj = torch.nn.Linear(WIDTH, HIDDEN)
    self.experts = torch.nn.ModuleList([torch.nn.Linear(HIDDEN, WIDTH)])

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.experts[0](torch.relu(self.up_proj(x)))


class TorchLayer(torch.nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.self_attn, self.mlp, self.norm = TorchAttention(), TorchMLP(), torch.nn.LayerNorm(WIDTH)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.norm(x + self.mlp(x + self.self_attn(x)))


class TorchNet(torch.nn.Module):
  def __init__(self, layers: int = 1) -> None:
    super().__init__()
    self.layers = torch.nn.ModuleList(TorchLayer() for _ in range(layers))
    self.head = torch.nn.Linear(WIDTH, OUT)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
      x = layer(x)
    return self.head(x)


class FlaxAttention(nn.Module):
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Any) -> Any:
    q, k, v = (nn.Dense(WIDTH, use_bias=n == "q", param_dtype=self.dtype, name=f"{n}_proj")(x) for n in "qkv")
    return nn.Dense(WIDTH, use_bias=False, param_dtype=self.dtype, name="o_proj")(jnp.tanh(q) * k + v)


class FlaxMLP(nn.Module):
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Any) -> Any:
    x = nn.relu(nn.Dense(HIDDEN, param_dtype=self.dtype, name="up_proj")(x))
    return nn.Dense(WIDTH, param_dtype=self.dtype, name="experts_0")(x)


class FlaxLayer(nn.Module):
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Any, _: Any = None) -> Any:
    x = x + FlaxMLP(self.dtype, name="mlp")(x + FlaxAttention(self.dtype, name="self_attn")(x))
    return nn.LayerNorm(epsilon=1e-5, param_dtype=self.dtype, name="norm")(x), None


class FlaxNet(nn.Module):
  """`stack`: None unrolls the layers; a number scans them with parameters stacked on that axis."""

  layers: int = 1
  stack: int | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Any) -> Any:
    if self.stack is None:
      for i in range(self.layers):
        x, _ = FlaxLayer(self.dtype, name=f"layers_{i}")(x)
    else:
      scanned = nn.scan(FlaxLayer, variable_axes={"params": self.stack}, split_rngs={"params": True}, length=self.layers)
      x, _ = scanned(self.dtype, name="layers")(x, None)
    return nn.Dense(OUT, param_dtype=self.dtype, name="head")(x)


def torch_net(seed: int = 0, layers: int = 1) -> TorchNet:
  torch.manual_seed(seed)
  net = TorchNet(layers)
  with torch.no_grad():
    for parameter in net.parameters():
      parameter += 0.05 * torch.randn_like(parameter)
  return net.eval()


def flax_variables(module: FlaxNet | None = None, seed: int = 1) -> dict[str, Any]:
  """Random parameters, other ones than those of `torch_net`."""
  import jax

  module = FlaxNet() if module is None else module
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, WIDTH)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2, s.dtype), shapes)


def data(seed: int = 0, rows: int = 24) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(rows, WIDTH)) * np.exp(rng.normal(size=WIDTH))).astype(np.float32)


def quantized_torch(config: Any, seed: int = 0, layers: int = 1, dtype: torch.dtype = torch.float32) -> TorchNet:
  net = torch_net(seed, layers).to(dtype)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", torch_backend.ConfigWarning)
    torch_backend.quantize(net, config, lambda m: m(torch.from_numpy(data()).to(dtype)))
  return net


def quantized_jax(config: Any, module: FlaxNet | None = None, seed: int = 1) -> tuple[Any, Any]:
  module = FlaxNet() if module is None else module
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", jax_backend.ConfigWarning)
    return jax_backend.quantize(module, flax_variables(module, seed), config, lambda m: m(jnp.asarray(data(), module.dtype)))


def torch_output(net: torch.nn.Module) -> np.ndarray:
  with torch.no_grad():
    return net(torch.from_numpy(data(3)).to(next(net.parameters()).dtype)).float().numpy()


def torch_output_of(net: torch.nn.Module, rows: int = 5) -> np.ndarray:
  """As `torch_output`, of a net without float parameters."""
  with torch.no_grad():
    return net(torch.from_numpy(data(3, rows))).numpy()


def jax_output(qmodule: Any, qvariables: Any) -> np.ndarray:
  return np.asarray(qmodule.apply(qvariables, jnp.asarray(data(3), qmodule.module.dtype)), np.float32)


def torch_weights(net: torch.nn.Module) -> dict[str, np.ndarray]:
  """The values that the codes of every layer's weight stand for, [out, in], float32."""
  return {
    name: module.canonical(module.compute_weight().detach()).float().numpy()
    for name, module in net.named_modules()
    if isinstance(module, QuantWeight)
  }


def jax_weights(qvariables: Any) -> dict[str, np.ndarray]:
  """As `torch_weights`."""
  from jax_backend import layouts

  found = {}
  for path, name, quantizer, weight in weights.each(qvariables):
    if quantizer.leaves[0].packed is not None:
      value = weights.unpacked(quantizer)
    else:
      value = weights.quantized(quantizer, weight) if quantizer.acts else weight
    found[tree.full_name(path, name).rpartition(".")[0]] = np.asarray(layouts.to_torch(value, quantizer.layout), np.float32)
  return found


def assert_same_state(a: State, b: State) -> int:
  """Equal tensors, bit for bit, and equal quantizers; those that do nothing may be missing. Returns the number of values compared."""
  count = 0
  values = [{**s.tensors, **{name: s.tensors[o] for name, o in s.tied.items() if o in s.tensors}} for s in (a, b)]
  assert set(values[0]) == set(values[1])
  for name, tensor in values[0].items():
    count += _assert_same_tensor(name, tensor, values[1][name])
  assert set(a.packed) == set(b.packed)
  for name, weight in a.packed.items():
    other = b.packed[name]
    assert (weight.spec, weight.dtype, weight.shape, set(weight.tensors)) == (other.spec, other.dtype, other.shape, set(other.tensors)), (
      name
    )
    count += sum(_assert_same_tensor(f"{name}.{part}", t, other.tensors[part]) for part, t in weight.tensors.items())
  for name in {*a.quantizers, *b.quantizers}:
    if name not in a.quantizers or name not in b.quantizers:
      leaves = a.quantizers.get(name) or b.quantizers[name]
      assert not any(leaf.matters for leaf in leaves), name
      continue
    one, other = a.quantizers[name], b.quantizers[name]
    assert [(q.config, q.mode, q.group) for q in one] == [(q.config, q.mode, q.group) for q in other], name
    for p, q in zip(one, other, strict=True):
      fields = set(p.tensors) | set(q.tensors)
      assert set(p.tensors) == set(q.tensors), f"{name}: {set(p.tensors)} and {set(q.tensors)}"
      count += sum(_assert_same_tensor(f"{name}.{field}", p.tensors[field], q.tensors[field]) for field in fields)
  return count


def _assert_same_tensor(name: str, a: Any, b: Any) -> int:
  assert (a.dtype, tuple(a.shape)) == (b.dtype, tuple(b.shape)), f"{name}: {a.describe()} and {b.describe()}"
  assert a.load().tobytes() == b.load().tobytes(), f"{name} differs"
  return a.load().size
