"""What other libraries offer for a case: the same format and granularity, prepared as that library would keep it after calibration.

A peer that cannot do a format, or fails at it here, is reported with its error.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import core
from benchmarks import runtimes
from benchmarks.cases import Case

EAGER, COMPILED, JIT = "eager", "compile", "jit"
Call = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Peer:
  """One candidate.

  Attributes:
    name: library.
    form: "eager", "compile" (torch.compile) or "jit" (jax.jit).
    call: takes nothing, returns when the result is there; None if it failed.
    error: why it failed.
  """

  name: str
  form: str
  call: Callable[[], Any] | None
  error: str = ""

  @property
  def label(self) -> str:
    return f"{self.name} {self.form}"


def peers(case: Case, host: np.ndarray, dtype: str) -> Iterator[Peer]:
  """Every peer for a case, warm.

  Args:
    case: the case.
    host: [rows, cols] float32 input.
    dtype: type in which the peer gets it.
  """
  logging.getLogger("torchao").setLevel(logging.ERROR)
  for name, makers in (("ModelOpt", MODELOPT), ("torchao", TORCHAO), ("torch", TORCH)):
    if case.key in makers:
      x = runtimes.cast(runtimes.array(host, runtimes.TORCH), runtimes.TORCH, dtype)
      for form in (EAGER, COMPILED):
        yield _torch_peer(name, form, makers[case.key], case, x, host)
  if case.key in QWIX:
    yield _qwix_peer(case, runtimes.cast(runtimes.array(host, runtimes.JIT), runtimes.JIT, dtype))


def _torch_peer(name: str, form: str, make: Callable[..., Call], case: Case, x: Any, host: np.ndarray) -> Peer:
  torch = importlib.import_module("torch")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      function = make(torch, case, x, host)
      if form == COMPILED:
        function = torch.compile(function, dynamic=False)
      with torch.no_grad():
        result = function(x)
    if result.shape != x.shape:
      raise ValueError(f"returned shape {list(result.shape)}")
  except Exception as error:  # a peer's failure is a finding of the table
    return Peer(name, form, None, _short(error))
  return Peer(name, form, lambda: function(x))


def _qwix_peer(case: Case, x: Any) -> Peer:
  jax = importlib.import_module("jax")
  try:
    function = jax.jit(QWIX[case.key](case, x))
    function(x).block_until_ready()
  except Exception as error:  # a peer's failure is a finding of the table
    return Peer("qwix", JIT, None, _short(error))
  return Peer("qwix", JIT, lambda: function(x).block_until_ready())


def _short(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:100] if text else ''}"


# -- ModelOpt: its TensorQuantizer, calibrated by setting amax -------------------------------------------------------------------------


def _modelopt(attributes: dict[str, Any], calibrated: bool = False) -> Callable[..., Call]:
  def make(torch: Any, case: Case, x: Any, host: np.ndarray) -> Call:
    nn = importlib.import_module("modelopt.torch.quantization.nn")
    config = importlib.import_module("modelopt.torch.quantization.config")
    quantizer = nn.TensorQuantizer(config.QuantizerAttributeConfig(**attributes))
    if calibrated:
      quantizer.amax = torch.from_numpy(np.array(core.amax(host, case.spec)))
    return quantizer.eval()

  return make


_NVFP4_BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}


def _mx(element: tuple[int, int]) -> dict[str, Any]:
  return {"num_bits": element, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


MODELOPT = {
  "int8": _modelopt({"num_bits": 8, "axis": None}, True),
  "int8_channel": _modelopt({"num_bits": 8, "axis": 0}, True),
  "int8_channel_dynamic": _modelopt({"num_bits": 8, "axis": 0, "type": "dynamic"}),
  "fp8": _modelopt({"num_bits": (4, 3), "axis": None}, True),
  "fp8_token": _modelopt({"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}),
  "fp8_tile": _modelopt({"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}, "type": "dynamic"}),
  "int4_block": _modelopt({"num_bits": 4, "block_sizes": {-1: 128}, "type": "dynamic"}),
  "mxfp8": _modelopt(_mx((4, 3))),
  "mxfp4": _modelopt(_mx((2, 1))),
  "nvfp4": _modelopt({"num_bits": (2, 1), "block_sizes": _NVFP4_BLOCKS}, True),
}


# -- torchao: quantize primitives, MX and NVFP4 tensors --------------------------------------------------------------------------------


def _torchao_integer(bits: int, block: Callable[[Any], tuple[int, ...]], calibrated: bool) -> Callable[..., Call]:
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

  def make(torch: Any, case: Case, x: Any, host: np.ndarray) -> Call:
    ao = importlib.import_module("torchao.quantization.quant_primitives")
    size = block(x)

    def parameters(x: Any) -> tuple[Any, Any]:
      return ao.choose_qparams_affine(x, ao.MappingType.SYMMETRIC, size, torch.int8, low, high, scale_dtype=torch.float32)

    if calibrated:
      scale, zero_point = parameters(x)
      return lambda x: ao._fake_quantize_affine(x, size, scale, zero_point, torch.int8, low, high)
    return lambda x: ao._fake_quantize_affine(x, size, *parameters(x), torch.int8, low, high)

  return make


def _torchao_float8(block: Callable[[Any], tuple[int, ...]], calibrated: bool) -> Callable[..., Call]:
  def make(torch: Any, case: Case, x: Any, host: np.ndarray) -> Call:
    ao = importlib.import_module("torchao.quantization.quant_primitives")
    kept = ao._choose_scale_float8(x, list(block(x)), torch.float8_e4m3fn)

    def function(x: Any) -> Any:
      scale = kept if calibrated else ao._choose_scale_float8(x, list(block(x)), torch.float8_e4m3fn)
      return ao._dequantize_affine_float8(ao._quantize_affine_float8(x, scale, torch.float8_e4m3fn), scale, x.dtype)

    return function

  return make


def _torchao_mx(element: str) -> Callable[..., Call]:
  def make(torch: Any, case: Case, x: Any, host: np.ndarray) -> Call:
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    dtype = getattr(torch, element, element)
    return lambda x: mx.MXTensor.to_mx(x, dtype, 32, mx.ScaleCalculationMode.RCEIL).dequantize(x.dtype)

  return make


def _torchao_nvfp4(torch: Any, case: Case, x: Any, host: np.ndarray) -> Call:
  nv = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
  scale = nv.per_tensor_amax_to_scale(x.float().abs().max())
  return lambda x: nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)


def _whole(x: Any) -> tuple[int, ...]:
  return tuple(x.shape)


def _row(x: Any) -> tuple[int, ...]:
  return (1, x.shape[1])


def _block(size: int) -> Callable[[Any], tuple[int, ...]]:
  return lambda x: (1, size)


TORCHAO = {
  "int8": _torchao_integer(8, _whole, True),
  "int8_channel": _torchao_integer(8, _row, True),
  "int8_channel_dynamic": _torchao_integer(8, _row, False),
  "int4_block": _torchao_integer(4, _block(128), False),
  "int4_block_kept": _torchao_integer(4, _block(128), True),
  "fp8": _torchao_float8(_whole, True),
  "fp8_token": _torchao_float8(_row, False),
  "mxfp8": _torchao_mx("float8_e4m3fn"),
  "mxfp4": _torchao_mx("float4_e2m1fn_x2"),
  "nvfp4": _torchao_nvfp4,
}


# -- torch's own: fake_quantize_per_*_affine, float8 casts -----------------------------------------------------------------------------


def _torch_affine(per_channel: bool, calibrated: bool) -> Callable[..., Call]:
  def make(torch: Any, case: Case, x: Any, host: np.ndarray) -> Call:
    def scale_of(x: Any) -> Any:
      return (x.abs().amax(1) if per_channel else x.abs().max()).float() / 127.0

    scale, zero = scale_of(x), torch.zeros(x.shape[0] if per_channel else (), dtype=torch.int32)
    if not per_channel:
      step = float(scale)
      return lambda x: torch.fake_quantize_per_tensor_affine(x, step, 0, -128, 127)
    if calibrated:
      return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -128, 127)
    return lambda x: torch.fake_quantize_per_channel_affine(x, scale_of(x), zero, 0, -128, 127)

  return make


def _torch_cast(dtype: str, per_row: bool) -> Callable[..., Call]:
  def make(torch: Any, case: Case, x: Any, host: np.ndarray) -> Call:
    element, bound = getattr(torch, dtype), torch.finfo(getattr(torch, dtype)).max
    kept = x.abs().max().float() / bound

    def function(x: Any) -> Any:
      scale = x.abs().amax(1, keepdim=True).float() / bound if per_row else kept
      return ((x.float() / scale).clamp(-bound, bound).to(element).to(torch.float32) * scale).to(x.dtype)

    return function

  return make


TORCH = {
  "int8": _torch_affine(False, True),
  "int8_channel": _torch_affine(True, True),
  "int8_channel_dynamic": _torch_affine(True, False),
  "fp8": _torch_cast("float8_e4m3fn", False),
  "fp8_e5m2": _torch_cast("float8_e5m2", False),
  "fp8_token": _torch_cast("float8_e4m3fn", True),
}


# -- qwix: quantize and dequantize of its core, in one jit -----------------------------------------------------------------------------


def _qwix(qtype: str, channelwise: tuple[int, ...] = (), tiled: int = 0, calibrated: bool = False) -> Callable[..., Call]:
  def make(case: Case, x: Any) -> Call:
    qarray = importlib.import_module("qwix._src.core.qarray")
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=channelwise, tiled_axes={1: tiled} if tiled else {})
    if not calibrated:
      return lambda x: qarray.dequantize(qarray.quantize(x, how))
    scale, zero_point = qarray.compute_scale_zero_point(qarray.calibrate(x, how), how.qtype)
    return lambda x: qarray.dequantize(qarray.quantize_with_scale_zero_point(x, how.qtype, scale, zero_point))

  return make


QWIX = {
  "int8": _qwix("int8", calibrated=True),
  "int8_channel": _qwix("int8", (0,), calibrated=True),
  "int8_channel_dynamic": _qwix("int8", (0,)),
  "fp8": _qwix("float8_e4m3fn", calibrated=True),
  "fp8_e5m2": _qwix("float8_e5m2", calibrated=True),
  "fp8_token": _qwix("float8_e4m3fn", (0,)),
  "int4_block": _qwix("int4", (0,), 128),
  "mxfp8": _qwix("mxfp8", (0,), 32),
  "mxfp4": _qwix("mxfp4", (0,), 32),
  "nvfp4": _qwix("nvfp4", (0,), 16),
  "nf4": _qwix("nf4", (0,), 64),
}
