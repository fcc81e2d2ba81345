"""Saving quantized models: one file format for both backends, of safetensors and one readable JSON. Nothing that is read is run.

`torch_backend.save` and `jax_backend.save` turn a model into a `State` and write it here; `restore` reads one and lets nothing through that
does not fit. docs/state.md describes the files.
"""

from core.state.document import as_given, plain
from core.state.folder import DOCUMENT, read, versions, write
from core.state.match import check_leaf, check_quantizers, check_tensors
from core.state.model import FIELDS, MODES, PARTS, STATISTICS, Leaf, Packed, State, tensor_name
from core.state.tensors import Tensor
from core.tensor_header import CARRIERS

__all__ = [
  "CARRIERS",
  "DOCUMENT",
  "FIELDS",
  "MODES",
  "PARTS",
  "STATISTICS",
  "Leaf",
  "Packed",
  "State",
  "Tensor",
  "as_given",
  "check_leaf",
  "check_quantizers",
  "check_tensors",
  "plain",
  "read",
  "tensor_name",
  "versions",
  "write",
]
