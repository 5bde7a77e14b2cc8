"""COCO as KOSMOS-G's script uses it: which captions of val2014 are drawn, and from which noise."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.foreign_files import read_json

NUM_CAPTIONS = 30_000
AUTHORS_BATCH = 16
"""Captions that the authors draw together, with the seed set anew before each batch."""


@dataclass(frozen=True)
class CocoCaptions:
    """`captions_val2014.json`."""

    captions: tuple[str, ...]
    """All of them, in the file's order."""
    images: tuple[str, ...]
    """File names of all images, in the file's order."""

    def drawn(self, count: int = NUM_CAPTIONS) -> list[str]:
        """The captions by the authors' rule. Raises InputError where there are too few."""
        if count > len(self.captions):
            raise InputError(f"{count:,} captions are asked for; there are {len(self.captions):,}")
        return [self.captions[i] for i in caption_indices(len(self.captions), count)]


def caption_indices(num_captions: int, count: int = NUM_CAPTIONS) -> list[int]:
    """`random.seed(0); random.sample(annotations, count)`, as numbers of captions (captions, not
    images: one image may come twice)."""
    return random.Random(0).sample(range(num_captions), count)


def read_captions(path: Path) -> CocoCaptions:
    """Raises InputError for what is not a captions file of COCO."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--captions {path} cannot be read: {error}") from error
    captions, images = (
        _column(found, "annotations", "caption"),
        _column(found, "images", "file_name"),
    )
    if not captions or not images:
        raise InputError(
            f"--captions {path} has no `annotations` with a `caption` and `images` with a "
            "`file_name`; give COCO's annotations/captions_val2014.json"
        )
    return CocoCaptions(tuple(captions), tuple(images))


def authors_noise_row(index: int) -> int:
    """Row of the authors' draw of 16 that image `index` starts from."""
    return index % AUTHORS_BATCH


def _column(found: Any, table: str, field: str) -> list[str]:
    """The texts of one field of all rows; empty where one has none."""
    rows = found.get(table) if isinstance(found, dict) else None
    if not isinstance(rows, list):
        return []
    values = [row.get(field) if isinstance(row, dict) else None for row in rows]
    texts = [value for value in values if isinstance(value, str) and value]
    return texts if len(texts) == len(values) else []
