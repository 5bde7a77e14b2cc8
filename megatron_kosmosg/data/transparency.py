"""Pictures with transparency lie on white, wherever one is read.

Files keep colours under pixels that nobody sees, often black. `convert("RGB")` and most decoders
show those: another picture than the one that people see, and than the one with its mask painted.
The pipeline that travels with exported models and the examples have copies of `over_white`.
"""

from __future__ import annotations

import io

from PIL import Image, ImageChops

from megatron_kosmosg.data.samples import EntityImage

JPEG = b"\xff\xd8"


def over_white(image: Image.Image, mask: Image.Image | None = None) -> Image.Image:
    """RGB: `image` where it is opaque, white where it is not, mixed in between.

    mask: "L" of the same size, 255 = shown; the picture is then shown as far as both allow, once,
    as masks are often made from the transparency. Opaque pixels keep their values. Raises what
    Pillow raises for a damaged file, ValueError where sizes differ.
    """
    if mask is not None and mask.size != image.size:
        raise ValueError(f"a mask of {mask.size} for a picture of {image.size}")
    shown = mask
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        shown = alpha if mask is None else ImageChops.darker(alpha, mask)
    image = image.convert("RGB")
    if shown is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), shown)


def open_over_white(encoded: bytes | EntityImage) -> Image.Image:
    """RGB of an encoded picture, with its mask painted where it has one."""
    if not isinstance(encoded, EntityImage):
        return over_white(Image.open(io.BytesIO(encoded)))
    mask = None
    if encoded.mask is not None:
        mask = Image.open(io.BytesIO(encoded.mask)).convert("L")
    return over_white(Image.open(io.BytesIO(encoded.image)), mask)


def without_transparency(encoded: bytes | EntityImage) -> bytes | EntityImage:
    """What a decoder that knows no transparency reads right; opaque pictures as they are.

    Reads the header, and of JPEG, which is always opaque, two bytes. Others become a PNG of
    `open_over_white`, that is without a mask, upright by the same note of the camera.
    """
    data = encoded.image if isinstance(encoded, EntityImage) else encoded
    if data[:2] == JPEG:
        return encoded
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - Pillow raises anything; the decoder says what is wrong
        return encoded
    if not image.has_transparency_data:
        return encoded
    out = io.BytesIO()
    exif = image.info.get("exif", b"")
    open_over_white(encoded).save(out, "PNG", compress_level=1, exif=exif)
    return out.getvalue()
