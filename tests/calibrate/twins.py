"""A small chain of blocks in torch and in Flax with the same parameters, and one way to calibrate either."""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch

import jax_backend
import torch_backend
from jax_backend.host import JaxHost
from torch_backend.host import TorchHost

WIDTH, HIDDEN, OUT = 64, 96, 32
OFF = {"enable": False}
_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_STATIC = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
_MXFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


def _both(weights: Any, inputs: Any) -> dict[str, Any]:
  return {"default": OFF, "*weight_quantizer": weights} | ({"*input_quantizer": inputs} if inputs else {})


FORMATS: dict[str, dict[str, Any]] = {
  "int4": _both({"num_bits": 4, "block_sizes": {-1: 32}}, None),
  "int8": _both({"num_bits": 8, "axis": 0}, {"num_bits": 8}),
  "nvfp4": _both(_NVFP4, _NVFP4),
  "nvfp4_static": _both(_STATIC, _NVFP4),
  "mxfp4": _both(_MXFP4, _MXFP4),
}


class TorchBlock(torch.nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.gate_proj = torch.nn.Linear(WIDTH, HIDDEN)
    self.up_proj = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
    self.down_proj = torch.nn.Linear(HIDDEN, WIDTH)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x + self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


class TorchNet(torch.nn.Module):
  """Float features [B, T, WIDTH] through two blocks and a head; the mask is only there to be looked at."""

  def __init__(self) -> None:
    super().__init__()
    self.layers = torch.nn.ModuleList(TorchBlock() for _ in range(2))
    self.head = torch.nn.Linear(WIDTH, OUT)

  def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    for layer in self.layers:
      x = layer(x)
    return self.head(x)


class FlaxBlock(nn.Module):
  @nn.compact
  def __call__(self, x: Any) -> Any:
    gate = nn.Dense(HIDDEN, name="gate_proj")(x)
    up = nn.Dense(HIDDEN, use_bias=False, name="up_proj")(x)
    return x + nn.Dense(WIDTH, name="down_proj")(nn.relu(gate) * up)


class FlaxNet(nn.Module):
  """`TorchNet`; `remat` recomputes the blocks in the backward pass."""

  remat: bool = False

  @nn.compact
  def __call__(self, x: Any, attention_mask: Any = None) -> Any:
    block = nn.remat(FlaxBlock) if self.remat else FlaxBlock
    for i in range(2):
      x = block(name=f"layers_{i}")(x)
    return nn.Dense(OUT, name="head")(x)


def torch_net() -> TorchNet:
  torch.manual_seed(0)
  net = TorchNet()
  with torch.no_grad():
    for parameter in net.parameters():
      parameter += 0.05 * torch.randn_like(parameter)
  return net.eval()


def flax_variables(net: torch.nn.Module) -> dict[str, Any]:
  """The parameters of a torch net for its Flax twin: "layers.0.up_proj.weight" is layers_0/up_proj/kernel."""
  params: dict[str, Any] = {}
  for name, value in net.state_dict().items():
    *path, leaf = name.replace("layers.", "layers_").replace("experts.", "experts_").split(".")
    node = params
    for part in path:
      node = node.setdefault(part, {})
    array = value.numpy()
    node["kernel" if leaf == "weight" else leaf] = jnp.asarray(array.T if array.ndim == 2 else array)
  return {"params": params}


def batches(count: int = 3, shape: tuple[int, int] = (2, 20), seed: int = 0) -> list[np.ndarray]:
  """[B, T, WIDTH] float32 with a few large channels, as activations have them."""
  rng = np.random.default_rng(seed)
  scale = np.exp(rng.normal(size=WIDTH)).astype(np.float32)
  return [rng.normal(size=(*shape, WIDTH)).astype(np.float32) * scale for _ in range(count)]


class Torch:
  """The torch net, quantized by `quantize`."""

  def __init__(self, data: list[np.ndarray] | None = None, net: torch.nn.Module | None = None) -> None:
    self.data = batches() if data is None else data
    self.model = torch_net() if net is None else net
    self.report: list[dict[str, Any]] = []

  def loop(self, model: Any) -> None:
    for x in self.data:
      model(torch.from_numpy(x))

  def quantize(self, algorithm: Any, quant_cfg: dict[str, Any], loop: Any = None) -> Torch:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", torch_backend.ConfigWarning)
      config = {"quant_cfg": quant_cfg, "algorithm": algorithm}
      torch_backend.quantize(self.model, config, loop or self.loop, report=self.report)
    return self

  def host(self) -> TorchHost:
    return TorchHost(self.model, self.loop)

  def output(self) -> np.ndarray:
    with torch.no_grad():
      return self.model(torch.from_numpy(self.data[0])).numpy()


class Jax:
  """The Flax net with the parameters of `torch_net`, quantized by `quantize`."""

  def __init__(self, data: list[np.ndarray] | None = None, module: nn.Module | None = None, variables: Any = None) -> None:
    self.data = batches() if data is None else data
    self.module: Any = FlaxNet() if module is None else module
    self.variables = flax_variables(torch_net()) if variables is None else variables
    self.report: list[dict[str, Any]] = []

  def loop(self, model: Any) -> None:
    for x in self.data:
      model(jnp.asarray(x))

  def quantize(self, algorithm: Any, quant_cfg: dict[str, Any], loop: Any = None) -> Jax:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", jax_backend.ConfigWarning)
      config = {"quant_cfg": quant_cfg, "algorithm": algorithm}
      self.module, self.variables = jax_backend.quantize(self.module, self.variables, config, loop or self.loop, report=self.report)
    return self

  def host(self) -> JaxHost:
    return JaxHost(self.module, self.variables, self.loop)

  def output(self) -> np.ndarray:
    return np.asarray(self.module.apply(self.variables, jnp.asarray(self.data[0])))


BACKENDS: dict[str, Any] = {"torch": Torch, "jax": Jax}


def state(host: TorchHost | JaxHost) -> dict[str, np.ndarray | None]:
  """All that calibration sets of the layers, in torch's layout: weights, biases, amax, scales, factors."""
  found: dict[str, np.ndarray | None] = {}
  for name in host.weighted():
    layer = host.layer(name)
    parts = {"weight": layer.weight, "bias": layer.bias, "amax": layer.amax, "tensor_amax": layer.tensor_amax}
    factors = host.low_rank(name) or (None, None)
    parts |= {"pre_quant_scale": host.pre_quant_scale(name), "a": factors[0], "b": factors[1]}
    found |= {f"{name}.{key}": None if value is None else np.array(value) for key, value in parts.items()}
  return found


def assert_same(a: dict[str, np.ndarray | None], b: dict[str, np.ndarray | None]) -> None:
  """Equal bit for bit."""
  assert list(a) == list(b)
  for name, value in a.items():
    other = b[name]
    assert (value is None) == (other is None), f"{name}: {value} and {other}"
    if value is not None and other is not None:
      assert value.shape == other.shape and value.tobytes() == other.tobytes(), f"{name}: up to {np.abs(value - other).max()} apart"
