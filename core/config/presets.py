"""The configurations with a name, in dict form: the values of ModelOpt 0.47's presets.

A preset is read-only: `config = INT8_DEFAULT_CFG.copy()` (or `copy.copy`, `copy.deepcopy`, `dict` of JSON, pickle) gives a plain dict
that is independent at every depth; writing into the preset itself raises and says so. No access can change the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from core.config.frozen import hint


class Preset(dict[str, Any]):
  """A dict that cannot be written to; `.copy()` is deep, plain and editable."""

  def __init__(self, items: Mapping[Any, Any]) -> None:
    super().__init__({key: _lock(value) for key, value in items.items()})

  def _refuse(self, *_: Any, **__: Any) -> NoReturn:
    raise TypeError("presets are read-only; edit a copy: config = PRESET.copy()")

  __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # pyright: ignore

  def copy(self) -> dict[str, Any]:
    """An independent plain dict."""
    return _unlock(self)

  def __copy__(self) -> dict[str, Any]:
    return _unlock(self)

  def __deepcopy__(self, memo: Any) -> dict[str, Any]:
    return _unlock(self)

  def __or__(self, other: Any) -> dict[str, Any]:
    return self.copy() | other

  def __ror__(self, other: Any) -> dict[str, Any]:
    return other | self.copy()

  def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
    return (dict, (_unlock(self),))


def _lock(value: Any) -> Any:
  if isinstance(value, Mapping):
    return Preset(value)
  return tuple(_lock(item) for item in value) if isinstance(value, list | tuple) else value


def _unlock(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _unlock(item) for key, item in value.items()}
  if isinstance(value, tuple) and any(isinstance(item, Mapping) for item in value):
    return [_unlock(item) for item in value]
  return value


_OFF = {"enable": False}
_BASE: dict[str, Any] = {"default": _OFF}
# Routers, heads, vision towers and the like, which are sensitive or pointless to quantize.
DEFAULT_DISABLED: dict[str, Any] = Preset(
  {
    pattern: _OFF
    for pattern in (
      "*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*", "*linear_attn.in_proj_a*", "*linear_attn.in_proj_b*",
      "*lm_head*", "*mixer.conv1d*", "*mlp.gate.*", "*mlp.shared_expert_gate.*", "*output_layer*", "*proj_out.*", "*router*", "mtp.*",
      "output.*", "*embed_vision*", "*vision_tower*", "*visual*", "*vision_model*", "*multi_modal_projector*",
    )
  }
  | {f"nn.{name}": {"*": _OFF} for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LeakyReLU", "Embedding")}
)  # fmt: skip

_INT8 = {"num_bits": 8, "axis": None}
_INT8_CHANNEL = {"num_bits": 8, "axis": 0}
_INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
_FP8 = {"num_bits": (4, 3), "axis": None}
_FP8_CHANNEL = {"num_bits": (4, 3), "axis": 0}
_FP8_TOKEN = {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}}
_FP8_2D = {"num_bits": (4, 3), "axis": None, "block_sizes": {-1: 128, -2: 128}}
_NVFP4 = {"num_bits": (2, 1), "effective_bits": 4.5, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_NVFP4_STATIC = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
_NVFP4_46 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3), "four_over_six": True}}
_NVFP4_BLOCK32 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}}


def _mx(num_bits: Any) -> dict[str, Any]:
  return {"num_bits": num_bits, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


def _whole(weights: Any, inputs: Any = None, algorithm: Any = "max", **more: Any) -> Preset:
  """All weights and inputs but the default-disabled ones. `inputs` None leaves the inputs to "default"."""
  positive = {"*weight_quantizer": weights} | ({} if inputs is None else {"*input_quantizer": inputs})
  return Preset({"quant_cfg": {**_BASE, **positive, **more, **DEFAULT_DISABLED}, "algorithm": algorithm})


def _parts(attributes: Any, *patterns: str, inputs: bool = True, algorithm: Any = "max") -> Preset:
  """Weights (and inputs) of the modules that these patterns begin."""
  kinds = ("weight_quantizer", "input_quantizer") if inputs else ("weight_quantizer",)
  positive = {pattern + kind: attributes for pattern in patterns for kind in kinds}
  return Preset({"quant_cfg": {**_BASE, **positive, **DEFAULT_DISABLED}, "algorithm": algorithm})


def _mamba(attributes: Any, *also: str) -> Preset:
  names = ("*fc1_latent_proj*", "*fc2_latent_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*o_proj*", "*self_attention.linear_qkv*",
           "*self_attention.linear_proj*", *also)  # fmt: skip
  off = {name: _OFF for name in names}
  positive = {"*weight_quantizer": attributes, "*input_quantizer": attributes}
  return Preset({"quant_cfg": {**_BASE, **positive, **DEFAULT_DISABLED, **off}, "algorithm": "max"})


_KV = "*[kv]_bmm_quantizer"
_AFFINE = {"bias": {-2: None, -4: None, "type": "static"}}
_MLP = ("*mlp*", "*.mixer.up_proj.", "*.mixer.down_proj.", "*block_sparse_moe*", "*.experts.*")
_MIXER = ("*mixer.in_proj*", "*mixer.out_proj*")
_AWQ = {"method": "awq_lite", "alpha_step": 0.1}
_AWQ_FULL = {"method": "awq_full", "alpha_step": 0.1}
_MSE_46 = {"method": "mse", "fp8_scale_sweep": False, "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}

INT8_DEFAULT_CFG = _whole(_INT8_CHANNEL, _INT8)
INT8_SMOOTHQUANT_CFG = _whole(_INT8_CHANNEL, _INT8, "smoothquant")
INT8_WEIGHT_ONLY_CFG = _whole(_INT8_CHANNEL, _OFF)
FP8_DEFAULT_CFG = _whole(_FP8, _FP8)
FP8_PER_CHANNEL_PER_TOKEN_CFG = _whole(_FP8_CHANNEL, _FP8_TOKEN)
FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG = _whole(_FP8_2D, _OFF)
INT4_BLOCKWISE_WEIGHT_ONLY_CFG = _whole(_INT4, _OFF)
INT4_AWQ_CFG = _whole(_INT4, _OFF, _AWQ)
W4A8_AWQ_BETA_CFG = _whole([_INT4, _FP8], _FP8, "awq_lite")
MXFP8_DEFAULT_CFG = _whole(_mx((4, 3)), _mx((4, 3)), None)
MXFP6_DEFAULT_CFG = _whole(_mx((3, 2)), _mx((3, 2)), None)
MXFP4_DEFAULT_CFG = _whole(_mx((2, 1)), _mx((2, 1)), None)
MXINT8_DEFAULT_CFG = _whole(_mx(8), _mx(8), None)
MXFP4_MLP_WEIGHT_ONLY_CFG = _parts(_mx((2, 1)), "*mlp*", "*block_sparse_moe*", inputs=False, algorithm=None)
W4A8_MXFP4_FP8_CFG = _whole(_mx((2, 1)), _FP8, None)
NVFP4_DEFAULT_CFG = _whole(_NVFP4, _NVFP4)
NVFP4_FOUR_OVER_SIX_CFG = _whole(_NVFP4_46, _NVFP4, _MSE_46)
NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG = _whole(_NVFP4_STATIC, _NVFP4, {"method": "mse", "fp8_scale_sweep": True})
NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG = _whole(_NVFP4_STATIC, _NVFP4, {"method": "local_hessian", "fp8_scale_sweep": True})
NVFP4_AWQ_LITE_CFG = _whole(_NVFP4, _NVFP4, "awq_lite")
NVFP4_AWQ_CLIP_CFG = _whole(_NVFP4, _NVFP4, {"method": "awq_clip"})
NVFP4_AWQ_FULL_CFG = _whole(_NVFP4, _NVFP4, _AWQ_FULL)
NVFP4_SVDQUANT_DEFAULT_CFG = _whole(_NVFP4, _NVFP4, {"method": "svdquant", "lowrank": 32})
W4A16_NVFP4_CFG = _whole(_NVFP4)
W4A8_NVFP4_FP8_CFG = _whole(_NVFP4_BLOCK32, _FP8)
NVFP4_MLP_WEIGHT_ONLY_CFG = _parts(_NVFP4_BLOCK32, "*mlp*", "*block_sparse_moe*", inputs=False)
NVFP4_MLP_ONLY_CFG = _parts(_NVFP4, *_MLP)
NVFP4_OMLP_ONLY_CFG = _parts(_NVFP4, "*o_proj*", *_MLP[:-1])  # no `*.experts.*` in ModelOpt's
NVFP4_EXPERTS_ONLY_CFG = _parts(_NVFP4, "*block_sparse_moe*", "*.experts.*")
# The one whole preset without the default-disabled list, as in ModelOpt.
NVFP4_FP8_MHA_CONFIG = Preset(
  {
    "quant_cfg": {
      **_BASE,
      "*weight_quantizer": _NVFP4,
      "*input_quantizer": _NVFP4,
      "*output_quantizer": _OFF,
      "*[qkv]_bmm_quantizer": _FP8,
      "*softmax_quantizer": _FP8,
      "*p_bmm_quantizer": _FP8,
      "transformer_blocks*bmm2_output_quantizer": _FP8,
    },
    "algorithm": "max",
  }
)
MAMBA_MOE_FP8_AGGRESSIVE_CFG = _mamba(_FP8)
MAMBA_MOE_FP8_CONSERVATIVE_CFG = _mamba(_FP8, *_MIXER)
MAMBA_MOE_NVFP4_AGGRESSIVE_CFG = _mamba(_NVFP4)
MAMBA_MOE_NVFP4_CONSERVATIVE_CFG = _mamba(_NVFP4, *_MIXER)
# Fragments, to be merged into a whole configuration (`update_quant_cfg_with_kv_cache_quant`); they address attention quantizers.
FP8_KV_CFG = Preset({"quant_cfg": {_KV: _FP8}})
FP8_AFFINE_KV_CFG = Preset({"quant_cfg": {_KV: {**_FP8, **_AFFINE}}})
NVFP4_KV_CFG = Preset({"quant_cfg": {_KV: _NVFP4}})
NVFP4_AFFINE_KV_CFG = Preset({"quant_cfg": {_KV: {**_NVFP4, **_AFFINE}}})
NVFP4_KV_ROTATE_CFG = Preset(
  {
    "quant_cfg": {
      "*q_bmm_quantizer": {"rotate": True, **_OFF},
      "*k_bmm_quantizer": {**_NVFP4, "rotate": True},
      "*v_bmm_quantizer": _NVFP4,
    },
    "algorithm": "max",
  }
)

PRESETS: dict[str, Preset] = {name: value for name, value in dict(globals()).items() if name.endswith(("_CFG", "_CONFIG"))}
KV_PRESETS: tuple[str, ...] = tuple(name for name in PRESETS if "_KV_" in name)
choices: frozenset[str] = frozenset(PRESETS)


def preset(name: str) -> dict[str, Any]:
  """An independent, editable copy of the preset, in dict form.

  Raises:
    ValueError: unknown name; the message has near misses and all known names.
  """
  if name not in PRESETS:
    raise ValueError(f"preset {name!r} is unknown{hint(name, PRESETS)}; allowed are {', '.join(sorted(PRESETS))}")
  return PRESETS[name].copy()
