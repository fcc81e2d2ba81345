"""What an export will write, decided and refused before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import core
from core.config.groups import group
from core.config.rules import ConfigWarning
from core.export import compressed_tensors, gguf_layout, modelopt
from core.export.layout import Planned
from core.export.safetensors_file import to_bits
from core.export.source import Refusal, Source, Subject, check, codes_of, few, granularity, label, natural, subjects
from core.tensor_header import Entry

LAYOUTS: dict[str, Any] = {module.NAME: module for module in (compressed_tensors, modelopt, gguf_layout)}
HEAD = "lm_head.weight"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Item(NamedTuple):
  """Tensors that are computed together, and stay in one file."""

  entries: dict[str, Entry]
  make: Callable[[], dict[str, np.ndarray]]


class Plan(NamedTuple):
  """Everything about an export but the numbers.

  Attributes:
    layout: name of the layout.
    layers: layer -> how it is written.
    items: what goes into the files, in the order of the checkpoint's names.
    exact: layer -> tensor scale whose reciprocal the file holds.
    settings: `quantization_config` of config.json.
    beside: further JSON files by name.
    notes: what the reader of the model card must know.
  """

  layout: str
  layers: dict[str, Planned]
  items: list[Item]
  exact: dict[str, np.ndarray]
  settings: dict[str, Any]
  beside: dict[str, Any]
  notes: list[str]


def plan(source: Source, layout: str, dtype: str | None = None, tied_head: bool = False) -> Plan:
  """Decide how a model is written, and refuse what the layout cannot express.

  Args:
    source: the model.
    layout: "compressed-tensors", "modelopt" or "gguf".
    dtype: of the unquantized tensors; None leaves each in its own.
    tied_head: whether the head is the table of embeddings and gets no tensor of its own.

  Raises:
    ValueError: an unknown layout or dtype, nothing is quantized, or something cannot be expressed: names the layers and which layouts can.
  """
  if layout not in LAYOUTS:
    raise ValueError(f"layout {layout!r} is unknown; allowed are {', '.join(map(repr, LAYOUTS))}")
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(f"dtype {dtype!r} is unknown; allowed are {', '.join(DTYPES)}, or None for each tensor's own")
  found = subjects(source)
  if not found:
    raise ValueError("no weight of the model is quantized; call quantize(model, config, forward_loop) with a config that quantizes weights")
  layers = _layers(source, layout, found)
  caches = _caches(source, layout)
  _check_others(source, layout, found, set(caches))
  quiet = _unquantized(source, layers)
  if tied_head and "lm_head" not in (*layers, *quiet):
    quiet.append("lm_head")
  notes = [*_notes(layout, layers), *_sibling_notes(found), *_input_notes(layout, found)]
  items = _items(source, found, layers, dtype, caches, {HEAD} if tied_head else set(), layout == modelopt.NAME)
  exact = {subject.label: tensor_scale(source, subject) for subject in found if layers[subject.label].tensor_scale}
  cache = next(iter(caches.values()), None)
  if layout == modelopt.NAME:
    settings = modelopt.config(layers, quiet, None if cache is None else cache[1])
    return Plan(layout, layers, items, exact, modelopt.hf_config(settings), {"hf_quant_config.json": settings}, notes)
  if layout == gguf_layout.NAME:
    return Plan(layout, layers, items, exact, {}, {}, notes)
  tables = [subject.label for subject in found if subject.table]
  settings = compressed_tensors.config(layers, quiet, tables, None if cache is None else cache[0])
  return Plan(layout, layers, items, exact, settings, {}, notes)


# -- refusals ----------------------------------------------------------------------------------------------------------------------


def _layers(source: Source, layout: str, found: list[Subject]) -> dict[str, Planned]:
  planned: dict[str, Planned] = {}
  refused: dict[str, list[Subject]] = {}
  for subject in found:
    try:
      check(subject, source)
      planned[subject.label] = LAYOUTS[layout].plan(subject)
    except Refusal as refusal:
      refused.setdefault(str(refusal), []).append(subject)
  if refused:
    lines = [f"{few([s.label for s in subjects])}: {reason}{_who_can(subjects[0], layout)}" for reason, subjects in refused.items()]
    raise ValueError(f"layout {layout!r} cannot express this model, nothing was written. " + "; ".join(lines))
  return planned


def _who_can(subject: Subject, layout: str) -> str:
  able = []
  for name, other in LAYOUTS.items():
    try:
      if name != layout:
        other.plan(subject)
        able.append(repr(name))
    except Refusal:
      continue
  return f" (layout {' or '.join(able)} can)" if able else " (no layout can; save() keeps the model as it is)"


def _caches(source: Source, layout: str) -> dict[str, tuple[dict[str, Any], str, np.ndarray]]:
  """Quantizers of the key/value cache by name: (arguments, name of the algorithm, scale)."""
  found: dict[str, tuple[dict[str, Any], str, np.ndarray]] = {}
  for name, stages in source.activation_stages().items():
    if name.rpartition(".")[2] in ("k_bmm_quantizer", "v_bmm_quantizer"):
      try:
        stage = stages[0]
        if len(stages) > 1:
          raise Refusal("several formats in sequence")
        args, algorithm = LAYOUTS[layout].cache_args(stage)
        found[name] = (args, algorithm, cache_scale(stage.amax))
      except Refusal as refusal:
        raise ValueError(f"layout {layout!r} cannot express {name}: {refusal}; nothing was written") from refusal
  if len({algorithm for _, algorithm, _ in found.values()}) > 1:
    raise ValueError(f"layout {layout!r} has one format for the whole key/value cache; {few(list(found))} have several")
  return found


def cache_scale(amax: np.ndarray | None) -> np.ndarray:
  """[] float32 scale of a cache: amax / 448, of FP8 and, as the peer writes it, of NVFP4.

  Raises:
    Refusal: it was not calibrated.
  """
  if amax is None:
    raise Refusal("it was not calibrated; call calibrate with a forward_loop")
  made = core.scales(np.asarray(amax, np.float32), core.QuantSpec.named("fp8_e4m3"))
  return np.asarray(made.scale, np.float32).reshape(())


def _check_others(source: Source, layout: str, found: list[Subject], known: set[str]) -> None:
  known = known | {f"{subject.name}.input_quantizer" for subject in found}
  other = [name for name in source.activation_stages() if name not in known]
  if other:
    raise ValueError(
      f"layout {layout!r} has no place for the quantizers {few(other)} (outputs, attention, and inputs of layers whose weight is not "
      "quantized), nothing was written; switch them off before exporting (disable_quantizer), or keep the model with save()"
    )
  scaled = [n for n in source.weighted() if source.pre_quant_scale(n) is not None and n not in {s.name for s in found}]
  if scaled:
    raise ValueError(f"{few(scaled)} have a pre_quant_scale and no quantized weight; no layout can express that")


# -- notes -------------------------------------------------------------------------------------------------------------------------


def _notes(layout: str, layers: dict[str, Planned]) -> list[str]:
  if layout == modelopt.NAME:
    algorithms = {planned.scheme["quant_algo"] for planned in layers.values()}
    wrong = sorted(algorithms & {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"})
    if wrong:
      text = f"transformers reads {', '.join(wrong)} of this layout silently wrong: it takes the codes for weights and drops the scales"
      return [text + "; for transformers export layout 'compressed-tensors'"]
    return ["transformers does not read this layout; for transformers export layout 'compressed-tensors'"]
  if layout == gguf_layout.NAME:
    return ["llama.cpp rounds the inputs of these layers to 8 bits by its own rule; transformers leaves them float"]
  forms = {planned.scheme["format"] for planned in layers.values()}
  notes = []
  if len({str(planned.scheme) for planned in layers.values()}) > 1:
    notes.append("transformers decodes mixed precision with dequantize=False only: with True every layer gets the first group's scheme")
  if "nvfp4-pack-quantized" in forms:
    notes.append("transformers computes NVFP4 weights in bfloat16, whatever the model's type")
  return notes


def _input_notes(layout: str, found: list[Subject]) -> list[str]:
  if layout != compressed_tensors.NAME:
    return []
  inputs = [subject.inputs[0].spec for subject in found if subject.inputs]
  notes = []
  if any(isinstance(s.element, core.formats.IntFormat) and s.dynamic and s.element_bound != 127.5 for s in inputs):
    notes.append("transformers divides dynamic INT8 inputs by 127.5 (vLLM: 127); bound=127.5 on the input quantizer simulates transformers")
  if any(s.is_mx and s.element == core.formats.E2M1 for s in inputs):
    notes.append("transformers rounds the shared exponent of MXFP4 inputs by another rule; weights are the same")
  return notes


def _sibling_notes(found: list[Subject]) -> list[str]:
  by_label = {subject.label: subject for subject in found}
  for members in group(list(by_label)):
    shared = {
      _tensor_amax(by_label[name]) for name in members if granularity(by_label[name].spec).kind == "tensor" or by_label[name].spec.two_level
    }
    if len(shared) > 1:
      text = f"{', '.join(members)} and possibly more siblings have tensor scales of their own; engines that fuse them keep the largest"
      return [text + " and compute other numbers (group_rules of quantize)"]
  return []


def _tensor_amax(subject: Subject) -> float | None:
  stage = subject.weights[0]
  value = stage.tensor_amax if stage.tensor_amax is not None else stage.amax
  return None if value is None else float(np.max(value))


def warn(plan: Plan) -> None:
  """Say what clients do differently."""
  for note in plan.notes:
    warnings.warn(f"export to layout {plan.layout!r}: {note}", ConfigWarning, stacklevel=4)


# -- tensors -----------------------------------------------------------------------------------------------------------------------


def tensor_scale(source: Source, subject: Subject) -> np.ndarray:
  """[] float32: the tensor scale of a two-level weight."""
  stage, held = subject.weights[0], source.stored(subject.name)
  given = stage.tensor_amax if stage.tensor_amax is not None else stage.amax if stage.spec.dynamic else None
  if held is None and given is not None and not stage.spec.four_over_six:
    return np.asarray(core.scales(np.asarray(given, np.float32).reshape(()), stage.spec).tensor_scale, np.float32).reshape(())
  return np.asarray((held or codes_of(source, subject)).tensor_scale, np.float32).reshape(())


def _unquantized(source: Source, layers: dict[str, Planned]) -> list[str]:
  shapes = source.parameter_shapes()
  names = [name for name in source.weighted() if not source.is_table(name) and len(shapes.get(f"{name}.weight", ())) == 2]
  return sorted((text for name in names if (text := label(name)) not in layers), key=natural)


def _items(
  source: Source,
  found: list[Subject],
  layers: dict[str, Planned],
  dtype: str | None,
  caches: dict[str, tuple[dict[str, Any], str, np.ndarray]],
  left_out: set[str],
  in_projection: bool,
) -> list[Item]:
  items = {subject.label: _layer_item(source, subject, layers[subject.label]) for subject in found}
  done = left_out | {f"{subject.name}.weight" for subject in found}
  types = source.parameter_types()
  for name in source.parameter_shapes():
    if name not in done:
      kind = types[name] if dtype is None else DTYPES[dtype]
      items[label(name)] = _float_item(source, name, kind)
  for name, (_, _, scale) in caches.items():
    items[label(name)] = _cache_item(label(name), scale, in_projection)
  return [items[name] for name in sorted(items, key=natural)]


def _layer_item(source: Source, subject: Subject, planned: Planned) -> Item:
  def make() -> dict[str, np.ndarray]:
    return {f"{subject.label}.{suffix}": array for suffix, array in planned.make(codes_of(source, subject)).items()}

  return Item({f"{subject.label}.{suffix}": entry for suffix, entry in planned.entries.items()}, make)


def _float_item(source: Source, name: str, kind: str) -> Item:
  shape = tuple(source.parameter_shapes()[name])
  return Item({label(name): Entry(kind, shape)}, lambda: {label(name): to_bits(source.tensor(name), kind)})


def _cache_item(name: str, scale: np.ndarray, in_projection: bool) -> Item:
  """The scale of an attention module's "k_bmm_quantizer": its "k_scale", or, where ModelOpt writes it, its "k_proj.k_scale"."""
  module, _, role = name.rpartition(".")
  text, shape = (f"{module}.{role[0]}_proj.{role[0]}_scale", ()) if in_projection else (f"{module}.{role[0]}_scale", (1,))
  return Item({text: Entry("F32", shape)}, lambda: {text: scale.reshape(shape)})
