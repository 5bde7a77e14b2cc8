"""Files of other people: read up to a size, parsed up to a depth, found only where they may be.

Each bound is far above what real files need and far below what ends a machine.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 512 << 20
"""Of a file that is read as a whole, such as an image."""
MAX_JSON_BYTES = 32 << 20
"""Of one JSON value. Parsed, it takes some twenty times as much memory at worst."""
MAX_JSON_DEPTH = 100
MAX_DIGITS = 40
"""Of a whole number; one of 128 bits has 39."""
MAX_FILES = 100_000
"""Below one folder of a model."""


class OutsideFolder(ValueError):
    """A file names another that lies where it may not point to."""


def inside(folder: Path, name: str, also: Path | None = None) -> Path:
    """The path `folder / name`. Raises OutsideFolder unless it lies in `folder`, or in `also`.

    What counts is the name: a link inside the folder may lead out of it, as published datasets and
    caches of downloads are folders of links. With `..` in the name, it is where it leads.
    """
    path = folder / name
    allowed = [place for place in (folder, also) if place is not None]
    if not any(_lies_in(path, place, ".." in Path(name).parts) for place in allowed):
        raise OutsideFolder(f"{name} lies outside {' and '.join(map(str, allowed))}")
    return path


def _lies_in(path: Path, folder: Path, leaves: bool) -> bool:
    if not leaves and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        return True
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All of it. Raises OSError for what is no file (a pipe, a device), and for one too large."""
    # Opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "Is no regular file", str(path))
        content = file.read(max_bytes + 1) if found.st_size <= max_bytes else b""
        if max(found.st_size, len(content)) > max_bytes:
            raise OSError(errno.EFBIG, f"Has more than {max_bytes >> 20} MiB", str(path))
    return content


def parse_json(data: bytes | str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value. Raises ValueError, also for one that is too long, too deep or has endless numbers:
    other code, ours or a library's, would fail on it in its own way."""
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes >> 20} MiB of JSON")
    try:
        value = json.loads(data, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    if _count_brackets(data) > MAX_JSON_DEPTH:  # else it cannot be that deep
        _check_depth(value)
    return value


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a file. Raises ValueError and OSError."""
    return parse_json(read_file(path, max_bytes), max_bytes)


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, more than {MAX_DIGITS}")
    return int(digits)


def _count_brackets(data: bytes | str) -> int:
    if isinstance(data, str):
        return data.count("[") + data.count("{")
    return data.count(b"[") + data.count(b"{")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        containers = [inner for inner in level if isinstance(inner, dict | list)]
        if not containers:
            return
        level = [
            inner
            for outer in containers
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")


def files_below(folder: Path) -> Iterator[Path]:
    """All files, through links, without those whose names or folders' names begin with a dot.

    Raises ValueError for more than MAX_FILES. A link to a folder that it lies in is not followed.
    """
    count = 0
    entered: dict[str, set[tuple[int, int]]] = {}
    """Of each folder, itself and those that it lies in."""
    for place, folders, names in os.walk(folder, followlinks=True):
        above = entered.pop(place, None) or {_identity(place)}
        kept = []
        for name in folders:
            path = os.path.join(place, name)
            identity = _identity(path)
            if not name.startswith((".", "__pycache__")) and identity not in above:
                entered[path] = above | {identity}
                kept.append(name)
        folders[:] = kept
        shown = [name for name in names if not name.startswith(".")]
        count += len(shown) + len(kept)
        if count > MAX_FILES:
            raise ValueError(f"{folder} holds more than {MAX_FILES:,} files, links followed")
        for name in shown:
            yield Path(place, name)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
