"""How an image file is read, everywhere (docs/data.md, "How images are read").

Pillow decodes it, and what comes out is RGB with 8 bits a channel, upright by the camera's note
(EXIF), white where it is transparent. Other libraries may decode what they give the same pixels of
(image_headers.py). What has no certain pixels, CMYK or an animation, is refused for one reason.
Files keep colours under pixels that nobody sees, often black; `convert("RGB")` and most decoders
show those: another image than the one that people see, and than the one with its mask painted.
The pipeline that travels with exported models and the examples have a copy of `upright_rgb`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageChops

from megatron_kosmosg.data.image_masks import as_mask
from megatron_kosmosg.data.image_types import UnreadableImage, decoding_reason
from megatron_kosmosg.data.samples import EntityImage

SPECIFICATION = 2
"""Raised when some file has other pixels than before. 1 had no number: backends read orientation
and transparency each in its own way."""

FORMATS = (
    ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "ICO", "ICNS")
    + ("PPM", "PCX", "TGA", "DDS", "SGI", "XBM", "QOI")
)  # fmt: skip
"""By Pillow's names; JPEG includes a camera's MPO. None that another program draws (EPS)."""

_PNG_END = b"IEND\xaeB`\x82"

Turn = Image.Transpose
TURNS = {
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
"""What makes an image upright, by EXIF's orientation; 1, and any other number, is upright."""
_BACK = {6: 8, 8: 6}
"""The orientation that undoes another; the rest undo themselves."""
ON_ITS_SIDE = (5, 6, 7, 8)
"""Orientations that swap width and height."""


def open_image(data: bytes) -> Image.Image:
    """The image of a file, of which only the header was read. Raises UnreadableImage."""
    if not data:
        raise UnreadableImage("is an empty file")
    if data[:512].lstrip()[:1] == b"<":
        raise UnreadableImage("is a web page")
    if data[:4] == b"\x89PNG" and bytes(4) in (data[16:20], data[20:24]):
        raise UnreadableImage("has zero size")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableImage("has too many pixels", decoding_reason(error)) from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("is not a known image format") from error
    except Exception as error:  # noqa: BLE001 - Pillow raises anything on a damaged file
        raise UnreadableImage("cannot be decoded", decoding_reason(error)) from error
    require_certain_pixels(image)
    return image


def require_certain_pixels(image: Image.Image) -> None:
    """Raises UnreadableImage for what programs show in different ways."""
    if image.mode == "CMYK":
        raise UnreadableImage("is CMYK")
    if image.mode in ("I", "F"):
        raise UnreadableImage("has more than 16 bits a channel", image.mode)
    if image.mode.startswith("I;16") and "transparency" in image.info:
        raise UnreadableImage("has 16 bits and a transparent level")
    # A camera's JPEG with a preview after it (MPO) counts frames too, but is one image.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UnreadableImage("is animated")


@dataclass(frozen=True)
class StoredImage:
    """The pixels of a decoded file as they are stored, with its note of how they are turned."""

    pixels: Image.Image
    """As stored: in any mode, not turned."""
    note: int | None
    """EXIF's orientation; None where there is none, an impossible or a damaged one."""

    @property
    def orientation(self) -> int:
        """EXIF's orientation; 1 where the pixels are upright."""
        return self.note or 1


def decode_image(data: bytes) -> StoredImage:
    """The image of a file. Raises UnreadableImage."""
    image = open_image(data)
    note = noted_orientation(image)
    load_pixels(image, data)
    if image.format == "TIFF" and note in TURNS:  # which Pillow has made upright
        image = image.transpose(TURNS[_BACK.get(note, note)])
    return StoredImage(image, note)


def load_pixels(image: Image.Image, data: bytes | None = None) -> None:
    """Decodes an opened image, of the file `data` if that is known. Raises UnreadableImage."""
    try:
        image.load()
    except Exception as error:  # noqa: BLE001 - Pillow raises anything on a damaged file
        reason = "is truncated" if "trunc" in str(error).lower() else "cannot be decoded"
        raise UnreadableImage(reason, decoding_reason(error)) from error
    # Pillow has all pixels of a PNG before its end, and does not miss the end.
    if image.format == "PNG" and data is not None and data.rfind(_PNG_END) < 0:
        raise UnreadableImage("is truncated", "the PNG has no end (IEND)")


