"""Client "modelopt": weights of ModelOpt's own layout as ModelOpt's own tensor classes dequantize them, on the CPU.

The classes take the tensors of the file as they are (`modelopt.torch.quantization.qtensor`). For INT4 the release has a writer of the
layout and no reader: there its packer is given the simulated weights, and must write the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import core
from core.export import modelopt
from core.export.gguf_file import GgufFile
from core.export.read import open_files, read
from core.export.safetensors_file import File
from core.export.source import Subject, codes_of
from core.quantize import QuantizedTensor, step_of
from core.verify.job import Job, package
from core.verify.report import NOT_CHECKED, Check, NotRun
from core.verify.tally import Tally

QTENSOR = "modelopt.torch.quantization.qtensor"


def run(job: Job) -> list[Check]:
  """Dequantize every layer by ModelOpt and compare.

  Raises:
    NotRun: the package is missing, or the artefact is in another layout.
    ValueError: the folder is damaged.
  """
  artefact = read(job.place)
  if artefact.layout != modelopt.NAME:
    raise NotRun(f"ModelOpt has no reader of layout {artefact.layout!r}")
  torch = package("torch", "this client")
  qtensor = package(QTENSOR, "this client")
  files = {name: file for file in open_files(job.place) for name in file.entries}
  tally = Tally("weights")
  packed = 0
  for subject in job.subjects():
    if subject.label not in artefact.layers:
      tally.wrong(f"{subject.label} (missing)", int(np.prod(subject.shape)))
      continue
    made = codes_of(job.simulation.source, subject)
    algorithm = str(artefact.scheme(subject.label)["quant_algo"])
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
      _repacked(torch, subject, made, files, tally)
      packed += 1
      continue
    get = lambda suffix, name=subject.label: _tensor(torch, files, f"{name}.{suffix}")  # noqa: E731
    try:
      found = _READERS[algorithm](qtensor, torch, get, subject).float().numpy()
    except (RuntimeError, ValueError, AssertionError, KeyError, TypeError, IndexError) as error:
      tally.wrong(f"{subject.label} ({type(error).__name__}: {str(error)[:120]})", int(np.prod(subject.shape)))
      continue
    tally.values(subject.label, np.asarray(core.dequantize(made)), found)
  note = "its packer writes the bytes of the file from the simulated weights (it has no INT4 reader for this layout)" if packed else ""
  inputs = Check(
    "inputs", NOT_CHECKED, note="ModelOpt has no reader that runs a checkpoint; the client 'numpy' compares the inputs' scales"
  )
  return [tally.check(note=note), inputs]


def _tensor(torch: Any, files: Mapping[str, File | GgufFile], name: str) -> Any:
  """A tensor of the file in torch's type."""
  file = files.get(name)
  if file is None:
    raise ValueError(f"no tensor {name}")
  array = torch.from_numpy(np.array(file.read(name)))
  return array.view(torch.float8_e4m3fn) if file.entries[name].dtype == "F8_E4M3" else array


def _repacked(torch: Any, subject: Subject, made: QuantizedTensor, files: Mapping[str, File | GgufFile], tally: Tally) -> None:
  """INT4: ModelOpt's packer on the simulated weights; and the scales, which its packer is given."""
  pack = package("modelopt.torch.export.quant_utils", "this client").pack_int4_in_uint8
  scale = np.array(step_of(made), np.float32)
  size = subject.shape[-1] // scale.shape[-1]
  weight = torch.from_numpy(np.array(core.dequantize(made), np.float32))
  name = subject.label
  tally.bits(f"{name}.weight", pack(weight, torch.from_numpy(scale), size).numpy(), files[f"{name}.weight"].read(f"{name}.weight"))
  tally.bits(f"{name}.weight_scale", scale, files[f"{name}.weight_scale"].read(f"{name}.weight_scale"))


def _int8(qtensor: Any, torch: Any, get: Callable[[str], Any], subject: Subject) -> Any:
  q = qtensor.INT8QTensor(torch.Size(subject.shape), torch.float32, get("weight"))
  return q.dequantize(scale=get("weight_scale").reshape(-1, 1), dtype=torch.float32)


def _fp8(qtensor: Any, torch: Any, get: Callable[[str], Any], subject: Subject) -> Any:
  q = qtensor.FP8QTensor(torch.Size(subject.shape), torch.float32, get("weight"))
  scale = get("weight_scale")
  return q.dequantize(scale=scale.reshape(-1, 1) if scale.ndim == 1 and scale.numel() > 1 else scale, dtype=torch.float32)


def _fp8_blocks(qtensor: Any, torch: Any, get: Callable[[str], Any], subject: Subject) -> Any:
  q = qtensor.FP8QTensor(torch.Size(subject.shape), torch.float32, get("weight"))
  return q.dequantize(scale=get("weight_scale"), block_sizes={-1: 128, -2: 128}, dtype=torch.float32)


def _nvfp4(qtensor: Any, torch: Any, get: Callable[[str], Any], subject: Subject) -> Any:
  q = qtensor.NVFP4QTensor(torch.Size(subject.shape), torch.float32, get("weight"))
  scale = get("weight_scale")
  size = subject.shape[-1] // scale.shape[-1]
  return q.dequantize(scale=scale, double_scale=get("weight_scale_2"), block_sizes={-1: size}, dtype=torch.float32)


def _mxfp4(qtensor: Any, torch: Any, get: Callable[[str], Any], subject: Subject) -> Any:
  q = qtensor.MXFP4QTensor(torch.Size(subject.shape), torch.float32, get("weight"))
  return q.dequantize(scale=get("weight_scale"), block_sizes={-1: 32}, dtype=torch.float32)


def _mxfp8(qtensor: Any, torch: Any, get: Callable[[str], Any], subject: Subject) -> Any:
  q = qtensor.MXFP8QTensor(torch.Size(subject.shape), torch.float32, get("weight"))
  return q.dequantize(scale=get("weight_scale"), dtype=torch.float32)


_READERS: dict[str, Callable[[Any, Any, Callable[[str], Any], Subject], Any]] = {
  "W8A8_SQ_PER_CHANNEL": _int8,
  "W8A16": _int8,
  "FP8": _fp8,
  "FP8_PER_CHANNEL_PER_TOKEN": _fp8,
  "FP8_PB_WO": _fp8_blocks,
  "MXFP8": _mxfp8,
  "MXFP4": _mxfp4,
  "W4A8_MXFP4_FP8": _mxfp4,
} | dict.fromkeys(("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8"), _nvfp4)
