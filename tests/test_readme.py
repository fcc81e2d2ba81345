"""The README's Python blocks run as they stand."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.models
@pytest.mark.parametrize("block", BLOCKS, ids=["torch", "jax", "core"])
def test_block_runs(block: str) -> None:
  exec(compile(block, str(README), "exec"), {})


def test_blocks_were_found() -> None:
  assert len(BLOCKS) == 3
