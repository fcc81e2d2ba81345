"""Groups, scales and whole tensors in exact rationals, by SPEC.md. See exact.py for elements; `core` is not imported."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

from tests.golden import exact
from tests.golden.exact import E4M3, FLOAT16, INF, LARGEST_AMAX, NAN, SMALLEST_AMAX, Codebook, Int, Real, Spec, fl

ZERO, ONE = Fraction(0), Fraction(1)


@dataclasses.dataclass
class Group:
  """Scale of one group. `stored` is a float32 magnitude or a code, as the scale format says."""

  step: Fraction
  inverse: Fraction
  stored: Fraction | int
  zero_point: int | None = None


@dataclasses.dataclass
class Result:
  """One quantized tensor, row-major; scales in the order of `scale_shape`."""

  codes: list[int]
  values: list[int]
  scale: list[Fraction | int]
  scale_shape: tuple[int, ...]
  tensor_scale: list[Fraction] | None
  tensor_scale_shape: tuple[int, ...]
  zero_point: list[int] | None


# ---------------------------------------------------------------- groups


def scale_shape(shape: tuple[int, ...], spec: Spec) -> tuple[int, ...]:
  """Shape of block amax and of the stored scales."""
  if spec.blocks is not None:
    sizes = {a % len(shape): n for a, n in spec.blocks}
    return tuple(n if i not in sizes else 1 if sizes[i] is None else -(-n // sizes[i]) for i, n in enumerate(shape))
  if spec.axis is None:
    return ()
  kept = {a % len(shape) for a in spec.axis}
  return tuple(n if i in kept else 1 for i, n in enumerate(shape))


def group_of(shape: tuple[int, ...], spec: Spec) -> list[int]:
  """For every element (row-major), the row-major number of its group."""
  scales = scale_shape(shape, spec)
  if scales == ():
    return [0] * math.prod(shape)
  sizes = {a % len(shape): n for a, n in spec.blocks or ()}
  out = []
  for index in itertools.product(*(range(n) for n in shape)):
    number = 0
    for i, position in enumerate(index):
      size = sizes.get(i, 1) or shape[i]
      number = number * scales[i] + (0 if scales[i] == 1 else position // size)
    out.append(number)
  return out


def group_amax(x: list[Real], groups: list[int], count: int) -> list[Fraction]:
  """Largest finite magnitude of each group; 0 where there is none."""
  amax = [ZERO] * count
  for value, g in zip(x, groups, strict=True):
    if value.finite:
      amax[g] = max(amax[g], value.magnitude)
  return amax


def group_range(x: list[Real], groups: list[int], count: int) -> list[tuple[Fraction, Fraction]]:
  """(min(x, 0), max(x, 0)) of each group over its finite elements; subnormal elements count as zero."""
  out = [(ZERO, ZERO)] * count
  for value, g in zip(x, groups, strict=True):
    if value.finite and value.magnitude >= Fraction(2) ** -126:
      out[g] = (min(out[g][0], value.value), max(out[g][1], value.value))
  return out


# ---------------------------------------------------------------- scales


def limited(amax: Fraction) -> Fraction | None:
  """amax under the range policy; None for a zero group."""
  return None if amax < SMALLEST_AMAX else min(amax, LARGEST_AMAX)


def float32_scale(amax: Fraction, bound: Fraction) -> Group:
  a = limited(amax)
  if a is None:
    return Group(ONE, ZERO, ONE)
  scale = fl(a / bound)
  return Group(scale, fl(1 / scale), scale)


def float16_scale(amax: Fraction, bound: Fraction) -> Group:
  wide = float32_scale(amax, bound)
  if wide.inverse == 0:
    return wide
  scale = exact.float_round(max(wide.step, Fraction(2) ** -24), FLOAT16)
  return Group(scale, fl(1 / scale), scale)


def signed_scale(amax: Fraction, spec: Spec, rule: Callable[[Fraction, Fraction], Group]) -> Group:
  """The scale of |amax| with the sign of amax, where the specification has signed scales; a zero group's is positive."""
  if amax >= 0 or not spec.signed_scale:
    return rule(amax, spec.element_bound)
  group = rule(-amax, spec.element_bound)
  return group if group.inverse == 0 else Group(-group.step, -group.inverse, -group.step)


