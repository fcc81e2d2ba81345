"""Options and fixtures of all tests.

`pytest --device=cuda` runs the specification (tests/spec) on a GPU. A framework that is not installed fails its tests: the import
in the fixture raises, nothing skips. Whatever needs the network is switched off.
"""

from __future__ import annotations

import os

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


@pytest.fixture
def compared(record_property):
  """Call it with a number of values that were compared; the sum is printed at the end."""

  def add(count: int) -> None:
    record_property("compared", int(count))

  return add


def pytest_terminal_summary(terminalreporter) -> None:
  counts: dict[str, int] = {}
  for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
    for name, value in report.user_properties if report.when == "call" else ():
      if name == "compared":
        folder = "/".join(report.nodeid.split("::")[0].split("/")[:2])
        counts[folder] = counts.get(folder, 0) + value
  if counts:
    terminalreporter.write_sep("-", "values compared bit for bit")
    for folder, count in sorted(counts.items()):
      terminalreporter.write_line(f"{folder}: {count:,}")
