"""The README's Python blocks run as they stand."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.models
@pytest.mark.parametrize("block", [*BLOCKS[:3], pytest.param(BLOCKS[3], marks=pytest.mark.slow)], ids=["torch", "jax", "core", "artefacts"])
def test_block_runs(block: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  exec(compile(block, str(README), "exec"), {})


def test_blocks_were_found() -> None:
  assert len(BLOCKS) == 4
