"""Every tool starts as the documents say: `tools/NAME.py`, without `python` before it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parents[2] / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_tool_has_its_run_bit_and_names_its_interpreter(tool: Path) -> None:
    assert os.access(tool, os.X_OK), f"chmod +x tools/{tool.name}"
    assert tool.read_text(encoding="utf-8").splitlines()[0] == "#!/usr/bin/env python3"


def test_there_are_tools() -> None:
    assert TOOLS
