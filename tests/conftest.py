"""Options and fixtures of all tests.

`pytest --device=cuda` runs the specification (tests/spec) on a GPU. A framework that is not installed fails its tests: the import
in the fixture raises, nothing skips. Whatever needs the network is switched off.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from core.conformance import Runtime

RUNTIMES = {
  "numpy": ("numpy", False),
  "torch": ("torch", False),
  "torch.compile": ("torch", True),
  "jax": ("jax", False),
  "jax.jit": ("jax", True),
}


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--least_compared", type=int, default=0, help="fail unless tests/spec compared this many values in each runtime")
  parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests/spec runs torch and jax")


def pytest_configure(config: pytest.Config) -> None:
  if config.getoption("--device") == "cpu":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Runtime:
  """One of the five runtimes, on the chosen device (numpy always on the CPU)."""
  backend, compiled = RUNTIMES[request.param]
  device = "cpu" if backend == "numpy" else request.config.getoption("--device")
  return Runtime(backend, compiled, device)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
  """Compiled programs of one file are of no use to the next one, and hundreds of them are gigabytes."""
  yield
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()
  gc.collect()


@pytest.fixture
def compared(record_property):
  """Call it with a number of values that were compared; the sum is printed at the end."""

  def add(count: int) -> None:
    record_property("compared", int(count))

  return add


def _compared(reporter) -> tuple[dict[str, int], dict[str, int]]:
  """Values compared, by folder of tests and, in tests/spec, by runtime."""
  folders: dict[str, int] = {}
  runtimes = dict.fromkeys(RUNTIMES, 0)
  for report in reporter.stats.get("passed", []) + reporter.stats.get("failed", []):
    values = [v for name, v in report.user_properties if name == "compared"] if report.when == "call" else []
    folder = "/".join(report.nodeid.split("::")[0].split("/")[:2])
    parameters = report.nodeid.partition("[")[2].rstrip("]")
    runtime = max((r for r in RUNTIMES if parameters == r or parameters.startswith(r + "-")), key=len, default=None)
    for value in values:
      folders[folder] = folders.get(folder, 0) + value
      if folder == "tests/spec" and runtime is not None:
        runtimes[runtime] += value
  return folders, runtimes


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
  """Skips for cost must not become skips of everything: with --least_compared, a runtime that compared too little fails the run."""
  least = session.config.getoption("--least_compared")
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  if not least or reporter is None or hasattr(session.config, "workerinput"):
    return
  if any(count < least for count in _compared(reporter)[1].values()) and session.exitstatus == pytest.ExitCode.OK:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
  folders, runtimes = _compared(terminalreporter)
  if folders:
    terminalreporter.write_sep("-", "values compared bit for bit")
    for folder, count in sorted(folders.items()):
      terminalreporter.write_line(f"{folder}: {count:,}")
  least = terminalreporter.config.getoption("--least_compared")
  for runtime, count in runtimes.items():
    if any(runtimes.values()) or least:
      short = f", fewer than the {least:,} that are required" if count < least else ""
      terminalreporter.write_line(f"tests/spec on {runtime}: {count:,}{short}")
