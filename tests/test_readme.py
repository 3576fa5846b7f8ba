"""The README's own code, and its commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr


def test_there_are_two_commands_and_some_code() -> None:
    text = README.read_text()
    assert BLOCKS
    for marker, command in (("main", "pitools toy --policy gm"), ("tests", "python -m pytest")):
        block = re.search(rf"<!-- {marker} -->\n```sh\n(.*?)```", text, flags=re.DOTALL)
        assert block is not None
        assert command in block[1]
