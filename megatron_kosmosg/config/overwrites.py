"""What a command writes never takes the place of what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_kosmosg.config.errors import ConfigError

FileId = tuple[int, int]
"""Device and inode: one file, whatever it is called. Names cannot tell, because of links and of
file systems that do not distinguish upper and lower case."""


def refuse_to_overwrite(outputs: Iterable[Path], inputs: Iterable[Path], option: str) -> None:
    """Raises ConfigError, naming both, when one of `outputs` is one of `inputs` or a folder that
    one of them lies in. To be called before anything is written.

    outputs: what is made anew, files and folders, there or not. inputs: files and folders; those
    that are not there are left to their readers. option: what to change, as "--output-prefix".
    """
    read: dict[FileId | None, Path] = {}
    places: set[Path] = set()
    for path in inputs:
        for place in (path, *path.resolve().parents):
            if place not in places:
                places.add(place)
                read.setdefault(_file_id(place), path)
    for output in outputs:
        found = _file_id(output)
        if found is not None and found in read:
            raise ConfigError(
                f"{output} would be written over {read[found]}, which is read; give another "
                f"{option}"
            )


def _file_id(path: Path) -> FileId | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
