"""Opens models of transformers from local folders; what is wrong with one is said in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_kosmosg.config.untrusted_folders import check_model_config
from megatron_kosmosg.foreign_files import read_json

Loaded = TypeVar("Loaded")
CONFIG_FILE = "config.json"


def model_type(folder: Path) -> str:
    """The name by which config.json calls the model. Raises ValueError where the folder is no
    model's."""
    try:
        return str(read_json(folder / CONFIG_FILE)["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not a model folder of transformers: {CONFIG_FILE}: {error}"
        ) from error


def check_type(folder: Path, option: str, expected: str, example: str) -> None:
    """Raises ValueError unless the folder holds a model of this type."""
    found = model_type(folder)
    if found != expected:
        raise ValueError(f"{option} {folder} is of type {found}; needed: {expected}, as {example}")


def loaded(load: Callable[..., Loaded], folder: Path, **options: Any) -> Loaded:
    """What `load(folder)` returns, from local files. Raises ValueError with the first line of what
    failed."""
    if (folder / CONFIG_FILE).is_file():
        check_model_config(folder / CONFIG_FILE)
    try:
        return load(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
