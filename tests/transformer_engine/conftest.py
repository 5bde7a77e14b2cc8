"""One process with a fake GPU and TransformerEngine's Python serves all tests of the folder."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kosmosg.rehearsal.cuda_guard import why_not
from tests.support.rehearsals import Rehearsals

_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(_SECONDS))


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    """tests/transformer_engine.sh runs these tests, and fails without the package."""
    try:
        importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("TransformerEngine is laid over the environment by tests/transformer_engine.sh")
    if why_not() is not None:
        pytest.skip(why_not())


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsals]:
    folder = tmp_path_factory.mktemp("rehearsals")
    with Rehearsals(folder, "tests.support.engine_server") as rehearsals:
        yield rehearsals


@pytest.fixture(scope="session")
def without(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsals]:
    """The same machine, where TransformerEngine is hidden since it does not import."""
    with Rehearsals(tmp_path_factory.mktemp("without")) as rehearsals:
        yield rehearsals
