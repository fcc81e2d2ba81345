"""Clients of ONNX files: "numpy" reads the initializers by `core`, "onnxruntime" and "onnx.reference" run the graph.

The graph names what each quantizer gives after the quantizer ("model.layers.0.mlp.up_proj.weight_quantizer"), so that a runtime can be
asked for every weight and every quantized input beside the outputs. Nothing of the file's own numbers is changed for that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

import core
from core import blocks, encoding, formats
from core.export import onnx_run
from core.export.source import Subject, codes_of, input_scales
from core.quantize import QuantizedTensor, step_of
from core.verify import inputs, outputs
from core.verify.job import Job, package
from core.verify.report import DIFFERS, NOT_CHECKED, Check, NotRun
from core.verify.tally import Tally

WEIGHT, INPUT = "weight_quantizer", "input_quantizer"


def load(path: Path) -> Any:
  """The file as an onnx.ModelProto.

  Raises:
    NotRun: onnx is missing.
    ValueError: it is no ONNX file.
  """
  onnx = package("onnx", "an ONNX file")
  try:
    return onnx.load(str(path))
  except Exception as error:  # protobuf's own error class moves between its releases
    raise ValueError(f"{path} is no ONNX file, or is cut off ({type(error).__name__}: {str(error)[:120]})") from error


def example_inputs(path: Path, prompts: Any) -> Any:
  """Prompts as the graph takes them: token ids of its shape and type where none are given.

  Raises:
    ValueError: none are given and the graph takes something else than token ids of fixed lengths.
  """
  try:
    graph = load(path).graph
  except NotRun:
    return () if prompts is None else prompts  # no client will run
  kinds = {7: np.int64, 6: np.int32}
  first = graph.input[0].type.tensor_type
  sizes = [dim.dim_value for dim in first.shape.dim]
  if prompts is None:
    if len(graph.input) != 1 or first.elem_type not in kinds or len(sizes) != 2 or not all(sizes):
      raise ValueError(f"{path.name} takes {len(graph.input)} inputs of shape {sizes}; give prompts: a tuple of the model's arguments")
    rows = next((int(t.dims[0]) for t in graph.initializer if "embed" in t.name and len(t.dims) == 2), 32)
    prompts = np.random.default_rng(0).integers(0, rows, sizes).astype(np.int32)
  return prompts


def input_shape(path: Path) -> tuple[int, int] | None:
  """(B, T) of a graph of token ids with fixed lengths, else None.

  Raises:
    ValueError: it is no ONNX file, or onnx is missing.
  """
  try:
    graph = load(path).graph
  except NotRun as reason:
    raise ValueError(str(reason)) from reason
  sizes = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
  return (sizes[0], sizes[1]) if len(sizes) == 2 and all(sizes) else None


# -- numpy -------------------------------------------------------------------------------------------------------------------------


def run_numpy(job: Job) -> list[Check]:
  """Initializers against the quantizers.

  Raises:
    NotRun: onnx is missing.
    ValueError: it is no ONNX file.
  """
  model = load(job.place)
  to_array = package("onnx.numpy_helper", "an ONNX file").to_array
  held = {tensor.name: tensor for tensor in model.graph.initializer}
  codes, scales, rest = Tally("codes"), Tally("scales"), Tally("inputs' scales")
  for subject in job.subjects():
    name = _stage_name(subject, held)
    if name is None:
      codes.wrong(f"{subject.label} (no initializer)", int(np.prod(subject.shape)))
      continue
    made = codes_of(job.simulation.source, subject)
    get = lambda part, name=name: to_array(held[f"{name}.{part}"]) if f"{name}.{part}" in held else None  # noqa: E731
    _stored(job, subject, made, get, codes, scales)
    _input_scale(subject, held, to_array, rest)
  others = Check("unquantized tensors", NOT_CHECKED, note="converters name and fold them as they like; a runtime's outputs depend on them")
  return [codes.check(), scales.check(), rest.check(), others]


def _stage_name(subject: Subject, held: dict[str, Any]) -> str | None:
  for name in (f"{subject.name}.{WEIGHT}", f"{subject.name}.{WEIGHT}.0"):
    if f"{name}.codes" in held:
      return name
  return None


def _stored(job: Job, subject: Subject, made: QuantizedTensor, get: Any, codes: Tally, scales: Tally) -> None:
  """Levels of the codes, steps of the groups, zero points, in the file's axes."""
  element = made.spec.element
  levels = np.asarray(encoding.decode(np.asarray(made.codes), element), np.float32)
  codes.values(f"{subject.label}.codes", _turned(job, subject, levels), _levels(get("codes"), element))
  scale = get("scale")
  if scale is None or get("second_scale") is not None:
    return
  steps = scale.astype(np.float32) * (np.float32(1) if get("tensor_scale") is None else get("tensor_scale"))
  wanted = _expanded(np.asarray(step_of(made), np.float32), made)
  outputs_axis = int(_turns(job, subject))
  found = _spread(steps, get("codes").shape, outputs_axis)
  scales.values(f"{subject.label}.scale", _turned(job, subject, wanted), found)
  if made.zero_point is not None and get("zero_point") is not None:
    points = _turned(job, subject, _expanded(np.asarray(made.zero_point, np.float32), made))
    scales.values(f"{subject.label}.zero_point", points, _spread(get("zero_point").astype(np.float32), points.shape, outputs_axis))


