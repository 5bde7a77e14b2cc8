"""What the cases share: commands to run, and a small SentencePiece model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import Commands
from tests.support.data_helpers import write_tokenizer


@pytest.fixture(scope="session")
def commands(preloaded_python) -> Commands:
    """The repository's commands."""
    return Commands(preloaded_python.venv / "bin" / "python")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A SentencePiece model file of a few words."""
    return write_tokenizer(tmp_path_factory.mktemp("model"))
