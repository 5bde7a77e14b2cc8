"""The built records: a tar file for each shard, as `kosmosg preprocess --kind compositional` reads
it. One file instead of thousands suits parallel file systems, and it is there whole or not at all.

NUMBER.json {"caption", "image", "entities": [{"text", "span", "image", "mask"}], "source"},
NUMBER.target.jpg, and for entity i NUMBER.entity_i.jpg and NUMBER.mask_i.png.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_kosmosg.files import remove, temporary_name
from megatron_kosmosg.preprocess.image_check import encode_mask

JPEG_QUALITY = 95


@dataclass(frozen=True)
class CutEntity:
    """An entity's image: the square around it, and which part of that it is."""

    text: str
    span: list[int]
    image: Image.Image
    mask: np.ndarray | None
    """uint8, the size of the image, 255 = entity; None: there is no background to remove."""


@dataclass(frozen=True)
class ImageFormat:
    """The form in which images are stored."""

    max_side: int
    """Larger ones are made smaller; none is enlarged."""
    format: str
    """"jpg" or "png"."""

    def encode(self, image: Image.Image) -> bytes:
        """A square RGB image as the bytes of a file."""
        out = io.BytesIO()
        if self.format == "png":
            self._fitted(image).save(out, "PNG")
        else:
            self._fitted(image).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return out.getvalue()

    def encode_mask(self, mask: np.ndarray) -> bytes:
        """PNG of uint8 [side, side], of the same size as its image."""
        return encode_mask(np.asarray(self._fitted(Image.fromarray(mask))))

    def _fitted(self, image: Image.Image) -> Image.Image:
        side = min(self.max_side, image.width)
        return image.resize((side, side), Image.Resampling.BICUBIC)


@contextmanager
def record_file(path: Path, form: ImageFormat) -> Iterator[RecordWriter]:
    """A tar file that appears when the block ends without an error and with a record."""
    temporary = temporary_name(path, only_writer=True)
    remove(temporary)
    try:
        with tarfile.open(temporary, "x", format=tarfile.PAX_FORMAT) as tar:
            writer = RecordWriter(tar, path.stem, form)
            yield writer
        if writer.num_records > 0:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RecordWriter:
    """Adds records to an open tar file."""

    def __init__(self, tar: tarfile.TarFile, stem: str, form: ImageFormat) -> None:
        self._tar, self._stem, self._form = tar, stem, form
        self.num_records = 0

    def add(self, source: str, caption: str, target: Image.Image, entities: list[CutEntity]) -> str:
        """Adds a record to the tar file, and returns the key that it got."""
        key = f"{self._stem}{self.num_records:06d}"
        self.num_records += 1
        ending = self._form.format
        files = {f"target.{ending}": self._form.encode(target)}
        described: list[dict[str, Any]] = []
        for i, entity in enumerate(entities):
            names = {"image": f"entity_{i}.{ending}", "mask": None}
            files[f"entity_{i}.{ending}"] = self._form.encode(entity.image)
            if entity.mask is not None:
                names["mask"] = f"mask_{i}.png"
                files[f"mask_{i}.png"] = self._form.encode_mask(entity.mask)
            described.append({"text": entity.text, "span": entity.span} | names)
        record = {"caption": caption, "image": f"target.{ending}", "entities": described}
        self._add(f"{key}.json", json.dumps(record | {"source": source}).encode())
        for name, data in files.items():
            self._add(f"{key}.{name}", data)
        return key

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