def _levels(stored: np.ndarray, element: formats.Format) -> np.ndarray:
  """What stored codes stand for: types say it, but for float codes kept as integers."""
  if isinstance(element, formats.IntFormat) or stored.dtype.name.startswith("float"):
    return stored.astype(np.float32)
  return np.asarray(encoding.decode(stored.astype(np.uint8), element), np.float32)


def _turned(job: Job, subject: Subject, array: np.ndarray) -> np.ndarray:
  """[N, K] in the file's axes: JAX keeps kernels as [K, N]."""
  return np.ascontiguousarray(array.T) if _turns(job, subject) else array


def _turns(job: Job, subject: Subject) -> bool:
  return job.simulation.kernels_turned and len(subject.shape) == 2 and not subject.table


def _expanded(per_group: np.ndarray, made: QuantizedTensor) -> np.ndarray:
  """One value per group -> one per weight."""
  tiling = blocks.tiling(made.shape, made.spec)
  tiles = np.asarray(blocks.to_blocks(np.ones(made.shape, np.float32), tiling))
  return np.asarray(blocks.from_blocks(tiles * np.asarray(blocks.expand(per_group, tiling)), tiling))


def _spread(steps: np.ndarray, shape: tuple[int, ...], outputs: int) -> np.ndarray:
  """Scales as DequantizeLinear takes them -> one per weight: a scalar, one per output, or one per block."""
  if steps.ndim == 0:
    return np.full(shape, steps, np.float32)
  if steps.ndim == 1:
    return np.array(np.broadcast_to(steps.reshape([-1 if i == outputs else 1 for i in range(len(shape))]), shape))
  for axis, n in enumerate(shape):
    steps = np.repeat(steps, -(-n // steps.shape[axis]), axis)
    steps = steps[tuple(slice(0, n) if i == axis else slice(None) for i in range(steps.ndim))]
  return steps


def _input_scale(subject: Subject, held: dict[str, Any], to_array: Any, rest: Tally) -> None:
  if not subject.inputs or (subject.inputs[0].spec.dynamic and not subject.inputs[0].spec.two_level):
    return
  part = "tensor_scale" if subject.inputs[0].spec.two_level else "scale"
  found = held.get(f"{subject.name}.{INPUT}.{part}")
  if subject.inputs[0].amax is None:
    return
  wanted = input_scales(subject.inputs[0])
  rest.bits(f"{subject.label}.{part}", wanted, None if found is None else np.asarray(to_array(found), np.float32).reshape(()))


# -- runtimes ----------------------------------------------------------------------------------------------------------------------


def run_onnxruntime(job: Job) -> list[Check]:
  """The graph in onnxruntime, without rewriting it."""
  package("onnxruntime", "this client")
  return _run(job, lambda model, given: onnx_run._onnxruntime(model, given, optimize=False))


def run_reference(job: Job) -> list[Check]:
  """The graph in onnx's own evaluator, which has every type."""
  package("onnx.reference", "this client")
  return _run(job, onnx_run._reference)


def _run(job: Job, evaluate: Any) -> list[Check]:
  model = load(job.place)
  found = {f"{subject.name}.{role}": subject for subject in job.subjects() for role in (WEIGHT, INPUT)}
  places = _expose(model, set(found))
  names = [value.name for value in model.graph.output]
  weights, seen = Tally("weights"), Tally("inputs")
  codes, pairs = outputs.Codes(job.relative), []
  sums = {"rounded": 0, "ties": 0}
  for index, args in enumerate(job.batches):
    values = dict(zip(names, evaluate(model, _given(model, args)), strict=True))
    if index == 0:
      _weights(job, found, places, values, weights)
    _inputs(job, index, found, places, values, seen, sums, codes)
    pairs.append((job.run(index).outputs, np.asarray(values[names[0]], np.float32)))
  texts = (
    f"{sums['rounded']:,} one rounding of a product apart, {sums['ties']:,} codes at a tie fell otherwise" if any(sums.values()) else ""
  )
  logits = pairs[0][0].ndim == 3 and pairs[0][0].shape[-1] > 1 and _is_language_model(job)
  quantized = seen.check(note=texts)
  if job.narrow:
    return [weights.check(), quantized, Check("outputs", NOT_CHECKED, note=job.narrow)]
  agree = quantized.status != DIFFERS
  return [weights.check(), quantized, outputs.check(pairs, codes, job.relative, agree, logits=logits)]


def _is_language_model(job: Job) -> bool:
  """Whether outputs are one number per token of the vocabulary: the last axis is as long as the table of embeddings."""
  shapes = job.simulation.source.parameter_shapes()
  width = job.run(0).outputs.shape[-1]
  return any(job.simulation.source.is_table(n) and shapes.get(f"{n}.weight", (0,))[0] == width for n in job.simulation.source.weighted())


_CALL = re.compile(r"#\d+$")


def _expose(model: Any, wanted: set[str]) -> dict[str, tuple[str, str | None]]:
  """Make quantizers' results, and what input quantizers are given, outputs of the graph. Nodes are named "<quantizer>/<what>".

  Returns:
    quantizer -> (name of its result, name of what it is given).
  """
  onnx = package("onnx", "an ONNX file")
  constants = {tensor.name for tensor in model.graph.initializer}
  nodes: dict[str, list[Any]] = {}
  for node in model.graph.node:
    owner = node.name.rpartition("/")[0]
    if owner in wanted and not _CALL.search(node.name):
      nodes.setdefault(owner, []).append(node)
  places: dict[str, tuple[str, str | None]] = {}
  for owner, own in nodes.items():
    made = {name for node in own for name in node.output}
    used = [name for node in own for name in node.input if name]
    results = [name for node in own for name in node.output if name not in used]
    outside = [name for name in used if name not in made and name not in constants]
    if len(set(results)) == 1:
      places[owner] = results[0], outside[0] if outside and owner.endswith(INPUT) else None
  have = {value.name for value in model.graph.output} | {value.name for value in model.graph.input}
  for name in dict.fromkeys(part for pair in places.values() for part in pair if part is not None):
    if name not in have:
      model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
  return places


def _given(model: Any, args: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
  kinds = {7: np.int64, 6: np.int32}
  if len(model.graph.input) != len(args):
    raise ValueError(f"the graph takes {len(model.graph.input)} inputs ({', '.join(v.name for v in model.graph.input)}), got {len(args)}")
  return {
    value.name: np.asarray(array).astype(kinds.get(value.type.tensor_type.elem_type, np.asarray(array).dtype))
    for value, array in zip(model.graph.input, args, strict=True)
  }


def _weights(job: Job, found: dict[str, Subject], places: dict[str, Any], values: dict[str, Any], weights: Tally) -> None:
  for name, subject in found.items():
    if not name.endswith(WEIGHT) or len(subject.weights) > 1:
      continue
    exact = _turned(job, subject, np.asarray(core.dequantize(codes_of(job.simulation.source, subject))))
    if name not in places:
      weights.wrong(f"{subject.label} (not in the graph)", exact.size)
      continue
    weights.values(subject.label, exact, np.asarray(values[places[name][0]], np.float32))


def _inputs(
  job: Job,
  index: int,
  found: dict[str, Subject],
  places: dict[str, Any],
  values: dict[str, Any],
  seen: Tally,
  sums: dict[str, int],
  codes: outputs.Codes,
) -> None:
  """Every quantized input of the client's own run, against the quantizer on what the client gave it; and the codes of both runs."""
  quantized: dict[str, np.ndarray] = {}
  theirs: dict[str, np.ndarray] = {}
  for name, subject in found.items():
    if not name.endswith(INPUT) or not subject.inputs:
      continue
    if name not in places or places[name][1] is None:
      seen.wrong(f"{subject.label} (the graph does not quantize this input)")
      continue
    result, given = (np.asarray(values[part], np.float32) for part in places[name])
    compared = inputs.compare(given, result, subject.inputs[0])
    seen.count(subject.label, compared.total, compared.different)
    seen.size(compared.largest)
    sums["rounded"] += compared.rounded
    sums["ties"] += compared.ties
    quantized[subject.label], theirs[subject.label] = result, given
  codes.add(job.subjects(), job.run(index).inputs, theirs, lambda subject, _: quantized[subject.label])
