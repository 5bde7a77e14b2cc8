"""An encoded image -> the centre square that is captioned, segmented and drawn, upright and at
the image's own resolution (as in the authors' builder)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from megatron_kosmosg.data.image_reading import Turn, decode_image, fitted_mask, read_image
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.image_check import ImageCheck, rejecting
from megatron_kosmosg.preprocess.options import Options

QUARTER_TURNS = {0: (), 90: (Turn.ROTATE_90,), 180: (Turn.ROTATE_180,), 270: (Turn.ROTATE_270,)}
"""By degrees counterclockwise."""


class SquareImages:
    """Reads the images of records. Methods raise Rejected."""

    def __init__(self, options: Options) -> None:
        self._images = ImageCheck(replace(options, verify_images="header"))

    def square(self, record: Record) -> Image.Image:
        """The centre square of the record's image in RGB; what is transparent becomes white."""
        data = self._file(record)
        with rejecting("image"):
            return _square(read_image(data), _turns(record))

    def mask(self, record: Record, data: bytes) -> np.ndarray:
        """The centre square of a mask that was made for the whole image, uint8 [side, side]."""
        self._images.open(data, "mask")
        with rejecting("mask"):
            stored = decode_image(self._file(record))
            mask = fitted_mask(data, stored.pixels.size, stored.orientation)
        return np.asarray(_square(mask, _turns(record)))

    def _file(self, record: Record) -> bytes:
        return self._images.find(record, record.fields, "image")[0]


def _turns(record: Record) -> tuple[Turn, ...]:
    """The record's rotation, which the upright image still needs."""
    rotation = record.fields.get("rotation", 0)
    if rotation not in QUARTER_TURNS:
        raise Rejected("rotation is not a quarter turn", repr(rotation)[:80])
    return QUARTER_TURNS[rotation]


def _square(image: Image.Image, turns: tuple[Turn, ...]) -> Image.Image:
    for turn in turns:
        image = image.transpose(turn)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))
