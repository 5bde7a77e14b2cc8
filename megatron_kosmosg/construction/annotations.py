"""Captions, entities and masks that the user has already: one JSONL file, found by image.

    {"key": .., "caption": .., "entities": [{"text", "span", "mask"}, ...]}

`key` (or Open Images' `image_id`) is the image's name without its ending. Each step takes what it
needs: `caption`; `entities` with `text` and perhaps `span`, or plain strings; the same with `mask`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_kosmosg.construction.sources import plain_key
from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.foreign_files import (
    MAX_JSON_BYTES,
    OutsideFolder,
    inside,
    parse_json,
    read_file,
)

KEY_NAMES = ("key", "image_id")


class Annotations:
    """A file of annotations, indexed by key; of several lines for an image the first counts."""

    def __init__(self, path: Path, image_root: str | None = None) -> None:
        """Reads the file once. Raises ValueError, naming the line, where it cannot be used.

        Args:
            image_root: another folder in which masks may lie, besides that of the file.
        """
        self.path = path
        self._also = None if image_root is None else Path(image_root)
        self._offsets: dict[str, int] = {}
        offset = 0
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(MAX_JSON_BYTES + 1), b"")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    key = plain_key(_key(_parse(line, f"{path}:{number}"), f"{path}:{number}"))
                    self._offsets.setdefault(key, offset)
                offset += len(line)
        if not self._offsets:
            raise ValueError(f"{path} holds no annotations")

    def find(self, key: str) -> dict[str, Any]:
        """The annotation of an image, by its key or its file's name. Raises Rejected where there
        is none."""
        key = plain_key(key)
        if key not in self._offsets:
            example = next(iter(self._offsets))
            raise Rejected(f"not in {self.path.name}", f"a key there is {example!r}")
        with self.path.open("rb") as file:
            file.seek(self._offsets[key])
            return _parse(file.readline(MAX_JSON_BYTES + 1), str(self.path))

    def file(self, name: str) -> bytes:
        """A file that an annotation names. Raises Rejected, also where it lies elsewhere."""
        try:
            return read_file(inside(self.path.parent, name, self._also))
        except OutsideFolder as error:
            detail = f"{error}; --image-root FOLDER allows one more"
            raise Rejected("mask lies outside the folder of the annotations", detail) from None
        except (OSError, ValueError, TypeError) as error:
            raise Rejected("mask cannot be read", f"{name}: {error}") from error


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{place} is not a JSON object")
    return fields


def _key(fields: dict[str, Any], place: str) -> str:
    for name in KEY_NAMES:
        if fields.get(name) is not None:
            return str(fields[name])
    raise ValueError(f"{place} has neither of the fields {' and '.join(KEY_NAMES)}")
