"""What holds for every test: its random numbers, its place, and what it needs of the machine.

What a test draws is seeded with its name: other numbers in each case, the same in every run.
`--shuffle SEED` runs the tests in another order. GPU and Slurm tests are skipped, with the reason,
where there is none; KOSMOSG_REQUIRE_SLURM=1 (as .ci/run sets it) lets Slurm tests fail instead.
"""

from __future__ import annotations

import os
import random
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support import local_slurm
from tests.support.preloaded_python import PreloadedPython


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run files, and the tests of each, in the order that this number draws"
    parser.addoption("--shuffle", type=int, metavar="SEED", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shuffle") is not None:
        _shuffle(items, config.getoption("--shuffle"))
    _skip_without_slurm([item for item in items if item.get_closest_marker("slurm")])
    needed = {item: _num_gpus_needed(item) for item in items}
    if not any(needed.values()):
        return
    import torch

    found = torch.cuda.device_count()
    for item, count in needed.items():
        if count > found:
            reason = f"needs {count} CUDA device(s), this machine has {found}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Before a fixture, whichever test asks for it first."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.name)


# Python before 3.11.4 has no filters; these archives are our own.
DATA_ALONE: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@pytest.fixture(scope="session")
def past(tmp_path_factory) -> Path:
    """The folder that the archives of tests/fixtures were packed from; no test writes there."""
    folder = tmp_path_factory.mktemp("past")
    for archive in sorted((Path(__file__).parent / "fixtures").glob("*/*.tar.xz")):
        with tarfile.open(archive) as members:
            members.extractall(folder, **DATA_ALONE)
    return folder


@pytest.fixture(scope="session")
def preloaded_python(tmp_path_factory):
    """What Slurm's jobs and the cases' commands run as Python."""
    with PreloadedPython(tmp_path_factory.mktemp("p")) as preloaded:
        yield preloaded


def _seed(name: str) -> None:
    """Numpy and torch only where something has imported them."""
    random.seed(name)
    number = zlib.crc32(name.encode())
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


def _shuffle(items: list[pytest.Item], seed: int) -> None:
    """A file's tests stay together, as they share what is slow to make."""
    dice = random.Random(seed)
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.split("::")[0], []).append(item)
    names = sorted(files)
    dice.shuffle(names)
    for tests in files.values():
        dice.shuffle(tests)
    items[:] = [item for name in names for item in files[name]]


def _skip_without_slurm(items: list[pytest.Item]) -> None:
    reason = local_slurm.why_not()
    if reason is not None and os.environ.get("KOSMOSG_REQUIRE_SLURM") != "1":
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"Slurm: {reason}"))


def _num_gpus_needed(item: pytest.Item) -> int:
    several = item.get_closest_marker("multi_gpu")
    if several is not None:
        return several.args[0]
    return 1 if item.get_closest_marker("gpu") is not None else 0
