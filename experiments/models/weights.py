"""From the tensors of a Hugging Face folder to the parameters of the models in this package."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.models import checkpoint
from experiments.models.configs import BertConfig, LlamaConfig

Path_ = tuple[str, ...]
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def read(folder: str | Path, config: LlamaConfig | BertConfig) -> dict[str, np.ndarray]:
  """The tensors of a folder under the names of `LlamaForCausalLM` and `BertModel`."""
  tensors = checkpoint.read_folder(folder)
  return {_bert_name(name): t for name, t in tensors.items()} if isinstance(config, BertConfig) else tensors


def _bert_name(name: str) -> str:
  # Checkpoints of BertForMaskedLM and its siblings put the encoder under "bert."; the oldest say gamma and beta.
  name = name.removeprefix("bert.")
  return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def ignored(config: LlamaConfig | BertConfig) -> Callable[[str], bool]:
  """Which tensors may stand in a folder without being used: tables that are computed, and heads that are not part of the model."""
  if isinstance(config, BertConfig):
    return lambda name: name == "embeddings.position_ids" or name.split(".")[0] in ("cls", "classifier", "qa_outputs")
  tied = config.tie_word_embeddings
  return lambda name: name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def has_pooler(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether a BERT checkpoint brings a pooler."""
  return "pooler.dense.weight" in tensors


def torch_name(path: Path_, config: LlamaConfig | BertConfig) -> str:
  """`("model", "layers_0", "mlp", "up_proj", "kernel")` -> `"model.layers.0.mlp.up_proj.weight"`; a tied head is the table."""
  if path == ("lm_head", "kernel") and getattr(config, "tie_word_embeddings", False):
    return "model.embed_tokens.weight"
  *modules, leaf = path
  return ".".join([*(re.sub(r"_(\d+)$", r".\1", m) for m in modules), _LEAVES[leaf]])


def flax_params(
  tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], config: LlamaConfig | BertConfig, dtype: str, folder: str | Path
) -> dict[str, Any]:
  """The tree `variables["params"]`.

  Args:
    tensors: of the folder, under torch's names.
    expected: the tree of shapes that the module asks for (`jax.eval_shape` of its `init`). Parameters under a path part "layers" are
      stacked: axis 0 of each is the layer.
    config: sizes.
    dtype: what the parameters become.
    folder: for messages.

  Returns:
    The tree with jax arrays: kernels [in, out] where torch has [out, in].

  Raises:
    ValueError: tensors are missing, have another shape, or would go unused.
  """
  import jax
  import jax.numpy as jnp

  leaves = {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]}
  needed: dict[str, tuple[int, ...]] = {}
  for path, shape in leaves.items():
    for name, own in _sources(path, shape, config):
      needed[name] = own[::-1] if path[-1] == "kernel" else own
  checkpoint.check(tensors, needed, folder, ignored(config))

  def build(path: Any, leaf: Any) -> jax.Array:
    keys = tuple(k.key for k in path)
    parts = [tensors[name].T if keys[-1] == "kernel" else tensors[name] for name, _ in _sources(keys, leaf.shape, config)]
    # jnp.array copies; jnp.asarray might keep a view of the mapped file.
    return jnp.array(np.stack(parts) if "layers" in keys else parts[0], jnp.dtype(dtype))

  return jax.tree_util.tree_map_with_path(build, expected)


def _sources(path: Path_, shape: tuple[int, ...], config: LlamaConfig | BertConfig) -> list[tuple[str, tuple[int, ...]]]:
  """(torch name, shape) of the tensors that one parameter is made of: several where layers are stacked."""
  if "layers" not in path:
    return [(torch_name(path, config), shape)]
  at = path.index("layers")
  return [(torch_name((*path[:at], f"layers_{i}", *path[at + 1 :]), config), shape[1:]) for i in range(shape[0])]


def torch_state(tensors: Mapping[str, np.ndarray], model: Any, config: LlamaConfig, dtype: str, folder: str | Path) -> dict[str, Any]:
  """A state dict for the torch twin.

  Raises:
    ValueError: tensors are missing, have another shape, or would go unused.
  """
  import torch

  state = model.state_dict()
  source = functools.partial(_tied_source, tied=config.tie_word_embeddings)
  checkpoint.check(tensors, {source(name): tuple(value.shape) for name, value in state.items()}, folder, ignored(config))
  kind = getattr(torch, dtype)
  found = {name: _to_torch(tensors[name]).to(kind) for name in {source(n) for n in state}}
  return {name: found[source(name)] for name in state}


def _tied_source(name: str, tied: bool) -> str:
  return "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name


def _to_torch(x: np.ndarray) -> Any:
  import torch

  copied = np.array(x)
  if copied.dtype.name == "bfloat16":  # torch does not know ml_dtypes
    return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(copied)
