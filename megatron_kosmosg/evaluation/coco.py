"""COCO as KOSMOS-G's script uses it: which captions of val2014 are drawn, and from which noise."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.evaluation.pairs import IMAGE_SUFFIXES
from megatron_kosmosg.evaluation.result import PublishedTable
from megatron_kosmosg.foreign_files import OutsideFolder, inside, read_json

NUM_CAPTIONS = 30_000
CAPTIONS_FILE, IMAGES_FOLDER = "annotations/captions_val2014.json", "val2014"
MAX_CAPTIONS_BYTES = 128 << 20
"""val2014's file is about as large as what other JSON may be."""
PUBLISHED = (
    PublishedTable(
        "Table 1 of the KOSMOS-G paper (arXiv 2310.02992): FID on COCO, zero-shot",
        ("FID",),
        (
            ("KOSMOS-G-1.9B", (10.99,)),
            ("Emu-14B", (11.66,)),
            ("GILL-8B", (12.20,)),
            ("Stable Diffusion v1.5, the authors' run", (9.34,)),
            ("Imagen-3.4B", (7.27,)),
            ("DALL-E 2", (10.39,)),
            ("Make-A-Scene", (11.84,)),
            ("GLIDE", (12.24,)),
        ),
        digits=2,
    ),
    PublishedTable(
        "Table 2 of the KOSMOS-G paper: FID after stage 2, by how the decoder is aligned",
        ("FID",),
        (
            ("AlignerNet of 24 layers", (9.55,)),
            ("AlignerNet of 12 layers", (9.89,)),
            ("end to end, with AlignerNet", (11.30,)),
            ("Stable Diffusion v1.5", (9.34,)),
        ),
        digits=2,
    ),
)
"""An `instruct` model compares with the first, an `align` model with the second."""
AUTHORS_BATCH = 16
"""Captions that the authors draw together, with the seed set anew before each batch."""


@dataclass(frozen=True)
class CocoCaptions:
    """The captions and images of `captions_val2014.json`."""

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
    """The numbers of the captions that the script draws: `random.seed(0);
    random.sample(annotations, count)`. They are captions and not images: one image may come twice.
    """
    return random.Random(0).sample(range(num_captions), count)


def read_captions(path: Path) -> CocoCaptions:
    """Raises InputError for what is not a captions file of COCO."""
    try:
        found = read_json(path, MAX_CAPTIONS_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    captions, images = (
        _column(found, "annotations", "caption"),
        _column(found, "images", "file_name"),
    )
    if not captions or not images:
        raise InputError(
            f"{path} has no `annotations` with a `caption` and `images` with a "
            "`file_name`; give COCO's annotations/captions_val2014.json"
        )
    return CocoCaptions(tuple(captions), tuple(images))


def authors_noise_row(index: int) -> int:
    """Row of the authors' draw of 16 that image `index` starts from."""
    return index % AUTHORS_BATCH


def real_images(folder: Path, listed: CocoCaptions) -> list[Path]:
    """All images of val2014 in the captions file's order. Raises InputError that names the first
    that is not there, or that the file does not name."""
    root = folder / IMAGES_FOLDER
    try:
        found = [inside(root, name) for name in listed.images]
    except OutsideFolder as error:
        raise InputError(f"{folder / CAPTIONS_FILE}: {error}") from error
    there = {entry.name for entry in os.scandir(root)} if root.is_dir() else set()
    missing = [path for path in found if path.name not in there]
    if missing:
        raise InputError(
            f"no {missing[0]} ({len(missing):,} of {len(found):,} images of {CAPTIONS_FILE} are "
            "not there); --coco is the folder of COCO 2014"
        )
    named = {path.name for path in found}
    extra = sorted(name for name in there - named if name.lower().endswith(IMAGE_SUFFIXES))
    if extra:
        raise InputError(
            f"{root / extra[0]} is in no row of {CAPTIONS_FILE} ({len(extra):,} images are not); "
            "the real images are those of COCO's val2014 alone"
        )
    return found


def _column(found: Any, table: str, field: str) -> list[str]:
    """The texts of one field of all rows; empty where one has none."""
    rows = found.get(table) if isinstance(found, dict) else None
    if not isinstance(rows, list):
        return []
    values = [row.get(field) if isinstance(row, dict) else None for row in rows]
    texts = [value for value in values if isinstance(value, str) and value]
    return texts if len(texts) == len(values) else []
