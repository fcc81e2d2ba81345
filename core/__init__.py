"""The mathematics of twinquant: formats, scales, rounding, the three verbs. numpy only; torch and jax arrays work as they are.

>>> spec = core.QuantSpec.named("nvfp4")
>>> y = core.fake_quantize(x, spec)           # == core.dequantize(core.quantize(x, spec)), bit for bit
"""

from core import formats
from core.metrics import cosine, effective_bits, kl_divergence, sqnr_db
from core.packed import PackedTensor, dequantize_packed, pack_tensor, packed_bytes, packed_shape, unpack_tensor
from core.quantize import QuantizedTensor, amax, block_amax, cast_saturating, dequantize, fake_quantize, pack, quantize, tensor_amax, unpack
from core.scaling import Scales, scales
from core.spec import QuantSpec

__all__ = [
  "PackedTensor",
  "QuantSpec",
  "QuantizedTensor",
  "Scales",
  "amax",
  "block_amax",
  "cast_saturating",
  "cosine",
  "dequantize",
  "dequantize_packed",
  "effective_bits",
  "fake_quantize",
  "formats",
  "kl_divergence",
  "pack",
  "pack_tensor",
  "packed_bytes",
  "packed_shape",
  "quantize",
  "scales",
  "sqnr_db",
  "tensor_amax",
  "unpack",
  "unpack_tensor",
]
