"""amax -> scale: float32, E8M0 by four rules, two-level E4M3 (with four-over-six), double quantization. See SPEC.md, "Scales".

Every rule is decided on integers or by correctly rounded operations, so that the same bits come out everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from core import bits, encoding, rounding
from core.arrays import Array, Namespace, namespace
from core.blocks import Tiling, to_blocks
from core.formats import TRACED_E4M3 as E4M3
from core.formats import TRACED_E8M0 as E8M0
from core.formats import TRACED_UINT8 as UINT8
from core.formats import FloatFormat, Format, IntFormat
from core.spec import QuantSpec

ZERO_BELOW = 2.0**-90  # an amax below counts as zero: every later product stays a normal float32
AMAX_LIMIT = 2.0**126  # an amax above counts as this: no product overflows, and every reciprocal is normal
BLOCK_SCALE_MIN = 2.0**-9  # smallest positive E4M3
_ZERO_BITS, _LIMIT_BITS = bits.power_of_two_bits(-90), bits.power_of_two_bits(126)


class Scales(NamedTuple):
  """What the verbs multiply by, and what is stored. All have the shape of block amax, or broadcast against it.

  Attributes:
    step: float32; a value is level * step. Negative where a signed amax is (`QuantSpec.allows_signed_scale`).
    inv_step: float32, correctly rounded 1 / step; 0 in a group whose amax is zero.
    scale: the stored scale: float32 step, uint8 E8M0 or E4M3 code, or uint8 code of a double-quantized scale.
    tensor_scale: float32 second-level scale of two-level and double-quantized scales, else None.
    zero_point: int32 of asymmetric integers, else None.
  """

  step: Array
  inv_step: Array
  scale: Array
  tensor_scale: Array | None = None
  zero_point: Array | None = None


def finite_amax(x: Array, axes: tuple[int, ...]) -> Array:
  """Largest finite magnitude over `axes`, kept as length 1, decided on the bits: exact for subnormals, blind to NaN and infinity.

  Args:
    x: [...] float32.
    axes: axes to reduce.

  Returns:
    float32.
  """
  xp = namespace(x)
  shortcut = xp.finite_amax(x, axes)
  if shortcut is not None:
    return shortcut
  if xp.slow_bit_views(x):  # a maximum of finite floats is exact there, subnormals included
    magnitude = xp.abs(x)
    return xp.max(xp.where(magnitude < float("inf"), magnitude, 0.0), axes)
  magnitude = xp.bits(x) & bits.MAGNITUDE
  return xp.from_bits(xp.max(xp.where(magnitude < bits.INFINITY, magnitude, 0), axes))


def value_range(x: Array, axes: tuple[int, ...]) -> Array:
  """(min(x, 0), max(x, 0)) over the finite elements, stacked on a new leading axis; subnormals count as +0. float32."""
  xp = namespace(x)
  magnitude = xp.bits(x) & bits.MAGNITUDE
  x = xp.where((magnitude < bits.INFINITY) & (magnitude >= bits.SMALLEST_NORMAL), x, 0.0)  # float min and max flush subnormals in XLA
  return xp.stack([xp.minimum(xp.min(x, axes), 0.0), xp.maximum(xp.max(x, axes), 0.0)])


def scales(
  amax: Array,
  spec: QuantSpec,
  tensor_amax: Array | None = None,
  *,
  tiles: Array | None = None,
  tiling: Tiling | None = None,
  signed: bool = True,
) -> Scales:
  """Scales of every group.

  Args:
    amax: block amax, float32; negative for a negative scale where spec.allows_signed_scale, elsewhere a negative one counts as zero;
      for spec.zero_point the range (lo, hi) on a leading axis of 2.
    spec: specification.
    tensor_amax: [] amax of the whole tensor for a two-level scale; None takes the largest block amax.
    tiles: the tiled tensor (`blocks.to_blocks`), needed where the scale depends on the values (four_over_six).
    tiling: the tiling of `tiles`.
    signed: False if amax is known not to be negative, because it was measured: the same bits by fewer operations.

  Returns:
    Scales.
  """
  xp = namespace(amax)
  if spec.zero_point:
    result = _asymmetric(xp, amax, spec)
  elif spec.scale_format is None:
    result = _with_sign(xp, amax, _float32, spec, signed)
  elif spec.scale_format == E8M0:
    result = _power_of_two(xp, amax, spec)
  elif spec.two_level:
    result = _two_level(xp, amax, spec, tensor_amax, tiles, tiling)
  elif spec.scale_format == UINT8:
    result = _double_quantized(xp, amax, spec)
  elif isinstance(spec.scale_format, FloatFormat):
    result = _with_sign(xp, amax, _narrow_float, spec, signed)
  else:
    raise ValueError(f"scale format {spec.scale_format.name} is not supported; use E8M0, E4M3, FLOAT16, UINT8 or None")
  return result._replace(**dict(zip(("step", "inv_step"), xp.barrier(result.step, result.inv_step), strict=True)))


def limit_amax(amax: Array) -> tuple[Array, Array]:
  """amax within [2^-90, 2^126] (1 where it counts as zero), and the mask of zero groups."""
  xp = namespace(amax)
  raw = xp.bits(amax)
  zero = raw < _ZERO_BITS  # a negative amax, too, has smaller bits
  return xp.from_bits(xp.where(zero, bits.ONE, xp.minimum(raw, _LIMIT_BITS))), zero


def reciprocal(step: Array) -> Array:
  """1 / step, correctly rounded."""
  return bits.divide(step * 0.0 + 1.0, step)


def _with_sign(xp: Namespace, amax: Array, rule: Callable[[Namespace, Array, QuantSpec], Scales], spec: QuantSpec, signed: bool) -> Scales:
  """The scales of |amax| by `rule`, with the sign of amax where the specification has signed scales. Zero groups stay positive."""
  if not (signed and spec.allows_signed_scale):
    return rule(xp, amax, spec)
  result = rule(xp, xp.abs(amax), spec)
  negative = amax <= -ZERO_BELOW
  step = xp.where(negative, -result.step, result.step)
  return Scales(step, xp.where(negative, -result.inv_step, result.inv_step), step)


def _float32(xp: Namespace, amax: Array, spec: QuantSpec) -> Scales:
  limited, zero = limit_amax(amax)
  step = xp.where(zero, 1.0, bits.divide(limited, xp.full((1,) * limited.ndim, spec.element_bound, limited)))
  return Scales(step, xp.where(zero, 0.0, reciprocal(step)), step)


def _narrow_float(xp: Namespace, amax: Array, spec: QuantSpec) -> Scales:
  fmt = spec.scale_format
  assert isinstance(fmt, FloatFormat)
  wide = _float32(xp, amax, spec)
  least = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
  step = rounding.to_level(xp.maximum(wide.step, least), fmt)
  return Scales(step, xp.where(wide.inv_step == 0.0, 0.0, reciprocal(step)), step)


def e8m0_code(amax: Array, fmt: Format, rule: str = "rceil", bound: float | None = None) -> Array:
  """Power-of-two block scale of OCP MX, as its biased exponent.

  floor: 2^(floor(log2 amax) - emax), saturates the top of the grid;
  rceil: 2^ceil(log2(amax / bound)), never saturates;
  ceil: 2^(ceil(log2 amax) - emax);
  even: floor of amax rounded to the element's mantissa width, half up.

  Args:
    amax: [..., K/B] float32 within the range policy (`limit_amax`).
    fmt: element format.
    rule: one of `core.spec.E8M0_RULES`.
    bound: level that amax maps to under rceil; None is the format's own.

  Returns:
    [..., K/B] int32, biased exponent 0..254.

  References: OCP MX v1.0, 6.3 (floor); Mishra et al., 2025, arXiv:2506.08027 (rceil); torchao's EVEN.
  """
  xp = namespace(amax)
  raw = xp.bits(amax)
  bound = fmt.bound if bound is None else bound
  emax = math.floor(math.log2(bound)) if not isinstance(fmt, FloatFormat) else fmt.max_exponent
  if rule == "rceil":
    exponent = ((raw - bits.of_constant(bound) + 0x7FFFFF) >> 23) + 127
  elif rule == "floor":
    exponent = (raw >> 23) - emax
  elif rule == "ceil":
    exponent = ((raw + 0x7FFFFF) >> 23) - emax
  elif rule == "even":
    mantissa = fmt.mantissa_bits if isinstance(fmt, FloatFormat) else fmt.bits - 2
    exponent = ((raw + (1 << (22 - mantissa))) >> 23) - emax
  else:
    raise ValueError(f"e8m0 rule {rule!r} is unknown; allowed are rceil, floor, ceil, even")
  return xp.clip(exponent, 0, 254)


def e8m0_step(code: Array) -> Array:
  """2^(code - 127) as float32, for codes 1 to 253 exactly; the ends are clamped (see `quantize.dequantize` for code 0)."""
  xp = namespace(code)
  return xp.from_bits(xp.clip(xp.int32(code), 1, 254) << 23)


def _power_of_two(xp: Namespace, amax: Array, spec: QuantSpec) -> Scales:
  limited, zero = limit_amax(amax)
  code = xp.where(zero, 127, e8m0_code(limited, spec.element, spec.e8m0_rule, spec.bound))
  inverse = xp.from_bits(xp.where(zero, 0, (254 - code) << 23))
  return Scales(xp.from_bits(code << 23), inverse, xp.uint8(code))


def _two_level(
  xp: Namespace, amax: Array, spec: QuantSpec, tensor_amax: Array | None, tiles: Array | None, tiling: Tiling | None
) -> Scales:
  if tensor_amax is None:
    tensor_amax = xp.max(amax, tuple(range(amax.ndim))).reshape(()) if amax.ndim else amax
  top = 256.0 if spec.four_over_six else E4M3.bound
  limited, zero_tensor = limit_amax(tensor_amax)
  one = (1,) * limited.ndim
  tensor_scale = xp.where(zero_tensor, 1.0, bits.divide(limited, xp.full(one, spec.element_bound * top, limited)))
  block, zero = limit_amax(amax)
  zero = zero | zero_tensor
  unit = tensor_scale * spec.element_bound
  # beyond 2^-10 and 2^9 the quotient is clamped anyway; cut here, it is a normal float32 however far the tensor amax is from the block's
  block = xp.minimum(xp.maximum(block, unit * 2.0**-10), unit * 2.0**9)
  target = bits.divide(block, unit)
  if spec.four_over_six:
    if tiles is None or tiling is None:
      raise ValueError("four_over_six chooses the block scale by the block's values; call quantize or fake_quantize without `scales`")
    level = _four_or_six(xp, target, tensor_scale, zero, spec, tiles, tiling)
  else:
    level = _block_level(xp, target)
  level = xp.where(zero, 1.0, level)
  step = level * tensor_scale
  return Scales(step, xp.where(zero, 0.0, reciprocal(step)), encoding.encode(level, E4M3), tensor_scale)


def _block_level(xp: Namespace, target: Array) -> Array:
  return rounding.to_level(xp.clip(target, BLOCK_SCALE_MIN, E4M3.bound), E4M3)


def _four_or_six(xp, target: Array, tensor_scale: Array, zero: Array, spec: QuantSpec, tiles: Array, tiling: Tiling) -> Array:
  """Per block the scale that maps amax to 6, or to 4 where its squared error is strictly less.

  References: Cook et al., 2025, arXiv:2512.02010.
  """
  six, four = _block_level(xp, target), _block_level(xp, target * 1.5)
  errors = []
  for level in (six, four):
    inverse = xp.where(zero, 0.0, reciprocal(level * tensor_scale))
    level, inverse = xp.barrier(level, inverse)
    # in units of the tensor scale, which both share: no magnitude of the tensor can overflow it
    errors.append((_squared_error(xp, tiles, inverse.reshape(tiling.expanded), spec, tiling).reshape(target.shape) * level) * level)
  return xp.where(errors[1] < errors[0], four, six)


def _squared_error(xp, tiles: Array, inverse: Array, spec: QuantSpec, tiling: Tiling) -> Array:
  # The clips change nothing (|v| is below 2^4 on finite data); they keep compilers from fusing a product into the next addition.
  v = xp.clip(tiles * inverse, -(2.0**60), 2.0**60)
  difference = v - rounding.to_level(v, spec.element)
  difference = xp.where(xp.abs(difference) < 2.0**-40, 0.0, difference)  # squares stay normal: XLA flushes subnormals, numpy does not
  error = xp.minimum(difference * difference, 2.0**120)
  for axis in tiling.reduce:
    error = bits.tree_sum(error, axis)
  return error


def _double_quantized(xp: Namespace, amax: Array, spec: QuantSpec) -> Scales:
  first = _float32(xp, amax, spec)
  zero = first.inv_step == 0.0
  values = xp.where(zero, 0.0, first.step)
  count = values.shape[-1]
  size = min(spec.scale_block or count, count)
  groups = -(-count // size)
  if groups * size != count:
    values = xp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, groups * size - count)])
  grouped = values.reshape((*values.shape[:-1], groups, size))
  second = _float32(xp, xp.max(grouped, (grouped.ndim - 1,)), spec.replace(element=UINT8, bound=None, zero_point=False))
  level = xp.clip(xp.round(grouped * second.inv_step), 1.0, 255.0)
  step = (level * second.step).reshape(values.shape)[..., :count]
  code = xp.uint8(level.reshape(values.shape)[..., :count])
  return Scales(step, xp.where(zero, 0.0, reciprocal(step)), code, second.step[..., 0])


def _asymmetric(xp: Namespace, ranges: Array, spec: QuantSpec) -> Scales:
  assert isinstance(spec.element, IntFormat)
  low, high = xp.clip(ranges[0], -(2.0**125), 0.0), xp.clip(ranges[1], 0.0, 2.0**125)
  limited, zero = limit_amax(high - low)
  levels = float(spec.element.max_code - spec.element.min_code)
  step = xp.where(zero, 1.0, bits.divide(limited, xp.full((1,) * limited.ndim, levels, limited)))
  inverse = xp.where(zero, 0.0, reciprocal(step))
  offset = xp.int32(xp.round(xp.clip(low * inverse, -levels, 0.0)))
  zero_point = xp.where(zero, 0, xp.clip(spec.element.min_code - offset, spec.element.min_code, spec.element.max_code))
  return Scales(step, inverse, step, None, zero_point)


def block_amax_of(x: Array, tiling: Tiling, spec: QuantSpec) -> Array:
  """Block amax (or range) of a float32 tensor under its tiling, in the stored shape."""
  tiles = to_blocks(x, tiling)
  if spec.zero_point:
    return value_range(tiles, tiling.reduce).reshape((2, *tiling.scales))
  return finite_amax(tiles, tiling.reduce).reshape(tiling.scales)
