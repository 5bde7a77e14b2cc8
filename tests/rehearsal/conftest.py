"""One process with a fake GPU serves all tests of the folder; they need a compiler, or CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kosmosg.rehearsal.cuda_guard import why_not
from tests.support.rehearsals import Rehearsals

_SECONDS = 900
"""The first test of the session also waits for the compiler and for the imports."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(_SECONDS))


@pytest.fixture(scope="session")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsals]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Rehearsals(tmp_path_factory.mktemp("rehearsals")) as rehearsals:
        yield rehearsals
