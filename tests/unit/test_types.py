"""What a type checker says of the package: nothing, and whoever imports it sees its types.

The settings are [tool.basedpyright] in pyproject.toml. The whole package takes a minute on a quiet
core.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("basedpyright", reason="the type checker is in the `test` extra")

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "megatron_kosmosg"
USE = """\
from typing import reveal_type
from megatron_kosmosg import (
    KosmosGPipeline, SampleStore, __version__, build_stage, export_hf, fit, load_config
)
reveal_type(KosmosGPipeline)
reveal_type(SampleStore)
reveal_type(SampleStore("data/text").kind)
reveal_type(load_config("toy_align", []))
reveal_type(build_stage)
reveal_type(fit)
reveal_type(export_hf)
reveal_type(len(__version__))
"""
SEEN = (
    "type[KosmosGPipeline]",
    "type[SampleStore]",
    "str",
    "RunConfig",
    "-> Stage",
    "-> bool",
    "-> list[str]",
    "int",
)
"""How the type of each name above ends."""


def messages(folder: Path, python: str) -> list[dict[str, Any]]:
    """What the checker says of the project in `folder`, with the packages of `python`."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", python]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return json.loads(done.stdout)["generalDiagnostics"]


@pytest.mark.timeout(1800)
def test_the_package_has_no_wrong_type():
    found = [each for each in messages(REPOSITORY, sys.executable) if each["severity"] == "error"]
    shown = [
        f"{Path(each['file']).relative_to(PACKAGE)}:{each['range']['start']['line'] + 1}: "
        f"{each['message'].splitlines()[0]} ({each.get('rule', 'syntax')})"
        for each in found
    ]
    assert not shown, "\n".join([f"{len(shown)} errors", *shown])


def test_what_the_checker_is_told_to_ignore_has_a_reason_behind_it():
    ignored = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"#.*\b(type|pyright): ?ignore", line)
    ]
    unexplained = [line for line in ignored if not re.search(r"ignore\[[\w-]+\]  # \w+ \w+", line)]
    assert not unexplained, unexplained


def test_whoever_imports_the_package_sees_its_types(tmp_path):
    """An installed package, of which the checker knows what py.typed and its names promise; none
    of its own packages are there."""
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    (installed,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (installed / "megatron_kosmosg").symlink_to(PACKAGE)
    (tmp_path / "use.py").write_text(USE)
    settings = {"include": ["use.py"], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    said = messages(tmp_path, str(tmp_path / "env" / "bin" / "python"))
    revealed = [each["message"] for each in said if each["severity"] == "information"]
    assert len(said) == len(revealed) == len(SEEN), said
    for message, end in zip(revealed, SEEN, strict=True):
        assert message.endswith(f'{end}"'), message
