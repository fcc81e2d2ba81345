"""Client "vllm": log-probabilities of prompts by vLLM on the CPU, in the environment of another interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from core.export import gguf_layout
from core.verify.job import Job
from core.verify.outputs import log_softmax
from core.verify.report import DIFFERS, EQUAL, NOT_CHECKED, WITHIN, Check, NotRun

TOP = 20
SECONDS = 1800
RELATIVE = 2e-6  # its sums have another order than the simulation's; float32 runs with the same codes were measured at 7e-7
PROGRAM = Path(__file__).with_name("vllm_program.py")


def run(job: Job) -> list[Check]:
  """Compare the client's top tokens at every position.

  Raises:
    NotRun: no interpreter was given, or vLLM cannot be started or cannot run this artefact.
  """
  if not job.vllm_python:
    raise NotRun("no interpreter of an environment with vLLM was given (vllm_python=)")
  if job.narrow:
    raise NotRun(job.narrow)
  if (job.place / gguf_layout.FILE).is_file():
    raise NotRun("vLLM's reading of GGUF files was never tried here")
  prompts = [row.tolist() for ids in job.tokens() for row in ids]
  answer = _ask(job, prompts)
  compared, beyond, largest = 0, 0, 0.0
  scale = max(float(np.abs(job.run(index).outputs).max()) for index in range(len(job.batches)))
  relative = max(job.relative, RELATIVE) if job.tolerance is None else job.tolerance
  limit = 2 * relative * max(scale, 1.0)  # a log-probability is the difference of two numbers of that size
  rows = [row for index in range(len(job.batches)) for row in log_softmax(job.run(index).outputs)]
  for ours, theirs in zip(rows, answer["logprobs"], strict=True):
    for position, tokens in zip(ours, theirs, strict=False):
      for token, value in tokens.items():
        compared += 1
        difference = abs(float(value) - float(position[int(token)]))
        largest, beyond = max(largest, difference), beyond + (not difference <= limit)
  status = NOT_CHECKED if not compared else DIFFERS if beyond else WITHIN if largest else EQUAL
  note = f"vLLM {answer.get('version')}, {job.vllm_dtype}, its {TOP} likeliest tokens of every position; tolerance {limit:.2g}"
  if status == DIFFERS:
    note += "; it shows no codes, so a code that fell otherwise at a tie looks like this too: other prompts tell"
  return [Check("log-probabilities", status, compared, beyond, largest, (), note)]


def _ask(job: Job, prompts: list[list[int]]) -> dict[str, Any]:
  with tempfile.TemporaryDirectory(prefix="verify-vllm-") as folder:
    asked, answered = Path(folder) / "job.json", Path(folder) / "result.json"
    asked.write_text(json.dumps({"model": str(job.place.resolve()), "prompts": prompts, "dtype": job.vllm_dtype, "top": TOP}), "utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
      done = subprocess.run(
        [str(job.vllm_python), str(PROGRAM), str(asked), str(answered)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        cwd=folder,
      )
    except (OSError, subprocess.TimeoutExpired) as error:
      raise NotRun(f"{job.vllm_python} could not run ({error})") from error
    if done.returncode or not answered.is_file():
      lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
      errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
      raise NotRun(f"vLLM ended with status {done.returncode}: {(errors or lines)[-1][:300]}")
    found = json.loads(answered.read_text("utf-8"))
  if len(found.get("logprobs", ())) != len(prompts) or not np.isfinite(sum(v for p in found["logprobs"] for q in p for v in q.values())):
    raise NotRun("vLLM returned no log-probabilities")
  return found
