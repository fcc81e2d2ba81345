"""The demonstration: one checkpoint, quantized alike in PyTorch and in JAX, in one table; then the proof that the two are equal.

  python -m experiments.demo --out=results/demo

Three steps, each an experiment of its own that takes many more flags: `experiments.ptq` with six presets in both backends,
`experiments.compare_backends` in float32, and the same with a float64 carrier, where every activation code of the model is compared.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from experiments import cli, compare_backends, ptq
from experiments.cli import flag


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags."""

  model: str = flag("smollm2", "smollm2, or a Hugging Face folder of Llama architecture")
  configs: tuple[str, ...] = flag(
    (
      "INT8_DEFAULT_CFG",
      "FP8_DEFAULT_CFG",
      "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
      "NVFP4_DEFAULT_CFG",
      "MXFP8_DEFAULT_CFG",
      "MXFP4_DEFAULT_CFG",
    ),
    "configurations of the table",
  )
  compare: tuple[str, ...] = flag(("INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"), "configurations compared quantizer by quantizer, in float32")
  prove: tuple[str, ...] = flag(("NVFP4_DEFAULT_CFG",), "configurations compared code by code, with a float64 carrier")
  samples: int = flag(4, "number of calibration windows, and of evaluation windows")
  tokens: int = flag(128, "tokens in a window, and tokens of the comparisons")
  text_file: str = flag("", "a UTF-8 file in place of Python's documentation")
  out: str = flag("results/demo", "folder for ptq.csv, ptq.md, ptq.json, float32/compare.json and float64/compare.json")


def run(options: Options) -> int:
  """Run the three steps and print their tables.

  Args:
    options: flags.

  Returns:
    0, or 1 where something that must be equal is not.
  """
  start = time.perf_counter()
  shared = {"model": options.model, "text_file": options.text_file}
  windows = {"calib_samples": options.samples, "calib_tokens": options.tokens}
  table = ptq.Options(
    **shared,
    **windows,
    configs=options.configs,
    eval_samples=options.samples,
    eval_tokens=options.tokens,
    batch_samples=options.samples,
    out=options.out,
  )
  print(f"1. {len(options.configs)} presets, PyTorch and JAX (a few minutes on two cores)", flush=True)
  ptq.show(table, ptq.run(table))
  status = 0
  for step, carrier, configs in ((2, "float32", options.compare), (3, "float64", options.prove)):
    print(f"\n{step}. {', '.join(configs)}: the two backends compared, {carrier} outside the quantizers", flush=True)
    settings = compare_backends.Options(
      **shared,
      **windows,
      config=configs,
      tokens=options.tokens,
      window_tokens=options.tokens,
      carrier=carrier,
      out=str(Path(options.out) / carrier) if options.out else "",
    )
    document = compare_backends.run(settings)
    compare_backends.show(settings, document)
    status = max(status, 0 if document["passed"] else 1)
  print(f"\n{time.perf_counter() - start:.0f} s in all" + (f"; everything is in {options.out}" if options.out else ""))
  return status


if __name__ == "__main__":
  cli.main(Options, run)