def e8m0_scale(amax: Fraction, spec: Spec) -> Group:
  a = limited(amax)
  if a is None:
    return Group(ONE, ZERO, 127)
  emax = exact.floor_log2(spec.element_bound)
  if spec.e8m0_rule == "rceil":
    e = exact.ceil_log2(a / spec.element_bound)
  elif spec.e8m0_rule == "floor":
    e = exact.floor_log2(a) - emax
  elif spec.e8m0_rule == "ceil":
    e = exact.ceil_log2(a) - emax
  else:
    assert spec.e8m0_rule == "even"
    assert not isinstance(spec.element, Codebook)
    half = Fraction(2) ** (exact.floor_log2(a) - spec.element.mantissa - 1)
    e = exact.floor_log2(a + half) - emax
  e = max(-127, min(127, e))
  return Group(Fraction(2) ** e, Fraction(2) ** -e, e + 127)


def double_scales(amax: list[Fraction], rows: list[list[int]], spec: Spec) -> tuple[list[Group], list[Fraction]]:
  """Double quantization: float32 scales of each row in groups of `scale_block`, as 8-bit codes times a second-level scale."""
  first = [float32_scale(a, spec.element_bound) for a in amax]
  contribution = [ZERO if g.inverse == 0 else g.step for g in first]
  groups, second = [Group(ONE, ZERO, 1)] * len(amax), []
  for row in rows:
    size = min(spec.scale_block or len(row), len(row))
    for start in range(0, len(row), size):
      members = row[start : start + size]
      s2 = float32_scale(max(contribution[i] for i in members), Fraction(255))
      second.append(s2.step)
      for i in members:
        code = max(1, min(255, round(fl(contribution[i] * s2.inverse))))
        step = fl(code * s2.step)
        groups[i] = Group(step, ZERO if first[i].inverse == 0 else fl(1 / step), code)
  return groups, second


def tensor_scale(amax: Fraction, spec: Spec) -> Fraction | None:
  """Second-level scale of a two-level specification; None for a zero tensor."""
  a = limited(amax)
  return None if a is None else fl(a / (spec.element_bound * (256 if spec.four_over_six else 448)))


def block_level(target: Fraction) -> Fraction:
  return exact.float_round(max(Fraction(2) ** -9, min(Fraction(448), target)), E4M3)


def two_level_scale(amax: Fraction, second: Fraction | None, block: list[Real], shape: tuple[int, ...], spec: Spec) -> Group:
  """E4M3 block scale over the tensor scale; `block` holds the block's elements, zero padded, in `shape`."""
  a = limited(amax)
  if a is None or second is None:
    return Group(ONE if second is None else second, ZERO, 0x38)
  target = fl(min(a / fl(spec.element_bound * second), Fraction(512)))  # beyond 448 it is clamped anyway
  level = block_level(target)
  if spec.four_over_six:
    four = block_level(fl(target * Fraction(3, 2)))
    if squared_error(block, shape, four, second, spec) < squared_error(block, shape, level, second, spec):
      level = four
  step = fl(level * second)
  return Group(step, fl(1 / step), exact.float_code(level, False, E4M3))


def squared_error(block: list[Real], shape: tuple[int, ...], level: Fraction, second: Fraction, spec: Spec) -> Fraction:
  """Four over six: the squared error of one candidate, in units of the tensor scale. A NaN makes it infinite (so the first stands)."""
  if any(not x.finite for x in block):
    return Fraction(2) ** 400
  inverse, terms = fl(1 / fl(level * second)), []
  for x in block:
    v = fl(x.value * inverse)
    q = exact.float_round(abs(v), spec.element)  # type: ignore[arg-type]
    d = fl(v - (-q if v < 0 else q))
    terms.append(ZERO if abs(d) < Fraction(2) ** -40 else fl(d * d))
  total = tree_sum(terms, shape)
  return fl(fl(total * level) * level)


def tree_sum(terms: list[Fraction], shape: tuple[int, ...]) -> Fraction:
  """Sum over the first axis in a binary tree of halves, then over the next axis; each axis padded with zeros to a power of two."""
  for n in shape:
    rest, size = len(terms) // n, 1 << (n - 1).bit_length()
    terms = terms + [ZERO] * ((size - n) * rest)
    while size > 1:
      size //= 2
      terms = [fl(a + b) for a, b in zip(terms[: size * rest], terms[size * rest :], strict=True)]
  return terms[0]


