"""The published vectors on five runtimes.

numpy and torch run every case. The others compile each specification and shape anew, so by default they run the cases that add a rule;
`-m slow` runs the rest there too.
"""

from __future__ import annotations

import pytest

from core.conformance import names, run
from tests.golden import make_vectors


def _first_of_each_spec(name: str):
  """The first case of every specification of a file, in three widths of integers and two formats of the granularity file."""
  seen: list[dict] = []

  def select(case: dict) -> bool:
    spec = {k: v for k, v in case["spec"].items() if k != "pad"}
    element = spec["element"]
    if (
      spec in seen
      or (name == "int" and element["bits"] not in (2, 4, 8))
      or (name == "granularity" and case["name"][:4] not in ("INT8", "E4M3"))
    ):
      return False
    seen.append(spec)
    return True

  return select


def _selection(runtime, name: str):
  if runtime.backend == "numpy" or runtime.name == "torch":
    return None
  if runtime.name == "jax.jit":
    return _first_of_each_spec(name)
  wanted = {
    "int": ("UINT8, grid",),
    "mx_e2m1": ("block 32, even",),
    "nvfp4": ("static, tensor amax 150",),
    "double_scale": ("NF4 block 16",),
    "int_zero_point": ("UINT8 zero point, rows",),
    "stochastic": ("E2M1, special",),
  }
  if runtime.name == "jax":
    wanted |= {"granularity": ("INT8, 4x4 tiles", "E4M3, axis 0"), "nvfp4_four_over_six": ("equal errors",)}
  return lambda case: case["name"].startswith(wanted.get(name, "-"))


def _check(runtime, name: str, select, compared) -> None:
  for result in run(runtime, [name], select):
    if not result.cases:
      pytest.skip("runs in test_all_vectors (slow): every specification is compiled anew")
    compared(result.compared)
    assert not result.failures, "\n".join(result.failures[:20])


@pytest.mark.parametrize("name", names())
def test_vectors(runtime, name, compared):
  _check(runtime, name, _selection(runtime, name), compared)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_all_vectors(runtime, name, compared):
  _check(runtime, name, None, compared)


def test_vectors_are_what_the_script_writes():
  different = [str(path) for path, text in make_vectors.files().items() if path.read_text() != text]
  assert not different, f"run `python -m tests.golden.make_vectors`; differing: {different}"
