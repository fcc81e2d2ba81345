"""twinquant for JAX and Flax linen: pure functions over unmodified modules.

>>> qmodule, qvariables = quantize(module, variables, INT8_DEFAULT_CFG, lambda model: [model(batch) for batch in data])
>>> y = qmodule.apply(qvariables, x)
"""

from core import config as _config
from core.config import presets as _presets
from jax_backend.apply import QuantModule
from jax_backend.calibrate import calibrate, register_algorithm
from jax_backend.convert import quantize
from jax_backend.edit import disable_quantizer, enable_quantizer, quantizers, set_quantizer_by_cfg
from jax_backend.fold import fold_weight
from jax_backend.modules import register, unregister
from jax_backend.quantizer import Quantizer, SequentialQuantizer
from jax_backend.weights import weight_quantization

globals().update(_presets.PRESETS)