def zero_point_scale(low: Fraction, high: Fraction, spec: Spec) -> Group:
  fmt = spec.element
  assert isinstance(fmt, Int)
  low, high = max(low, -(Fraction(2) ** 125)), min(high, Fraction(2) ** 125)
  span = limited(fl(high - low))
  if span is None:
    return Group(ONE, ZERO, ONE, 0)
  scale = fl(span / (fmt.high - fmt.low))
  inverse = fl(1 / scale)
  return Group(scale, inverse, scale, max(fmt.low, min(fmt.high, fmt.low - round(fl(low * inverse)))))


# ---------------------------------------------------------------- tensors


def blocks_of(x: list[Real], shape: tuple[int, ...], spec: Spec, groups: list[int], count: int) -> tuple[list[list[Real]], tuple[int, ...]]:
  """The elements of every block, zero padded to full blocks, row-major; and the block's shape."""
  sizes = [n or shape[a % len(shape)] for a, n in sorted((a % len(shape), n) for a, n in spec.blocks or ())]
  axes = sorted(a % len(shape) for a, _ in spec.blocks or ())
  blocks = [[Real(False, ZERO)] * math.prod(sizes) for _ in range(count)]
  for value, g, index in zip(x, groups, itertools.product(*(range(n) for n in shape)), strict=True):
    position = 0
    for a, n in zip(axes, sizes, strict=True):
      position = position * n + index[a] % n
    blocks[g][position] = value
  return blocks, tuple(sizes)


def quantize(
  bits: list[int],
  shape: tuple[int, ...],
  spec: Spec,
  amax: list[Fraction] | list[tuple[Fraction, Fraction]] | None = None,
  tensor_amax: Fraction | None = None,
  key: tuple[int, int] | None = None,
) -> Result:
  """Codes, scales and values (as float32 bits) of one tensor given by its float32 bits, row-major.

  `amax`: one per group (a range for zero points); `tensor_amax`: for two-level specifications.
  """
  x = [exact.from_bits(b) for b in bits]
  groups, scales = group_of(shape, spec), scale_shape(shape, spec)
  count = math.prod(scales)
  scale, second, second_shape = _scales(x, shape, spec, groups, count, amax, tensor_amax)
  codes, values = [], []
  for i, (value, g) in enumerate(zip(x, groups, strict=True)):
    u = None if spec.rounding == "nearest" else exact.uniform(key or (0, 0), i)
    code, y = _element(value, scale[g], spec, u)
    codes.append(code)
    values.append(exact.to_bits(y))
  zero_point = [g.zero_point or 0 for g in scale] if spec.zero_point else None
  return Result(codes, values, [g.stored for g in scale], scales, second, second_shape, zero_point)


def _scales(x, shape, spec: Spec, groups, count, amax, tensor_amax):
  if spec.zero_point:
    ranges = amax if amax is not None else group_range(x, groups, count)
    return [zero_point_scale(low, high, spec) for low, high in ranges], None, ()
  if amax is None:
    amax = group_amax(x, groups, count)
  if spec.scale_format == "E8M0":
    return [e8m0_scale(a, spec) for a in amax], None, ()
  if spec.scale_format == "FLOAT16":
    return [signed_scale(a, spec, float16_scale) for a in amax], None, ()
  if spec.scale_format == "UINT8":
    last = scale_shape(shape, spec)[-1]
    rows = [list(range(r, r + last)) for r in range(0, count, last)]
    scales, second = double_scales(amax, rows, spec)
    return scales, second, (*scale_shape(shape, spec)[:-1], len(second) // len(rows))
  if spec.scale_format == "E4M3":
    second = tensor_scale(max(amax) if tensor_amax is None else tensor_amax, spec)
    blocks, block_shape = blocks_of(x, shape, spec, groups, count)
    scales = [two_level_scale(a, second, b, block_shape, spec) for a, b in zip(amax, blocks, strict=True)]
    return scales, [ONE if second is None else second], ()
  return [signed_scale(a, spec, float32_scale) for a in amax], None, ()


def _element(x: Real, group: Group, spec: Spec, u: Fraction | None) -> tuple[int, Real]:
  if group.zero_point is None:
    return exact.code_and_value(x, group.step, group.inverse, spec.element, u)
  fmt = spec.element
  assert isinstance(fmt, Int)
  if x.magnitude == NAN or (x.magnitude == INF and group.inverse == 0):
    return 0, Real(False, NAN)
  limit = Fraction(2) ** 22
  v = max(-limit, min(limit, exact.scaled(x, group.inverse)))
  code = max(fmt.low, min(fmt.high, exact.integer_round(v, u) + group.zero_point))
  value = fl((code - group.zero_point) * group.step)
  return code, Real(value < 0, abs(value))
