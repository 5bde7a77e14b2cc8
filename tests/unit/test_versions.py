"""Versions: what is installed, what the tests run with, what exported folders say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_kosmosg.conversion.model_card import TESTED

REPOSITORY = Path(__file__).parents[2]


PAGE = REPOSITORY / "docs" / "versions.md"


def pinned(path: Path, python: str = "3.11") -> dict[str, str]:
    """{name: version} of a file of `name==version`, as that Python reads it."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    found = map(Requirement, filter(None, lines))
    return {
        canonicalize_name(entry.name): str(entry.specifier).removeprefix("==")
        for entry in found
        if entry.marker is None or entry.marker.evaluate({"python_version": python})
    }


def table(required: dict[str, Requirement]) -> list[str]:
    """Every package that setup.py always installs: its bounds, and the versions of the tests."""
    lines = ["| package | setup.py | oldest tested | Python 3.11 | Python 3.12 |", "|---" * 5 + "|"]
    oldest = pinned(REPOSITORY / "tests" / "oldest_versions.txt")
    tested = [pinned(REPOSITORY / "constraints.txt", python) for python in ("3.11", "3.12")]
    for name in sorted(required):
        newest = [versions[canonicalize_name(name)] for versions in tested]
        bounds = str(required[name].specifier) or "any"
        cells = [name, bounds, oldest.get(name, newest[0]), *newest]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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


def test_the_table_of_the_docs_is_of_these_versions(required) -> None:
    written = PAGE.read_text(encoding="utf-8").splitlines()
    first = written.index(table(required)[0])
    assert written[first : written.index("", first)] == table(required)


def test_ci_runs_the_oldest_versions() -> None:
    assert "tests/oldest_versions.sh" in (REPOSITORY / ".ci" / "run").read_text()
