"""Client "numpy": every tensor of an exported folder against the quantizers that made it, by `core` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from core.export import modelopt
from core.export.gguf_file import GgufFile
from core.export.layout import Planned
from core.export.plan import HEAD, LAYOUTS, cache_scale
from core.export.read import Artefact, open_files, read
from core.export.safetensors_file import File, to_bits
from core.export.source import Refusal, Source, Subject, codes_of, label
from core.quantize import QuantizedTensor
from core.verify.job import Job
from core.verify.report import Check
from core.verify.tally import Tally

_WEIGHT = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_shape", "weight_zero_point")


def run(job: Job) -> list[Check]:
  """Compare codes, scales, other tensors of quantized layers, unquantized tensors and the configuration.

  Raises:
    ValueError: the folder is damaged.
  """
  artefact, source = read(job.place), job.simulation.source
  files = {name: file for file in open_files(job.place) for name in file.entries}
  found = job.subjects()
  layers = Tally("layers")
  _names(layers, {subject.label for subject in found}, set(artefact.layers), "quantized layer")
  codes, scales, rest = Tally("codes"), Tally("scales"), Tally("inputs' scales and factors")
  settings = Tally("configuration")
  for subject in found:
    if subject.label in artefact.layers:
      planned = _planned(subject, artefact.layout)
      if planned is None:
        settings.wrong(f"{subject.label} (the layout cannot express what the model does)")
        continue
      made = codes_of(source, subject)
      _layer(subject, artefact, made, codes, scales)
      _others(subject, planned, made, files, rest)
      _scheme(subject.label, planned, artefact, settings)
  _floats(settings, job, artefact)
  return [layers.check(), codes.check(), scales.check(), rest.check(), _unquantized(source, found, artefact, files), settings.check()]


def _planned(subject: Subject, layout: str) -> Planned | None:
  try:
    return LAYOUTS[layout].plan(subject)
  except Refusal:
    return None


def _names(tally: Tally, expected: set[str], found: set[str], what: str) -> None:
  tally.count("", len(expected & found), 0)
  for name in sorted(expected - found):
    tally.wrong(f"{name} (missing {what})")
  for name in sorted(found - expected):
    tally.wrong(f"{name} (unexpected {what})")


def _layer(subject: Subject, artefact: Artefact, made: QuantizedTensor, codes: Tally, scales: Tally) -> None:
  """Codes and scales as the reader decodes them."""
  name = subject.label
  try:
    stored = artefact.stored(name)
  except ValueError as error:
    codes.wrong(f"{name} ({error})", int(np.prod(subject.shape)))
    return
  held = stored.weight
  codes.bits(f"{name}.codes", _codes(made.codes), _codes(held.codes))
  for part in ("scale", "tensor_scale", "zero_point"):
    scales.bits(f"{name}.{part}", _scale(getattr(made, part)), _scale(getattr(held, part)))


def _codes(array: Any) -> np.ndarray:
  found = np.asarray(array)
  return found.astype(np.int16)


def _scale(value: Any) -> np.ndarray | None:
  """Scales in one type and without axes of length one, which layouts keep or leave out."""
  if value is None:
    return None
  found = np.asarray(value)
  found = found.astype(np.float32) if found.dtype.kind == "f" else found.astype(np.int32)
  return found.reshape([n for n in found.shape if n != 1])


def _others(subject: Subject, planned: Planned, made: QuantizedTensor, files: Mapping[str, File | GgufFile], rest: Tally) -> None:
  """Tensors beside the weight's own: what the exporter would write, bit for bit."""
  name = subject.label
  wanted = {suffix for suffix in planned.entries if suffix not in _WEIGHT}
  if len(subject.weights) > 1:  # the scale of the second format, which is no part of the first one's codes and scales
    wanted |= planned.entries.keys() & {"weight_scale_2"}
  held = {key.removeprefix(f"{name}.") for key in files if key.startswith(f"{name}.") and key.count(".") == name.count(".") + 1}
  extra = {suffix for suffix in held if suffix.startswith("input_") or suffix in ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")}
  arrays = planned.make(made) if wanted else {}
  for suffix in sorted(wanted | extra):
    key = f"{name}.{suffix}"
    rest.bits(key, arrays.get(suffix), files[key].read(key) if key in files else None)


def _scheme(name: str, planned: Planned, artefact: Artefact, settings: Tally) -> None:
  """What config.json says of the layer, against what the model does."""
  try:
    held = artefact.scheme(name)
  except ValueError as error:
    settings.wrong(f"{name} ({error})")
    return
  for key, value in planned.scheme.items():
    if _plain(held.get(key)) != _plain(value):
      settings.wrong(f"{name}: {key} is {_plain(held.get(key))}, expected {_plain(value)}")
    else:
      settings.count(name, 1, 0)


def _plain(value: Any) -> Any:
  return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def _floats(settings: Tally, job: Job, artefact: Artefact) -> None:
  """Linear layers that stay float must not be taken for quantized ones."""
  source, quantized = job.simulation.source, {subject.label for subject in job.subjects()}
  for name in source.weighted():
    text = label(name)
    if text in quantized or source.is_table(name) or not source.is_linear(name):
      continue
    try:
      artefact.scheme(text)
    except ValueError:
      settings.count(text, 1, 0)
    else:
      settings.wrong(f"{text} (stays float, and the configuration does not leave it out)")


def _unquantized(source: Source, found: list[Subject], artefact: Artefact, files: Mapping[str, File | GgufFile]) -> Check:
  """Unquantized tensors and the scales of the key/value cache, bit for bit in the file's own type."""
  tally = Tally("unquantized tensors")
  expected = unquantized(source, found, artefact)
  _names(tally, set(expected), set(artefact.floats), "tensor")
  for text in artefact.floats:
    if text in expected:
      kind = files[text].entries[text].dtype
      tally.bits(text, to_bits(source.tensor(expected[text]), kind), files[text].read(text))
  caches = _caches(source, artefact.layout == modelopt.NAME)
  _names(tally, set(caches), set(artefact.caches), "cache scale")
  for text in artefact.caches:
    if text in caches:
      tally.bits(text, caches[text], files[text].read(text))
  return tally.check()


def unquantized(source: Source, found: list[Subject], artefact: Artefact) -> dict[str, str]:
  """Unquantized tensors that the artefact must have: name there -> name in the model.

  A head that is the table of embeddings has no tensor of its own where config.json says so; some models hold a copy of it all the same.
  """
  done = {f"{subject.name}.weight" for subject in found}
  names = {label(name): name for name in source.parameter_shapes() if name not in done}
  if artefact.config.get("tie_word_embeddings") is True and HEAD in names and HEAD not in artefact.floats:
    head = source.tensor(names[HEAD])
    tables = [f"{name}.weight" for name in source.weighted() if source.is_table(name)]
    if any(names.get(table) == table and np.array_equal(source.tensor(table), head) for table in tables):
      del names[HEAD]
  return names


def _caches(source: Source, in_projection: bool) -> dict[str, np.ndarray]:
  """Scales of the key/value cache under the names that clients look for; ModelOpt keeps them in k_proj and v_proj."""
  found = {}
  for name, stages in source.activation_stages().items():
    module, _, role = name.rpartition(".")
    if role in ("k_bmm_quantizer", "v_bmm_quantizer"):
      place, shape = (f"{label(module)}.{role[0]}_proj", ()) if in_projection else (label(module), (1,))
      found[f"{place}.{role[0]}_scale"] = cache_scale(stages[0].amax).reshape(shape)
  return found
