"""Memory and threads of a benchmark process.

A result of 32 MB is fresh memory in every call: the kernel hands out zeroed pages, and on many machines that costs more than the
arithmetic of a fake quantization and more than a copy into memory that exists already. Which library's allocator happens to hold on to its
memory would then decide the table. So the benchmarks restart themselves with glibc told to keep and reuse what is freed; `--fresh-memory`
leaves it as it is.
"""

from __future__ import annotations

import os
import sys

REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}
_MARK = "TWINQUANT_BENCHMARK_MEMORY"


def restart(module: str, arguments: list[str], fresh_memory: bool) -> None:
  """Replace this process by `python -m module arguments` with memory reuse, once. Must come before anything allocates much.

  Args:
    module: name for `-m`.
    arguments: its command line.
    fresh_memory: leave the allocator as it is.
  """
  if fresh_memory or os.environ.get(_MARK) or not sys.platform.startswith("linux"):
    return
  os.execve(sys.executable, [sys.executable, "-m", module, *arguments], os.environ | REUSE | {_MARK: "reused"})


def use_cores(count: int) -> int:
  """Restrict this process to its last `count` cores (0: all of them), for every library alike; must come before torch and jax are imported.

  On a machine that others use too, two threads wait for each other whenever one of them is interrupted; one core gives steadier ratios.

  Returns:
    How many it has now.
  """
  if not hasattr(os, "sched_setaffinity"):
    return os.cpu_count() or 1
  if count:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])
  return len(os.sched_getaffinity(0))


def memory() -> str:
  """Whether freed memory is "reused" or every result "fresh"."""
  return "reused" if os.environ.get(_MARK) else "fresh"


def torch_threads(count: int) -> None:
  """Let torch use every core this process may use (as XLA does), whatever OMP_NUM_THREADS says."""
  import torch

  torch.set_num_threads(count)
