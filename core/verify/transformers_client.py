"""Client "transformers": the folder as transformers with compressed-tensors loads it on the CPU, in float32.

Three questions, each answered by the client's own code: are its weights the simulated ones, does it quantize what the layers are given as
the quantizers do, and does the whole model give the same log-probabilities. NVFP4 and MX weights leave the client's decompression in
bfloat16. For MX that is exact. For NVFP4 it is not: there the weights must be what the client's arithmetic makes of our codes and scales,
bit for bit, and log-probabilities are compared with the simulated weights put in place of the rounded ones; how much the rounding moves
them is reported beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

import core
from core import encoding, formats
from core.bits import divide
from core.export import gguf_layout, modelopt
from core.export.read import Artefact, read
from core.export.safetensors_file import to_bits, to_float
from core.export.source import Stage, Subject, codes_of
from core.quantize import QuantizedTensor
from core.verify import inputs, outputs
from core.verify.job import Job, package
from core.verify.numpy_client import unquantized
from core.verify.report import DIFFERS, NOT_CHECKED, WITHIN, Check, NotRun
from core.verify.tally import Tally

MODELOPT = (
  "transformers does not know this layout: it refuses NVFP4 and INT4, and reads FP8 and MXFP8 silently wrong (codes taken for weights, "
  "scales dropped), so that loading proves nothing; layout 'compressed-tensors' is for transformers"
)
HALF_ULP = 2.0**-8  # of bfloat16, which has 8 significant bits, relative to the value
DENSE = "this client runs asymmetric weights only dequantized when they are loaded, and leaves inputs in float then"
KNOWN = {
  "int8": "this client divides by 127.5 where dynamic INT8 inputs have bound 127; bound=127.5 on the input quantizer simulates it",
  "mxfp4": "this client rounds the shared exponent of MXFP4 inputs by another rule",
}


def run(job: Job) -> list[Check]:
  """Load the folder and compare.

  Raises:
    NotRun: the packages are missing, or the client has no reader for it.
    ValueError: the folder is damaged.
  """
  artefact = read(job.place)
  if artefact.layout == modelopt.NAME:
    raise NotRun(MODELOPT)
  tokens = job.tokens()
  torch, transformers = package("torch", "this client"), package("transformers", "this client")
  in_gguf = artefact.layout == gguf_layout.NAME
  for name in ("gguf", "accelerate") if in_gguf else ("compressed_tensors",):
    package(name, "this client")
  with _quiet(transformers), torch.no_grad():
    found = job.subjects()
    model, lost, lazy = _load(torch, transformers, artefact, found)
    seen = _inputs(torch, model, job, found) if lazy else Check("inputs", NOT_CHECKED, note=DENSE)
    stuck = "" if in_gguf else _decompress(torch, model, tokens[0])
    if stuck:
      return [lost, seen, Check("weights", DIFFERS, note=f"the client cannot decompress them: {stuck}")]
    checks = [lost, seen, _weights(torch, model, job, found), _unquantized(model, artefact, job, found)]
    reason = job.narrow or (DENSE if not lazy and any(subject.inputs for subject in found) else "")
    if reason:
      return [*checks, Check("log-probabilities", NOT_CHECKED, note=reason)]
    return [*checks, _outputs(torch, model, job, found, tokens, seen.status != DIFFERS)]


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
  """Without progress bars and warnings: what is wrong is in the report."""
  logging = transformers.utils.logging
  level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  try:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.set_verbosity(level)
    if bars:
      logging.enable_progress_bar()


def _load(torch: Any, transformers: Any, artefact: Artefact, found: list[Subject]) -> tuple[Any, Check, bool]:
  """(the model, whether all tensors found their place, whether its inputs can be asked for)."""
  named = artefact.config.get("architectures")
  name = named[0] if isinstance(named, list) and named else None
  if not isinstance(name, str) or not hasattr(transformers, name):
    raise NotRun(f"config.json names the architecture {name!r}, which transformers does not have; export with source=")
  lazy = not any(subject.spec.zero_point for subject in found)  # of packed zero points the client expects another shape, unless dense
  if artefact.layout == gguf_layout.NAME:
    options: dict[str, Any] = {"gguf_file": gguf_layout.FILE}
  else:
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=not lazy)}
  model, info = getattr(transformers, name).from_pretrained(
    str(artefact.directory),
    **options,
    dtype=torch.float32,
    local_files_only=True,
    output_loading_info=True,
  )
  tally = Tally("tensors placed")
  tally.count("", len(artefact.layers) + len(artefact.floats), 0)
  for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    for key in sorted(map(str, info.get(what) or ())):
      tally.wrong(f"{key} ({what.partition('_')[0]})")
  return model.eval(), tally.check(), lazy


# -- weights -----------------------------------------------------------------------------------------------------------------------


def _decompress(torch: Any, model: Any, ids: np.ndarray) -> str:
  """Let the client decompress, which it does when it is first called; what went wrong, or ""."""
  try:
    model(torch.from_numpy(ids[:1, :1].astype(np.int64)))
  except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
    # it multiplies float32 inputs with the bfloat16 weights that it made: `_weights` makes them float32
    if "same dtype" not in str(error):
      return f"{type(error).__name__}: {str(error)[:200]}"
  # tensors held by its offloading cannot change their type
  package("compressed_tensors.offload", "this client").remove_dispatch(model, onload_tensors=True)
  return ""


def _weights(torch: Any, model: Any, job: Job, found: list[Subject]) -> Check:
  """The client's dense weights; they are float32 and, where the client rounds, the exact ones afterwards. Its own are kept aside."""
  tally, bound, largest = Tally("weights"), True, 0.0
  rounded = False
  for subject in found:
    module = _module(model, subject.label)
    held = getattr(module, "weight", None)
    if held is None:
      tally.wrong(f"{subject.label} (the client has no weight)", int(np.prod(subject.shape)))
      continue
    own = held.detach().float().numpy().copy()
    made = codes_of(job.simulation.source, subject)
    exact = np.asarray(core.dequantize(made))
    if made.spec.two_level:
      tally.values(subject.label, through_bfloat16(made), own)
      apart = np.abs(own - exact)
      bound, largest, rounded = bound and bool((apart <= HALF_ULP * np.abs(exact)).all()), max(largest, float(apart.max(initial=0.0))), True
    else:
      tally.values(subject.label, exact, own)
    module.weight = torch.nn.Parameter(torch.from_numpy(own), requires_grad=False)
  found_check = tally.check()
  if not rounded or found_check.status == DIFFERS:
    return found_check
  note = (
    "what its arithmetic, which ends in bfloat16, makes of our codes and scales, bit for bit; from the simulated weights at most 2^-8 away"
  )
  return dataclasses.replace(found_check, status=WITHIN if bound else DIFFERS, largest=largest, note=note)


