"""What the cases share: commands to run, a small SentencePiece model, an exported folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import Commands
from tests.support.data_helpers import write_tokenizer
from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="session")
def commands(preloaded_python) -> Commands:
    """The repository's commands."""
    return Commands(preloaded_python.venv / "bin" / "python")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A SentencePiece model file of a few words."""
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A folder as `export-hf` writes it, of tiny models that images make a difference to."""
    folder = tmp_path_factory.mktemp("exported")
    tiny_pipeline(folder / "parts").save_pretrained(folder / "pipeline")
    return folder / "pipeline"
