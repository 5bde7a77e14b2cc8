"""What DALI may be given: files of which it has the pixels of image_reading.py, told by headers.

DALI ends the process on some formats (AVIF), cannot decode others, takes colours under transparent
pixels for colours, and looks for the orientation in fewer places. It gets JPEG, PNG and WebP of the
common kinds; the test of image reading compares each of them.
"""

from __future__ import annotations

import io
import struct

from PIL import ExifTags, Image

from megatron_kosmosg.data.image_reading import TURNS, noted_orientation, open_image
from megatron_kosmosg.data.image_types import UnreadableImage

_START_OF_FRAME = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive; the rest are arithmetic or lossless codes."""
_OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_EXIF_OR_XMP = 0xE1
_ADOBE = 0xEE
_SCAN = 0xDA
_HIDDEN_NOTES = (b"Raw profile type", b"XML:com.adobe.xmp")


def dali_form(data: bytes) -> bytes | None:
    """The image's bytes in a form that DALI reads right, or None where another decoder has to
    read it. Decodes nothing."""
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data if _is_plain_png(data) else None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return data if _is_plain_webp(data) else None
    return None


def stored_layout(data: bytes) -> tuple[tuple[int, int], int]:
    """((width, height) as stored, EXIF's orientation) of a JPEG, PNG or WebP. Raises
    UnreadableImage.

    Decodes only a PNG with notes: Pillow looks for them behind the pixels, too.
    """
    with open_image(data) as image:
        is_upright = image.format == "PNG" and _is_plain_png(data)
        return image.size, 1 if is_upright else noted_orientation(image) or 1


def may_be_transparent(data: bytes) -> bool:
    """Whether some pixels may be transparent, judging by the header; a file that cannot be read has
    none."""
    if data[:3] == b"\xff\xd8\xff" or data[:4] == b"\x89PNG" and _is_plain_png(data):
        return False
    try:
        return open_image(data).has_transparency_data
    except UnreadableImage:
        return False


def _jpeg(data: bytes) -> bytes | None:
    """A JPEG as it is, or with the orientation that Pillow finds in it noted in the one place where
    DALI looks."""
    place, notes, is_known = 2, [], False
    has_colour = may_be_rgb = False
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker == _SCAN:
            break
        if marker in _OTHER_FRAMES or marker == 0x01 or 0xD0 <= marker <= 0xD9:
            return None
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if end > len(data):
            return None
        if marker in _START_OF_FRAME:
            bits, channels = data[place + 4 : place + 5], data[place + 9 : place + 10]
            is_known = bits == b"\x08" and channels in (b"\x01", b"\x03")
            has_colour = channels == b"\x03"
            may_be_rgb = may_be_rgb or data[place + 10 : place + 19 : 3] == b"RGB"
        elif marker == _EXIF_OR_XMP:
            notes.append((place, end))
        elif marker == _ADOBE and data[place + 4 : place + 9] == b"Adobe":
            may_be_rgb = may_be_rgb or data[place + 15 : place + 16] == b"\0"
        place = end
    # A GPU's decoder (nvImageCodec's) takes three channels for YCbCr, whatever the file says.
    if not is_known or has_colour and may_be_rgb or data.rfind(b"\xff\xd9", place) < 0:
        return None
    if not notes:
        return data
    with Image.open(io.BytesIO(data)) as image:
        note = noted_orientation(image)
    pieces, start = [data[:2]], 2
    if note in TURNS:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = note
        segment = exif.tobytes()
        pieces.append(struct.pack(">BBH", 0xFF, _EXIF_OR_XMP, len(segment) + 2) + segment)
    for place, end in notes:
        pieces.append(data[start:place])
        start = end
    return b"".join([*pieces, data[start:]])


def _is_plain_png(data: bytes) -> bool:
    """Opaque, up to 8 bits, whole, without any note of an orientation."""
    if len(data) < 33 or data[12:16] != b"IHDR" or data[24] > 8 or data[25] not in (0, 2, 3):
        return False
    place = 33
    while place + 12 <= len(data):
        name = data[place + 4 : place + 8]
        if name == b"IEND":
            return True
        if name in (b"tRNS", b"eXIf", b"acTL"):
            return False
        if name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_HIDDEN_NOTES, place + 8):
            return False
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return False


def _is_plain_webp(data: bytes) -> bool:
    """Whether a WebP is one whole opaque image without notes, as the simple forms of the format
    are."""
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        return False
    if data[12:16] == b"VP8L":
        has_alpha = data[24:25] and data[24] & 0x10
        return not has_alpha
    return data[12:16] == b"VP8 "
