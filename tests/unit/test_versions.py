"""Versions: what is installed, what the tests run with, what exported folders say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_kosmosg.conversion.model_card import TESTED

REPOSITORY = Path(__file__).parents[2]


def pinned(path: Path) -> dict[str, str]:
    """{name: version} of a file of `name==version`."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return dict(line.lower().split("==") for line in lines if line)


@pytest.fixture(scope="module")
def required() -> dict[str, Requirement]:
    """setup.py's requirements, by name."""
    taken = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **named: taken.update(named))
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return {found.name: found for found in map(Requirement, taken["install_requires"])}


@pytest.mark.parametrize("name", sorted(TESTED))
def test_the_bounds_are_what_is_tested(required, name: str) -> None:
    oldest, newest = TESTED[name]
    assert pinned(REPOSITORY / "tests" / "oldest_versions.txt")[name] == oldest
    assert pinned(REPOSITORY / "constraints.txt")[name] == newest
    lower = [bound for bound in required[name].specifier if bound.operator == ">="]
    assert [Version(bound.version) for bound in lower] == [Version(oldest)]
    assert required[name].specifier.contains(newest)


def test_ci_runs_the_oldest_versions() -> None:
    assert "tests/oldest_versions.sh" in (REPOSITORY / ".ci" / "run").read_text()
