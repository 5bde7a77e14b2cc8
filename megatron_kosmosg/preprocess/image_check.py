"""Which images are fit for training; everything else is a reason to reject a record.

What can be read, and how, is in data/image_reading.py; beyond that, headers that promise more
pixels than the cap are left out. Files that training's decoder knows keep their bytes, others
become PNG.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from megatron_kosmosg.data.image_headers import stored_layout
from megatron_kosmosg.data.image_masks import as_mask
from megatron_kosmosg.data.image_reading import (
    decode_image,
    eight_bits,
    encode_png,
    fitted_mask,
    is_stored_as_it_is,
    load_pixels,
    open_image,
    stored_form,
)
from megatron_kosmosg.data.image_types import UnreadableImage
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.foreign_files import OutsideFolder, inside, read_file
from megatron_kosmosg.preprocess.options import Options


class ImageCheck:
    """Reads and verifies images; counts them and the time it takes."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.num_verified = 0
        self.seconds = 0.0

    def read(self, record: Record, fields: dict[str, Any], name: str) -> bytes:
        """The stored form of a field's image, after it was verified."""
        data, image = self.find(record, fields, name)
        with rejecting(name):
            return stored_form(data, image)

    def find(self, record: Record, fields: dict[str, Any], name: str) -> tuple[bytes, Image.Image]:
        """The file of a field's image, and the image, verified. Raises Rejected."""
        if name not in fields:
            raise Rejected(f"no field {name}")
        data = self._bytes(record, fields[name], name)
        image = self.open(data, name)
        width, height = image.size
        if min(width, height) < self._options.min_image_side:
            raise Rejected(f"{name} is too small", f"{width} x {height}")
        return data, image

    def read_mask(
        self, record: Record, fields: dict[str, Any], name: str, image: bytes
    ) -> bytes | None:
        """What is stored of the mask of `image`, a stored image: one channel, 255 = entity.

        It is the field's image, or the alpha channel of `image` where the field is absent; None
        where the field is null, which says that there is no background to remove.
        """
        if name not in fields:
            return self._alpha(image, name)
        if fields[name] is None:
            return None
        data = self._bytes(record, fields[name], name)
        mask = self.open(data, name)
        with rejecting(name):
            size, orientation = stored_layout(image)
            is_kept = mask.mode == "L" and is_stored_as_it_is(data, mask)
            if is_kept and mask.size == size and self._options.verify_images == "header":
                return data
            upright = fitted_mask(data, size, orientation)
            if is_kept and as_mask(mask).tobytes() == mask.tobytes():
                return data
            exif = Image.Exif()
            if orientation != 1:
                exif[ExifTags.Base.Orientation] = 1  # upright, unlike its image
            return encode_png(upright, exif=exif)

    def decoded(self, data: bytes, name: str) -> Image.Image:
        """The pixels as stored, not turned. Raises Rejected."""
        self.open(data, name)
        with rejecting(name):
            return decode_image(data).pixels

    def open(self, data: bytes, name: str) -> Image.Image:
        """The image, decoded if the options ask for it. Raises Rejected."""
        started = time.process_time()
        try:
            with rejecting(name):
                image = self._header(data, name)
                if self._options.verify_images == "decode":
                    load_pixels(image, data)
            return image
        finally:
            self.seconds += time.process_time() - started
            self.num_verified += 1

    def _header(self, data: bytes, name: str) -> Image.Image:
        image = open_image(data)
        if image.width * image.height > self._options.max_image_pixels:
            raise Rejected(f"{name} has too many pixels", f"{image.width} x {image.height}")
        return image

    def _alpha(self, data: bytes, name: str) -> bytes:
        with rejecting("image"):
            image = open_image(data)
            if not image.has_transparency_data:
                raise Rejected(f"no {name} and no alpha channel")
            alpha = eight_bits(decode_image(data).pixels).getchannel("A")
        lowest, highest = alpha.getextrema()
        if highest == 0:
            raise Rejected(f"{name} is empty")
        if lowest == 255:
            raise Rejected(f"no {name} and no alpha channel", "the alpha channel is opaque")
        return encode_png(alpha)

    def _bytes(self, record: Record, value: object, name: str) -> bytes:
        if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if value is None:
            raise Rejected(f"{name} is null")
        if not isinstance(value, str) or not value:
            raise Rejected(f"{name} is not a file name", repr(value)[:80])
        if value in record.files:
            return record.files[value]
        if value.startswith(("http://", "https://")):
            raise Rejected(f"{name} is a web address, not a file", value)
        folder = Path(self._options.image_root or record.folder)
        try:
            return read_file(inside(folder, value, record.folder))
        except OutsideFolder as error:
            detail = f"{error}; --image-root {(folder / value).resolve().parent} allows its folder"
            raise Rejected(f"{name} lies outside the folder of the input", detail) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise Rejected(f"{name} cannot be read", f"{value}: {reason}") from error


def encode_mask(mask: np.ndarray) -> bytes:
    """A mask uint8 [h, w] as a PNG."""
    return encode_png(Image.fromarray(mask))


@contextmanager
def rejecting(name: str) -> Iterator[None]:
    """Context in which an image that cannot be read becomes a reason to reject the record; `name`
    is the image's field."""
    try:
        with warnings.catch_warnings():
            # Of a hundred million images, many have an odd tag that Pillow warns of.
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage as error:
        raise Rejected(f"{name} {error.reason}", error.detail) from error
