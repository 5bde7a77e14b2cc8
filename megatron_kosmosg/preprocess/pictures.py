"""Which pictures are fit for training; everything else is a reason to reject a record.

Left out are the kinds that decoders disagree on or that hide their size: CMYK, 16 bits a channel,
animations, and headers that promise more pixels than the cap. Bytes are never changed.
"""

from __future__ import annotations

import io
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_kosmosg.data.image_types import decoding_reason
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.preprocess.options import Options


class PictureCheck:
    """Reads and verifies pictures; counts them and the time it takes."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.num_verified = 0
        self.seconds = 0.0

    def read(self, record: Record, fields: dict[str, Any], name: str) -> bytes:
        """The encoded picture of a field, byte for byte, after it was verified."""
        if name not in fields:
            raise Rejected(f"no field {name}")
        data = self._bytes(record, fields[name], name)
        width, height = self.open(data, name).size
        if min(width, height) < self._options.min_image_side:
            raise Rejected(f"{name} is too small", f"{width} x {height}")
        return data

    def read_mask(
        self, record: Record, fields: dict[str, Any], name: str, image: bytes
    ) -> bytes | None:
        """The encoded mask of `image`: one channel, 255 = entity.

        It is the field's picture, or the alpha channel of `image` where the field is absent; None
        where the field is null, which says that there is no background to remove.
        """
        if name not in fields:
            return self._alpha(image, name)
        if fields[name] is None:
            return None
        data = self._bytes(record, fields[name], name)
        mask = self.open(data, name)
        if mask.mode not in ("L", "1"):
            raise Rejected(f"{name} has more than one channel", mask.mode)
        if mask.size != self._header(image, "image").size:
            raise Rejected(f"{name} and its image differ in size")
        if self._options.verify_images == "decode" and mask.getextrema()[1] == 0:
            raise Rejected(f"{name} is empty")
        return data

    def open(self, data: bytes, name: str, decode: bool = False) -> Image.Image:
        """The picture, decoded if the caller or the options ask for it. Raises Rejected."""
        started = time.process_time()
        try:
            with warnings.catch_warnings():
                # Of a hundred million pictures, many have an odd tag that Pillow warns of.
                warnings.simplefilter("ignore")
                image = self._header(data, name)
                if decode or self._options.verify_images == "decode":
                    _decode(image, name)
            return image
        finally:
            self.seconds += time.process_time() - started
            self.num_verified += 1

    def _header(self, data: bytes, name: str) -> Image.Image:
        if not data:
            raise Rejected(f"{name} is an empty file")
        if data[:512].lstrip()[:1] == b"<":
            raise Rejected(f"{name} is a web page")
        if data[:4] == b"\x89PNG" and 0 in (_int(data[16:20]), _int(data[20:24])):
            raise Rejected(f"{name} has zero size")
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise Rejected(f"{name} has too many pixels", str(error)) from error
        except UnidentifiedImageError as error:
            raise Rejected(f"{name} is not a known picture format") from error
        except Exception as error:  # noqa: BLE001 - Pillow raises anything on a damaged file
            raise Rejected(f"{name} cannot be decoded", decoding_reason(error)) from error
        if image.width * image.height > self._options.max_image_pixels:
            raise Rejected(f"{name} has too many pixels", f"{image.width} x {image.height}")
        if image.mode == "CMYK":
            raise Rejected(f"{name} is CMYK")
        if image.mode[0] in "IF" or ";16" in str(image.tile):
            raise Rejected(f"{name} has 16 bits or more a channel", image.mode)
        # A camera's JPEG with a preview after it (MPO) counts frames too, but is one picture.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise Rejected(f"{name} is animated")
        return image

    def _alpha(self, data: bytes, name: str) -> bytes:
        image = self._header(data, "image")
        if not image.has_transparency_data:
            raise Rejected(f"no {name} and no alpha channel")
        _decode(image, "image")
        alpha = image.convert("RGBA").getchannel("A")
        lowest, highest = alpha.getextrema()
        if highest == 0:
            raise Rejected(f"{name} is empty")
        if lowest == 255:
            raise Rejected(f"no {name} and no alpha channel", "the alpha channel is opaque")
        return encode_mask(np.asarray(alpha))

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
        try:
            return (Path(self._options.image_root or record.folder) / value).read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise Rejected(f"{name} cannot be read", f"{value}: {reason}") from error


def encode_mask(mask: np.ndarray) -> bytes:
    """PNG of uint8 [h, w]."""
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return out.getvalue()


def _decode(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except Exception as error:  # noqa: BLE001 - Pillow raises anything on a damaged file
        is_short = "trunc" in str(error).lower()
        reason = f"{name} is truncated" if is_short else f"{name} cannot be decoded"
        raise Rejected(reason, decoding_reason(error)) from error


def _int(data: bytes) -> int:
    return int.from_bytes(data, "big")
