"""Run by the interpreter of an environment with vLLM, as a file and with nothing of this package: log-probabilities of prompts as JSON.

  python vllm_program.py job.json result.json

The job: {"model": folder, "prompts": [[ids]], "dtype": "float32", "top": 20}. The result: {"version", "logprobs": [[{id: logprob}]]},
for every position but the first.
"""

import importlib
import json
import os
import sys


def main(job_path, result_path):
  for key, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
  }.items():
    os.environ.setdefault(key, value)
  with open(job_path, encoding="utf-8") as file:
    job = json.load(file)
  vllm = importlib.import_module("vllm")
  longest = max(len(ids) for ids in job["prompts"])
  engine = vllm.LLM(
    model=job["model"],
    dtype=job["dtype"],
    enforce_eager=True,
    skip_tokenizer_init=True,
    max_model_len=max(longest + 8, 64),
    enable_prefix_caching=False,
  )
  sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=job["top"], detokenize=False)
  answers = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling)
  found = []
  for answer in answers:
    positions = answer.prompt_logprobs[1:]
    found.append([{str(token): held.logprob for token, held in position.items()} for position in positions])
  aside = result_path + ".tmp"
  with open(aside, "w", encoding="utf-8") as file:
    json.dump({"version": str(getattr(vllm, "__version__", "unknown")), "logprobs": found}, file)
  os.replace(aside, result_path)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2])
