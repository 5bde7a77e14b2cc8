"""Files that data commands read, and the commands on them."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.commands import Commands, Ran
from tests.support.data_helpers import encode_image
from tests.support.public import SampleStore

_IMAGE_CHUNK_SIZE = slice(34, 38)
"""After RIFF's header (12 bytes), the chunk VP8X (18) and the image chunk's name (4)."""


def webp_with_exif(image: Image.Image, orientation: int, is_odd: bool) -> bytes:
    """A lossless WebP whose image chunk, before the one with EXIF, has an odd or even size."""
    exif = Image.Exif()
    exif[0x112] = orientation
    for effort in itertools.product((100, 0, 50), range(7)):
        options = dict(zip(("quality", "method"), effort, strict=True))
        data = encode_image(image, "WEBP", exif=exif, lossless=True, **options)
        if int.from_bytes(data[_IMAGE_CHUNK_SIZE], "little") % 2 == is_odd:
            return data
    raise ValueError("no effort gives a chunk of such a size; take another image")


@dataclass(frozen=True)
class Stored:
    """A stored sample."""

    info: dict[str, Any]
    images: list[bytes]


@dataclass(frozen=True)
class Preprocessed:
    """What `preprocess_data.py` made of its input."""

    ran: Ran
    prefix: Path

    @property
    def samples(self) -> dict[str, Stored]:
        """By key; none where the command wrote no dataset."""
        if not Path(f"{self.prefix}.json").exists():
            return {}
        store = SampleStore(self.prefix)
        raws = [store[i] for i in range(len(store))]
        # Copied: a sample's parts are mapped from files that the store closes.
        return {str(raw.info["key"]): Stored(raw.info, raw.images()) for raw in raws}

    @property
    def rejects(self) -> list[dict[str, Any]]:
        """The lines of PREFIX.rejects.jsonl."""
        path = Path(f"{self.prefix}.rejects.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def must_succeed(self) -> Preprocessed:
        """Itself. Raises CommandFailed where no dataset was written."""
        self.ran.must_succeed()
        return self


def preprocess(
    commands: Commands, kind: str, model: Path, prefix: Path, inputs: object, *more: object, **how
) -> Preprocessed:
    """`preprocess_data.py --kind KIND --input INPUTS --output-prefix PREFIX MORE`.

    inputs: one or a list. model: SentencePiece model file. how: as for `Commands.run`.
    """
    names = inputs if isinstance(inputs, list) else [inputs]
    ran = commands.tool(
        "preprocess_data",
        *("--kind", kind, "--tokenizer-model", model, "--output-prefix", prefix, *more),
        *("--input", *names),
        **how,
    )
    return Preprocessed(ran, prefix)
