"""What `experiments.format_sweep` measures: every named format of `core`, integers of 2 to 8 bits, and the choices that move a figure."""

from __future__ import annotations

import dataclasses

from core import QuantSpec, formats, limits
from core.spec import E8M0_RULES, NAMED


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the sweep.

  Attributes:
    spec: specification.
    family: "INT", "FP8", "MX", "NVFP4", "NF4"; colour and marker in the figure.
    label: text in the figure; "" keeps a variation out of it unless it is asked for by name.
    clip: given amax in standard deviations; None takes amax from the elements.
  """

  spec: QuantSpec
  family: str
  label: str = ""
  clip: float | None = None


def entries() -> dict[str, Entry]:
  """Every line of the sweep by name: the named formats of `core`, integers of 2 to 8 bits, and the choices that move a figure."""
  return {**_named(), **_integers(), **_scale_rules(), **_granularities(), **_clipped()}


def _named() -> dict[str, Entry]:
  labels = {
    "int8": "INT8 tensor",
    "int4": "",  # INT4, block 128, float32 scales: drawn with float16 scales, as it is usually stored
    "fp8_e4m3": "E4M3",
    "fp8_e5m2": "E5M2",
    "nvfp4_four_over_six": "NVFP4 four over six",
    "nf4_double": "NF4 double",
    "mxfp8_e4m3": "MXFP8 E4M3",
    "mxfp8_e5m2": "MXFP8 E5M2",
    "mxfp6_e2m3": "MXFP6 E2M3",
    "mxfp6_e3m2": "MXFP6 E3M2",
  }
  return {name: Entry(spec, _family(name), labels.get(name, name.upper())) for name, spec in NAMED.items()}


def _family(name: str) -> str:
  return next(
    family for start, family in (("mx", "MX"), ("int", "INT"), ("fp8", "FP8"), ("nvfp4", "NVFP4"), ("nf4", "NF4")) if name.startswith(start)
  )


def _integers() -> dict[str, Entry]:
  found = {}
  for bits in range(2, 9):
    for size in (16, 32, 64, 128):
      spec = QuantSpec(formats.int_format(bits), blocks=((-1, size),), scale_format=formats.FLOAT16)
      label = f"INT{bits} block {size}" if size in (32, 128) else ""
      found[f"int{bits}_block{size}_fp16"] = Entry(spec, "INT", label)
  for bound in (7.5, 8.0):
    found[f"int4_block128_fp16_bound{bound:g}"] = Entry(found["int4_block128_fp16"].spec.replace(bound=bound), "INT")
  for bits in (4, 8):
    found[f"int{bits}_channel"] = Entry(QuantSpec(formats.int_format(bits), axis=(0,)), "INT", f"INT{bits} channel")
  found["int4_tensor"] = Entry(QuantSpec(formats.INT4), "INT", "INT4 tensor")
  found["int8_channel_zero_point"] = Entry(QuantSpec(formats.INT8, axis=(0,), zero_point=True), "INT")
  found["fp8_e4m3_channel"] = Entry(QuantSpec(formats.E4M3, axis=(0,)), "FP8")
  return found


def _scale_rules() -> dict[str, Entry]:
  return {
    f"{name}_{rule}": Entry(spec.replace(e8m0_rule=rule), "MX")
    for name, spec in NAMED.items()
    for rule in E8M0_RULES
    if spec.is_mx and rule != spec.e8m0_rule
  }


def _granularities() -> dict[str, Entry]:
  found = {}
  for size in (8, 16, 64, 128):
    found[f"mxfp4_block{size}"] = Entry(QuantSpec.named("mxfp4", blocks=((-1, size),)), "MX")
  for size in (8, 32):
    found[f"nvfp4_block{size}"] = Entry(QuantSpec.named("nvfp4", blocks=((-1, size),)), "NVFP4")
  found["nvfp4_tiles16x16"] = Entry(QuantSpec.named("nvfp4", blocks=((-2, 16), (-1, 16))), "NVFP4")
  found["int4_block16_e4m3"] = Entry(QuantSpec(formats.INT4, blocks=((-1, 16),), scale_format=formats.E4M3), "NVFP4", "INT4, NVFP4 scales")
  for size in (32, 128):
    found[f"nf4_block{size}"] = Entry(QuantSpec.named("nf4", blocks=((-1, size),)), "NF4")
  return found


def _clipped() -> dict[str, Entry]:
  """One scale for everything, at the clip that is optimal for a Gaussian (exact, from `core.limits`)."""
  found = {}
  for bits in (4, 8):
    spec = QuantSpec(formats.int_format(bits, narrow_range=True))
    found[f"int{bits}_tensor_clipped"] = Entry(spec, "INT", f"INT{bits} tensor, optimal clip", limits.optimal_uniform(bits).clip)
  return found


def chosen(names: tuple[str, ...]) -> dict[str, Entry]:
  """The entries that `--formats` names; those without a label get their name, since they were asked for.

  Raises:
    ValueError: none, or an unknown name.
  """
  known = entries()
  if names == ("all",):
    return known
  unknown = [name for name in names if name not in known]
  if unknown or not names:
    raise ValueError(f"--formats={','.join(names)}: unknown {', '.join(unknown) or '(empty)'}; allowed are all, or of {', '.join(known)}")
  return {name: dataclasses.replace(known[name], label=known[name].label or name) for name in names}