def _unquantized(model: Any, artefact: Artefact, job: Job, found: list[Subject]) -> Check:
  """The client's other tensors, which are those of the file in float32."""
  tally = Tally("unquantized tensors")
  source, held = job.simulation.source, model.state_dict()
  for text, name in unquantized(source, found, artefact).items():
    if text not in held or text not in artefact.floats:
      tally.wrong(f"{text} (missing)")
      continue
    kind = artefact.dtype(text)
    wanted = to_float(to_bits(source.tensor(name), kind), kind).astype(np.float32)
    tally.values(text, wanted, held[text].detach().float().numpy())
  return tally.check()


def through_bfloat16(q: QuantizedTensor) -> np.ndarray:
  """An NVFP4 weight as compressed-tensors computes it: level * (block scale / global scale), rounded to bfloat16. float32."""
  shared = divide(np.ones((), np.float32), np.asarray(q.tensor_scale, np.float32))
  block = np.asarray(divide(np.asarray(encoding.decode(np.asarray(q.scale), formats.E4M3)), shared))
  levels = np.asarray(encoding.decode(np.asarray(q.codes).astype(np.int32), formats.E2M1))
  values = levels.reshape(*block.shape, -1) * block[..., None]
  return to_float(to_bits(values.reshape(q.shape), "BF16"), "BF16")


def _module(model: Any, name: str) -> Any:
  try:
    return model.get_submodule(name)
  except AttributeError:
    return None


# -- inputs ------------------------------------------------------------------------------------------------------------------------


def _quantized(torch: Any, module: Any, x: np.ndarray) -> np.ndarray | None:
  """What the client makes of a layer's input, or None where it leaves inputs alone."""
  scheme = getattr(module, "quantization_scheme", None)
  if scheme is None or scheme.input_activations is None:
    return None
  forward = package("compressed_tensors.quantization.lifecycle.forward", "this client").forward_quantize
  return forward(module, torch.from_numpy(np.array(x, np.float32)), "input", scheme.input_activations).float().numpy()


