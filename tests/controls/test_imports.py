"""What a package drags in, seen by a fresh interpreter; and that these checks can fail."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FRAMEWORKS = ("torch", "jax", "jaxlib", "flax", "optax", "absl", "ml_dtypes", "scipy", "torch_backend", "jax_backend", "experiments")
FORBIDDEN = {
  "core": FRAMEWORKS,
  "torch_backend": ("jax", "jaxlib", "flax", "jax_backend", "experiments"),
  "jax_backend": ("torch", "torch_backend", "experiments"),
}
PROBE = """
import json, sys, time
{before}
start = time.perf_counter()
{statement}
print(json.dumps([time.perf_counter() - start, sorted(set(m.split(".")[0] for m in sys.modules))]))
"""


def _loaded(statement: str, path: pathlib.Path = ROOT, before: str = "import numpy") -> tuple[float, set[str]]:
  """Seconds of a statement in a fresh interpreter, and the top-level modules that are loaded after it."""
  done = subprocess.run(
    [sys.executable, "-c", PROBE.format(statement=statement, before=before)],
    capture_output=True,
    text=True,
    cwd=path,
    check=True,
    timeout=120,
  )
  seconds, modules = json.loads(done.stdout.splitlines()[-1])
  return seconds, set(modules)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_stays_on_its_side(package):
  _, modules = _loaded(f"import {package}")
  assert not modules & set(FORBIDDEN[package])


def test_whole_of_core_imports_numpy_only():
  names = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "core").rglob("*.py") if p.name != "__main__.py")
  statement = "import importlib\nfor n in " + repr([n.removesuffix(".__init__") for n in names]) + ": importlib.import_module(n)"
  _, modules = _loaded(statement)
  assert not modules & (set(FRAMEWORKS) - {"scipy"})


def test_no_import_of_a_framework_is_written_in_core():
  """Not even inside a function: a framework comes with the caller's array, or by a name that the user gives."""
  import ast

  found = []
  for path in (ROOT / "core").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = (
        [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      )
      found += [f"{path.name}: {n}" for n in names if n.split(".")[0] in ("torch", "jax", "jaxlib", "flax", "ml_dtypes")]
  assert not found


@pytest.mark.parametrize("culprit", ("torch", "jax"))
def test_an_import_in_core_would_be_caught(tmp_path, culprit):
  """The same probe on a copy of a package that does import the framework must see it."""
  package = tmp_path / "core"
  package.mkdir()
  (package / "__init__.py").write_text(f"import {culprit}\n")
  _, modules = _loaded("import core", tmp_path)
  assert culprit in modules & set(FORBIDDEN["core"])


def test_import_time(record_property, capsys):
  """Printed; the bound is ten times the budget of 0.1 s, so that a busy machine does not fail it."""
  seconds, _ = _loaded("import core")
  with capsys.disabled():
    print(f"\nimport core: {1000 * seconds:.0f} ms over numpy (budget 100 ms)")
  assert seconds < 1.0
