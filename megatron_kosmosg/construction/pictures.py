"""An encoded picture -> the centre square that is captioned, segmented and drawn, upright and at
the picture's own resolution (as in the authors' builder)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import ExifTags, Image

from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.data.transparency import over_white
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.pictures import PictureCheck

Turn = Image.Transpose
QUARTER_TURNS = {0: (), 90: (Turn.ROTATE_90,), 180: (Turn.ROTATE_180,), 270: (Turn.ROTATE_270,)}
"""By degrees counterclockwise."""
ORIENTATIONS = {
    2: (Turn.FLIP_LEFT_RIGHT,),
    3: (Turn.ROTATE_180,),
    4: (Turn.FLIP_TOP_BOTTOM,),
    5: (Turn.TRANSPOSE,),
    6: (Turn.ROTATE_270,),
    7: (Turn.TRANSVERSE,),
    8: (Turn.ROTATE_90,),
}
"""By EXIF's number; 1 is upright."""


class SquarePictures:
    """Reads the pictures of records. Methods raise Rejected."""

    def __init__(self, options: Options) -> None:
        self._headers = PictureCheck(replace(options, verify_images="header"))
        self._decoder = PictureCheck(replace(options, verify_images="decode"))

    def picture(self, record: Record) -> Image.Image:
        """RGB; what is transparent becomes white."""
        data = self._headers.read(record, record.fields, "image")
        image = self._decoder.open(data, "image")
        return _square(over_white(image), _turns(image, record))

    def mask(self, record: Record, data: bytes) -> np.ndarray:
        """uint8 [side, side] of a mask that was made for the whole picture as it is stored."""
        mask = self._decoder.open(data, "mask")
        image = self._headers.open(self._headers.read(record, record.fields, "image"), "image")
        if mask.mode not in ("L", "1"):
            raise Rejected("mask has more than one channel", mask.mode)
        if mask.size != image.size:
            raise Rejected("mask and its image differ in size", f"{mask.size} and {image.size}")
        return np.asarray(_square(mask.convert("L"), _turns(image, record)))


def _turns(image: Image.Image, record: Record) -> tuple[Turn, ...]:
    """What makes the picture upright: its camera's note first, then the record's rotation."""
    rotation = record.fields.get("rotation", 0)
    if rotation not in QUARTER_TURNS:
        raise Rejected("rotation is not a quarter turn", repr(rotation)[:80])
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return ORIENTATIONS.get(orientation, ()) + QUARTER_TURNS[rotation]


def _square(image: Image.Image, turns: tuple[Turn, ...]) -> Image.Image:
    for turn in turns:
        image = image.transpose(turn)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))
