"""Real models for the experiments, the same checkpoint in both frameworks and without a network.

`load_torch` gives the model of Hugging Face transformers, `load_jax` the Flax module of this package with its variables, and
`load_torch_twin` a plain torch Llama that computes op for op what the Flax one does, in float64 too. Submodules have the same names in all
of them: `model.layers.0.self_attn.q_proj` in torch is `model/layers_0/self_attn/q_proj` in Flax.

Names: "smollm2" (SmolLM2-135M-Instruct, a Llama) and "minilm" (all-MiniLM-L6-v2, a BERT encoder), from the `models` extra. Any local
Hugging Face folder of these two architectures works as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.models import folders
from experiments.models.configs import BertConfig, LlamaConfig, read_config

NAMES = tuple(folders.NAMES)
DTYPES = ("float32", "float64", "bfloat16", "float16")

__all__ = ["DTYPES", "NAMES", "BertConfig", "LlamaConfig", "load_jax", "load_tokenizer", "load_torch", "load_torch_twin", "read_config"]


def load_torch(name_or_folder: str | Path, dtype: str = "float32") -> tuple[Any, Any]:
  """The model of Hugging Face transformers, in evaluation mode on the CPU.

  Args:
    name_or_folder: "smollm2", "minilm", or a local Hugging Face folder of Llama or BERT architecture.
    dtype: "float32", "float64", "bfloat16" or "float16".

  Returns:
    (`LlamaForCausalLM` or `BertModel`, tokenizer).

  Raises:
    ImportError: the model's package, torch or transformers is not installed.
    FileNotFoundError: the folder lacks `config.json`, the weights or the tokenizer.
    ValueError: unknown name or dtype, unsupported architecture, or tensors that do not fit.
  """
  _check_dtype(dtype)
  folder = folders.find(name_or_folder)
  config = read_config(folder)
  folders.offline()
  import torch
  import transformers

  options = {"dtype": getattr(torch, dtype), "local_files_only": True}
  if isinstance(config, LlamaConfig):
    model = transformers.LlamaForCausalLM.from_pretrained(str(folder), **options)
  else:
    from experiments.models import weights

    # Without this, a pooler that the checkpoint does not have would be made up of random numbers.
    pooler = weights.has_pooler(weights.read(folder, config))
    model = transformers.BertModel.from_pretrained(str(folder), add_pooling_layer=pooler, **options)
  return model.eval(), load_tokenizer(folder)


def load_jax(name_or_folder: str | Path, dtype: str = "float32", **module_options: Any) -> tuple[Any, Any, Any]:
  """The Flax module of this package and its variables. Neither torch nor transformers' models are imported.

  Args:
    name_or_folder: as in `load_torch`.
    dtype: of parameters and arithmetic; "float64" needs `jax.config.update("jax_enable_x64", True)`.
    module_options: fields of `FlaxLlama`: scan_layers, remat.

  Returns:
    (module, {"params": ...}, tokenizer). `module.apply(variables, input_ids, attention_mask=None)` gives logits [B, T, vocab_size] for a
    Llama and `BertOutput(last_hidden_state, pooler_output)` for BERT.

  Raises:
    ImportError, FileNotFoundError: as in `load_torch`.
    ValueError: as in `load_torch`, or float64 without jax_enable_x64.
  """
  _check_dtype(dtype)
  folder = folders.find(name_or_folder)
  config = read_config(folder)
  import jax
  import jax.numpy as jnp

  from experiments.models import weights

  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError('dtype "float64" needs jax.config.update("jax_enable_x64", True) before the model is loaded')
  tensors = weights.read(folder, config)
  module = _flax_module(config, jnp.dtype(dtype), weights.has_pooler(tensors), module_options)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
  params = weights.flax_params(tensors, shapes["params"], config, dtype, folder)
  return module, {"params": params}, load_tokenizer(folder)


def _flax_module(config: LlamaConfig | BertConfig, dtype: Any, pooler: bool, options: dict[str, Any]) -> Any:
  if isinstance(config, LlamaConfig):
    from experiments.models.flax_llama import FlaxLlama

    return FlaxLlama(config, dtype, **options)
  from experiments.models.flax_bert import FlaxBert

  if options:
    raise ValueError(f"options {sorted(options)} are for Llama models; a BERT takes none")
  return FlaxBert(config, dtype, pooler)


def load_torch_twin(name_or_folder: str | Path, dtype: str = "float32") -> tuple[Any, Any]:
  """A plain torch Llama, op for op the Flax one: in float64 everything is float64, which transformers' own Llama is not.

  Args:
    name_or_folder: "smollm2" or a local Hugging Face folder of Llama architecture.
    dtype: as in `load_torch`.

  Returns:
    (model, tokenizer); `model(input_ids, attention_mask=None)` gives logits [B, T, vocab_size] as a tensor.

  Raises:
    ImportError, FileNotFoundError: as in `load_torch`.
    ValueError: as in `load_torch`, or the model is no Llama.
  """
  _check_dtype(dtype)
  folder = folders.find(name_or_folder)
  config = read_config(folder)
  if not isinstance(config, LlamaConfig):
    raise ValueError(f"{str(name_or_folder)!r} is a BERT; the torch twin exists for Llama models, use load_torch")
  import torch

  from experiments.models import weights
  from experiments.models.torch_llama import TorchLlama

  with torch.device("meta"):
    model = TorchLlama(config)
  model.load_state_dict(weights.torch_state(weights.read(folder, config), model, config, dtype, folder), strict=True, assign=True)
  model.tie_weights()
  return model.eval(), load_tokenizer(folder)


def load_tokenizer(name_or_folder: str | Path) -> Any:
  """The tokenizer of a model, one and the same for every framework; torch is not imported where the folder has a `tokenizer.json`.

  Raises:
    FileNotFoundError: the folder has no tokenizer.
  """
  folder = folders.find(name_or_folder)
  folders.offline()
  if (folder / "tokenizer.json").is_file():
    # AutoTokenizer imports torch where it is installed; this class reads the same file without it.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
  if not (folder / "tokenizer_config.json").is_file():
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer_config.json; save the tokenizer there with save_pretrained")
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _check_dtype(dtype: str) -> None:
  if dtype not in DTYPES:
    raise ValueError(f"dtype {dtype!r} is unknown; allowed are {', '.join(map(repr, DTYPES))}")
