"""Versions: what is installed, what the tests run with, what exported folders and `doctor` say."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_kosmosg import unusable_packages
from megatron_kosmosg.cli import doctor
from megatron_kosmosg.conversion.model_card import TESTED

REPOSITORY = Path(__file__).parents[2]


PAGE = REPOSITORY / "docs" / "versions.md"
CORES = REPOSITORY / "docs" / "megatron_core.md"


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
def package() -> dict:
    """What setup.py tells setuptools."""
    taken = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **named: taken.update(named))
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return taken


@pytest.fixture(scope="module")
def required(package) -> dict[str, Requirement]:
    """setup.py's requirements, by name."""
    return {found.name: found for found in map(Requirement, package["install_requires"])}


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


def engine_of_the_extra(package: dict, python: str) -> Requirement:
    """TransformerEngine, as the extra `gpu` asks for it with that Python."""
    entries = [Requirement(entry) for entry in package["extras_require"]["gpu"]]
    marked = ((entry, entry.marker) for entry in entries)
    (found,) = (x for x, marker in marked if marker and marker.evaluate({"python_version": python}))
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_newest_transformer_engine_of_the_extra_is_the_tested_one(package, python) -> None:
    tested = Version(pinned(REPOSITORY / "constraints.txt", python)["transformer-engine"])
    taken = engine_of_the_extra(package, python).specifier
    assert taken.contains(tested)
    assert not taken.contains(f"{tested.major}.{tested.minor + 1}.0")


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_what_repairs_a_transformer_engine_is_what_the_extra_takes(package, python) -> None:
    expected = engine_of_the_extra(package, python).specifier
    assert SpecifierSet(unusable_packages.ENGINE[python]) == expected


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_docs_name_the_transformer_engine_that_is_tested(python) -> None:
    tested = pinned(REPOSITORY / "constraints.txt", python)
    row = f"| {python} | {tested['megatron-core']}"
    (line,) = (x for x in CORES.read_text(encoding="utf-8").splitlines() if x.startswith(row))
    assert f"| {tested['transformer-engine']} |" in line


def test_doctor_names_the_versions_of_the_constraints() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    found = {
        name: [line for line in lines if line.startswith(f"{name}==")] for name in doctor.TESTED
    }
    for name, span in doctor.TESTED.items():
        assert {line.partition(";")[0].partition("==")[2] for line in found[name]} == set(span)


def test_doctor_warns_of_versions_that_no_test_ran_with(monkeypatch) -> None:
    of_the_image = "2.10.0a0+b558c986e8.nv25.11"
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: of_the_image)
    lines = dict.fromkeys(doctor._versions())
    assert f"torch {of_the_image}; warning: tested is 2.13.0, others are not refused" in lines
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.13.1+cpu")
    assert "torch 2.13.1+cpu" in doctor._versions()


OF_THE_IMAGE = {
    "torch": "2.10.0a0+b558c986e8.nv25.11",
    "transformer_engine": "2.9.0+70f53666",
    "apex": "0.1",
    "nvidia_dali_cuda130": "2.0.0",
}
"""Built by the makers of a container, which PyPI's wheels must not replace."""


def planned(folder: Path, requirements: list[str]) -> subprocess.CompletedProcess:
    """pip's plan for an environment like this one with the packages of an image, without an index:
    what it would replace it cannot find."""
    for name, version in OF_THE_IMAGE.items():
        information = folder / "image" / f"{name}-{version}.dist-info"
        information.mkdir(parents=True, exist_ok=True)
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n"
        )
        (information / "INSTALLER").write_text("pip\n")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *requirements]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    return subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(folder / "image")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_container_keeps_its_torch_and_its_kernels(package, tmp_path) -> None:
    """The command of slurm/README.md: core and the extra `data`, without the constraints."""
    assert "pip install -e '.[data]'" in (REPOSITORY / "slurm" / "README.md").read_text()
    expected = [*package["install_requires"], *package["extras_require"]["data"]]
    done = planned(tmp_path, [*expected, "transformer-engine", "apex"])
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout
    assert f"Requirement already satisfied: torch>=2.6 in {tmp_path}" in done.stdout


def test_a_bound_at_the_version_of_an_image_would_replace_it(tmp_path) -> None:
    done = planned(tmp_path, ["torch>=2.10"])
    assert "Would install torch-" in done.stdout or "No matching distribution" in done.stderr
