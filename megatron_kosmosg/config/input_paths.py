"""What a relative path in a config file means, and which settings are such paths.

An input is looked for beside the file that names it, then in the current folder, then beside the
installed package. What a run writes is always relative to the current folder.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INPUT_PATHS = (
    "model.vision.path",
    "model.clip_text.path",
    "model.diffusion.path",
    "data.tokenizer_model",
    "data.blend.*.path",
    "data.heldout.*.path",
    "checkpoint.load",
    "evaluation.dino",
    "evaluation.clip",
    "logging.planned_gpu",
)
"""Settings that name what a run reads; datasets by their prefix, without a suffix."""

PACKAGE = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs"
"""The shipped configs."""


def is_input_path(key: str) -> bool:
    """Whether the setting of that dotted name is a file, folder or dataset that is read."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in INPUT_PATHS)


def locate_inputs(layer: dict[str, Any], file: Path) -> None:
    """Makes the input paths of one file's settings absolute, in place, where they are beside it.

    `file` may be a link: beside means beside what it points to.
    """
    for holder, name, key in _leaves(layer, ""):
        if isinstance(holder[name], str) and is_input_path(key):
            holder[name] = locate(holder[name], file.resolve().parent)


def locate(path: str, folder: Path) -> str:
    """The path of an input: below `folder` if it exists there, else as it was given."""
    if not path or os.path.isabs(path):
        return path
    if _exists(beside := Path(os.path.normpath(folder / path))):
        return str(beside)
    # Configs of earlier versions name the embedded files from the repository's root.
    if not _exists(Path(path)) and _exists(packaged := PACKAGE.parent / path):
        return str(packaged)
    return path


def is_same_input(one: Any, other: Any) -> bool:
    """Whether two values of an input path mean the same place on this machine."""
    if not isinstance(one, str) or not isinstance(other, str):
        return one == other
    places = [os.path.realpath(locate(path, Path.cwd())) for path in (one, other)]
    return places[0] == places[1]


def shipped_configs() -> list[str]:
    """Names of the shipped configs that are runs of their own."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "toy_base")


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder, or a dataset of that prefix."""
    return any(os.path.exists(f"{path}{end}") for end in ("", ".idx", ".json"))


def _leaves(section: dict[str, Any], prefix: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield section, name, f"{prefix}{name}"