def _inputs(torch: Any, model: Any, job: Job, found: list[Subject]) -> Check:
  """Every layer's input of the simulated run, quantized by the client."""
  tally = Tally("inputs")
  rounded = ties = 0
  known = set()
  unseen = False
  for subject in found:
    module = _module(model, subject.label)
    if not subject.inputs:
      scheme = getattr(module, "quantization_scheme", None)
      if scheme is not None and scheme.input_activations is not None:
        tally.wrong(f"{subject.label} (the client quantizes an input that the model does not)")
      continue
    for index in range(len(job.batches)):
      x = job.run(index).inputs.get(subject.label)
      if x is None:
        unseen = True
        continue
      y = None if module is None else _quantized(torch, module, x)
      if y is None:
        tally.wrong(f"{subject.label} (the client does not quantize this input)", x.size)
        continue
      result = inputs.compare(x, y, subject.inputs[0])
      tally.count(subject.label, result.total, result.different)
      tally.size(result.largest)
      rounded, ties = rounded + result.rounded, ties + result.ties
      known |= {_known(subject.inputs[0])} if result.different else set()
  if not any(subject.inputs for subject in found) and not tally.compared:
    return Check(tally.name, NOT_CHECKED, note="the model quantizes no inputs")
  texts = sorted(text for text in known if text)
  texts += [f"{rounded:,} one rounding of a product apart, {ties:,} codes at a tie fell otherwise"] if rounded or ties else []
  texts += ["some layers' inputs could not be seen (stacked layers)"] if unseen else []
  return tally.check(note="; ".join(texts))


def _known(stage: Stage) -> str:
  spec = stage.spec
  if isinstance(spec.element, formats.IntFormat) and spec.dynamic and spec.element_bound != 127.5:
    return KNOWN["int8"]
  return KNOWN["mxfp4"] if spec.is_mx and spec.element == formats.E2M1 else ""


# -- the whole model ---------------------------------------------------------------------------------------------------------------


def _outputs(torch: Any, model: Any, job: Job, found: list[Subject], tokens: list[np.ndarray], agree: bool) -> Check:
  """Log-probabilities of every prompt, and the codes that fell otherwise on the way."""
  pairs, moved, codes = [], 0.0, outputs.Codes(job.relative)
  rounds = any(subject.spec.two_level for subject in found)
  for index, ids in enumerate(tokens):
    if rounds:
      own = _call(torch, model, ids)
      held = _put_exact(torch, model, job, found)
    got, seen = _watched(torch, model, found, ids)
    if rounds:
      moved = max(moved, outputs.apart(own, got))
      for subject, weight in held:
        _module(model, subject.label).weight = weight
    wanted = job.run(index)
    codes.add(found, wanted.inputs, seen, lambda subject, x: _quantized(torch, _module(model, subject.label), x))
    pairs.append((wanted.outputs, got))
  note = f"with the simulated weights in place; through its bfloat16 they move by up to {moved:.2g}" if rounds else ""
  return outputs.check(pairs, codes, job.relative, agree, note)


def _put_exact(torch: Any, model: Any, job: Job, found: list[Subject]) -> list[tuple[Subject, Any]]:
  """Replace the weights that the client rounded by the simulated ones; what was there."""
  held = []
  for subject in found:
    module = _module(model, subject.label)
    if subject.spec.two_level and module is not None:
      held.append((subject, module.weight))
      exact = np.array(core.dequantize(codes_of(job.simulation.source, subject)), np.float32)
      module.weight = torch.nn.Parameter(torch.from_numpy(exact), requires_grad=False)
  return held


def _call(torch: Any, model: Any, ids: np.ndarray) -> np.ndarray:
  result = model(torch.from_numpy(ids.astype(np.int64)))
  for name in ("logits", "last_hidden_state"):
    if getattr(result, name, None) is not None:
      return getattr(result, name).float().numpy()
  raise NotRun(f"the client's model returns {type(result).__name__}, without logits")


def _watched(torch: Any, model: Any, found: list[Subject], ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(outputs, what the layers with a quantized input were given)."""
  seen: dict[str, np.ndarray] = {}
  handles = []
  for subject in found:
    module = _module(model, subject.label)
    if subject.inputs and module is not None:
      hook = lambda _, args, name=subject.label: seen.__setitem__(name, args[0].float().numpy().copy())  # noqa: E731
      handles.append(module.register_forward_pre_hook(hook))
  try:
    return _call(torch, model, ids), seen
  finally:
    for handle in handles:
      handle.remove()