def noted_orientation(image: Image.Image) -> int | None:
    """EXIF's orientation of an opened image, as described at StoredImage.note. Raises
    UnreadableImage."""
    if image.format == "PNG":  # which may say it behind its pixels
        load_pixels(image)
    try:
        note = image.getexif().get(ExifTags.Base.Orientation)
        return note if note == 1 or note in TURNS else None
    except Exception:  # noqa: BLE001 - Pillow raises anything on a damaged note
        return None


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image stored with this orientation, made upright."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The (width, height) that an image of the stored `size` has when it is made upright."""
    return (size[1], size[0]) if orientation in ON_ITS_SIDE else size


def eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode L, LA, RGB or RGBA, not turned; levels of 16 bits are scaled to 8 (the
    higher byte)."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def over_white(image: Image.Image, mask: Image.Image | None = None) -> Image.Image:
    """RGB: `image` where it is opaque, white where it is not, mixed in between.

    Args:
        mask: "L" of the same size, 255 = shown; the image is then shown as far as both allow,
            once, as masks are often made from the transparency. Opaque pixels keep their values.

    Raises what Pillow raises for a damaged file, ValueError where sizes differ.
    """
    if mask is not None and mask.size != image.size:
        raise ValueError(f"a mask of {mask.size} for an image of {image.size}")
    image = eight_bits(image)
    shown = mask
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        shown = alpha if mask is None else ImageChops.darker(alpha, mask)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if shown is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), shown)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as people see it, in RGB. Raises UnreadableImage."""
    require_certain_pixels(image)
    load_pixels(image)
    return turned(over_white(image), noted_orientation(image) or 1)


def read_image(encoded: bytes | EntityImage) -> Image.Image:
    """RGB, upright, of an encoded image, its mask painted where it has one.

    Raises UnreadableImage.
    """
    is_entity = isinstance(encoded, EntityImage)
    stored = decode_image(encoded.image if is_entity else encoded)
    mask = None
    if is_entity and encoded.mask is not None:
        mask = fitted_mask(encoded.mask, stored.pixels.size, stored.orientation)
    return over_white(turned(eight_bits(stored.pixels), stored.orientation), mask)


def fitted_mask(data: bytes, size: tuple[int, int], orientation: int) -> Image.Image:
    """The mask, "L" with 255 = entity, of an image of `size` stored with this orientation.

    Upright, as the image is shown. A mask with a note of its own is turned by that, one of the
    stored image's size as the image is; one of the upright image's size is upright. So where
    the two sizes are equal, a mask without a note is one of the stored pixels. Raises
    UnreadableImage, also where it is not certain which pixels it means (image_masks.py).
    """
    try:
        mask = decode_image(data)
        own_size, upright = mask.pixels.size, turned_size(size, orientation)
        if mask.note is not None and turned_size(own_size, mask.note) == upright:
            return turned(as_mask(mask.pixels), mask.note)
        if own_size == size:
            return turned(as_mask(mask.pixels), orientation)
        if own_size == upright:
            return as_mask(mask.pixels)
    except UnreadableImage as error:
        raise UnreadableImage(error.reason, error.detail, "mask") from error
    turns = f" (EXIF orientation {orientation})" if orientation != 1 else ""
    raise UnreadableImage("and its image differ in size", f"{own_size} and {size}{turns}", "mask")


def is_stored_as_it_is(data: bytes, image: Image.Image) -> bool:
    """Whether a dataset keeps the bytes of a file unchanged; `image` is the file, opened."""
    return image.format in ("JPEG", "MPO", "WEBP") or image.format == "PNG" and data[24] <= 8


def stored_form(data: bytes, image: Image.Image) -> bytes:
    """What a dataset keeps of the file `data`, `image` being it, opened.

    JPEG, WebP and PNG of up to 8 bits stay as they are, byte for byte. Of others training's decoder
    knows some, and some in other colours: a PNG of the same pixels, transparency and orientation
    among them. Raises UnreadableImage.
    """
    if is_stored_as_it_is(data, image):
        return data
    stored = decode_image(data)
    exif = Image.Exif()
    if stored.orientation != 1:
        exif[ExifTags.Base.Orientation] = stored.orientation
    return encode_png(eight_bits(stored.pixels), exif=exif)


def encode_png(image: Image.Image, **options: object) -> bytes:
    """PNG; options are those of Pillow's writer."""
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()
