"""The few array operations that `core` needs, spelled alike for numpy, torch and jax.numpy.

`core` imports numpy only. A torch or jax array brings its own module, which is then already in `sys.modules`; nothing is imported for it.
The namespaces are stateless objects, constant to `torch.compile` and `jax.jit`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from core.arrays.jax_namespace import JaxNamespace
from core.arrays.numpy_namespace import NumpyNamespace
from core.arrays.torch_namespace import TorchNamespace

Array = Any  # numpy.ndarray, torch.Tensor, jax.Array or a tracer of one
Namespace = Any  # one of the three classes above; alike by their method names, which is all that their callers rely on

NUMPY = NumpyNamespace()
_KNOWN: dict[str, Namespace] = {"numpy": NUMPY}


def namespace(x: Array) -> Namespace:
  """The namespace of an array.

  Raises:
    TypeError: x is no array of numpy, torch or jax.
  """
  if isinstance(x, (np.ndarray, np.generic)):
    return NUMPY
  if hasattr(x, "is_floating_point"):
    return _framework("torch", x)
  if hasattr(x, "aval"):
    return _framework("jax", x)
  raise TypeError(f"expected a numpy, torch or jax array, got {type(x).__name__}; convert it with numpy.asarray first")


def _framework(name: str, x: Array) -> Namespace:
  known = _KNOWN.get(name)
  if known is None:
    module = sys.modules[name]
    known = _KNOWN[name] = TorchNamespace(module) if name == "torch" else JaxNamespace(module)
  return known


def to_numpy(x: Array) -> np.ndarray:
  """A float32 or integer numpy copy of any array, off its device; bfloat16 and float16 become float32."""
  if isinstance(x, (np.ndarray, np.generic)):
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array
  if hasattr(x, "is_floating_point"):
    tensor = x.detach().cpu()
    return tensor.float().numpy() if tensor.element_size() == 2 and tensor.is_floating_point() else tensor.numpy()
  return to_numpy(np.asarray(x))
