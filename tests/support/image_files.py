"""One small image as files of every format that users may bring, and what people see of each.

Long because every line of the table is a format.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageCms

from tests.support.data_helpers import encode_image
from tests.support.data_inputs import webp_with_exif

WIDTH, HEIGHT = 96, 72
ORIENTATION = 0x112
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera does to the upright image before it notes this orientation."""
XMP_TURNED = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax'
    b'-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


@dataclass(frozen=True)
class ImageFile:
    """A file and what is right for it: `seen` within `tolerance`, or `refused`."""

    data: bytes
    seen: Image.Image | None = None
    """RGB: upright, white where it is transparent."""
    tolerance: float = 0.0
    """Mean difference of the decoded file from `seen` in levels of 255, as it was compressed."""
    refused: str | None = None
    """The reason that every reader gives."""


def colours() -> Image.Image:
    """Smooth, and without any symmetry."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    red, green = x * 255 / WIDTH, y * 255 / HEIGHT
    blue = 127 + 127 * np.sin(x / 9) * np.cos(y / 7)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def disc() -> Image.Image:
    """255 inside a circle left of the middle, 100 at its rim, else 0."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - 40, y - HEIGHT / 2)
    levels = np.where(distance < 26, 255, np.where(distance < 28, 100, 0))
    return Image.fromarray(levels.astype(np.uint8))


def cut_out(hidden: int) -> Image.Image:
    """RGBA, opaque in the disc; `hidden`: level under transparent pixels."""
    outside = Image.new("RGB", (WIDTH, HEIGHT), (hidden, hidden, hidden))
    image = Image.composite(colours(), outside, disc().point(lambda a: 255 if a else 0))
    image.putalpha(disc())
    return image


def on_white(image: Image.Image) -> Image.Image:
    """By hand: 255 - (255 - colour) * alpha."""
    pixels = np.asarray(image.convert("RGBA"), np.float64)
    seen = 255 - (255 - pixels[..., :3]) * pixels[..., 3:] / 255
    return Image.fromarray(np.rint(seen).astype(np.uint8))


def turned(image_format: str, orientation: int, **options) -> bytes:
    """The upright image as a camera stores it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = colours().transpose(STORED_AS[orientation])
    return encode_image(stored, image_format, exif=exif, **options)


def animation(image_format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    return encode_image(frames[0], image_format, save_all=True, append_images=frames[1:])


def raw_png(bits: int, colour_type: int, rows: bytes, *chunks: bytes, interlaced: int = 0) -> bytes:
    """A PNG that Pillow does not write."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour_type, 0, 0, interlaced)
    parts = [_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, _chunk(b"IEND", b"")])


def _chunk(name: bytes, data: bytes) -> bytes:
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def _lines(pixels: np.ndarray) -> bytes:
    """[h, ...] without a filter."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def _interlaced(pixels: np.ndarray) -> bytes:
    steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    return b"".join(_lines(pixels[y::dy, x::dx]) for x, y, dx, dy in [*steps, (0, 1, 1, 2)])


def _grey_png(bits: int) -> tuple[bytes, Image.Image]:
    levels = np.asarray(colours().convert("L")) >> (8 - bits)
    packed = np.unpackbits(levels[..., None], axis=-1)[..., 8 - bits :].reshape(HEIGHT, -1)
    seen = (levels.astype(int) * 255 // (2**bits - 1)).astype(np.uint8)
    data = raw_png(bits, 0, _lines(np.packbits(packed, axis=-1)))
    return data, Image.fromarray(seen).convert("RGB")


@cache
def image_files() -> dict[str, ImageFile]:
    """By the name that docs/data.md calls the format."""
    image, grey = colours(), colours().convert("L")
    palette, two_levels = image.quantize(64), disc().convert("1")
    clear, noisy = cut_out(0), cut_out(77)
    files: dict[str, ImageFile] = {}

    def add(name: str, data: bytes, seen: Image.Image = image, tolerance: float = 0.0) -> None:
        files[name] = ImageFile(data, seen.convert("RGB"), tolerance)

    def write(name: str, seen: Image.Image, image_format: str, **options) -> None:
        lossy = 0.0 if seen.mode in ("1", "P") else options.pop("tolerance", 0.0)
        data = encode_image(seen, image_format, **options)
        add(name, data, on_white(seen) if "A" in seen.mode else seen, lossy)

    def refuse(name: str, data: bytes, reason: str) -> None:
        files[name] = ImageFile(data, refused=reason)

    lossy = {"tolerance": 4.0}
    for name, options in {
        "JPEG": {},
        "JPEG, 4:2:2": {"subsampling": "4:2:2"},
        "JPEG, 4:4:4": {"subsampling": "4:4:4"},
        "JPEG, progressive": {"progressive": True},
        "JPEG, stored as RGB": {"keep_rgb": True},
    }.items():
        write(name, image, "JPEG", quality=92, **options, **lossy)
    write("JPEG, grey", grey, "JPEG", quality=92, **lossy)
    jpeg = files["JPEG"].data
    preview = [Image.new("RGB", (40, 30))]
    write("JPEG with a preview (MPO)", image, "MPO", save_all=True, append_images=preview, **lossy)
    add("JPEG and 4,000 zero bytes", jpeg + bytes(4000), tolerance=4.0)
    for orientation in STORED_AS:
        add(f"JPEG, EXIF {orientation}", turned("JPEG", orientation, quality=92), tolerance=4.0)
    stored = image.transpose(STORED_AS[6])
    add("JPEG, orientation 6 in XMP", encode_image(stored, "JPEG", xmp=XMP_TURNED), tolerance=5.0)
    add("JPEG, damaged EXIF", encode_image(image, "JPEG", exif=b"Exif\0\0MM\0\x07"), tolerance=5.0)
    refuse("JPEG, CMYK", encode_image(image.convert("CMYK"), "JPEG"), "is CMYK")
    refuse("JPEG, cut", jpeg[:-300], "is truncated")
    refuse("JPEG without its last two bytes", jpeg[:-2], "is truncated")

    write("PNG", image, "PNG")
    write("PNG, grey", grey, "PNG")
    write("PNG, 1 bit", two_levels, "PNG")
    for bits in (2, 4):
        add(f"PNG, {bits} bits grey", *_grey_png(bits))
    write("PNG, palette", palette, "PNG")
    write("PNG, palette of 4", image.quantize(4), "PNG", bits=2)
    data = encode_image(palette, "PNG", transparency=3)
    add("PNG, palette, one transparent", data, on_white(Image.open(io.BytesIO(data))))
    for name, mode in (("RGB", "RGB"), ("grey", "L")):
        key = image.convert(mode).getpixel((30, 30))
        data = encode_image(image.convert(mode), "PNG", transparency=key)
        add(f"PNG, {name}, one transparent", data, on_white(Image.open(io.BytesIO(data))))
    write("PNG, RGBA, black under transparent", clear, "PNG")
    write("PNG, RGBA, grey under transparent", noisy, "PNG")
    write("PNG, grey and alpha", noisy.convert("LA"), "PNG")
    levels = np.asarray(grey).astype(np.uint16) * 257
    write_16 = encode_image(Image.fromarray(levels), "PNG")
    add("PNG, 16 bits grey", write_16, grey)
    deep = (np.asarray(image).astype(">u2") * 257).astype(">u2")
    add("PNG, 16 bits RGB", raw_png(16, 2, _lines(deep)))
    add("PNG, interlaced", raw_png(8, 2, _interlaced(np.asarray(image)), interlaced=1))
    gamma = _chunk(b"gAMA", struct.pack(">I", 100000))
    add("PNG with a gamma", raw_png(8, 2, _lines(np.asarray(image)), gamma))
    add("PNG, EXIF 6", turned("PNG", 6))
    shown = raw_png(16, 0, _lines(levels.astype(">u2")), _chunk(b"tRNS", struct.pack(">H", 514)))
    add("PNG, damaged EXIF", encode_image(image, exif=b"MM\0\x07 no EXIF"))
    refuse("PNG, 16 bits grey, one transparent", shown, "has 16 bits and a transparent level")
    refuse("PNG, cut", files["PNG"].data[:-200], "is truncated")
    refuse("PNG, last 20 bytes cut", files["PNG"].data[:-20], "is truncated")
    refuse("PNG, animated", animation("PNG"), "is animated")

    write("WebP", image, "WEBP", quality=90, **lossy)
    write("WebP, lossless", image, "WEBP", lossless=True)
    write("WebP, lossy with alpha", noisy, "WEBP", quality=90, **lossy)
    write("WebP, lossless with alpha", noisy, "WEBP", lossless=True, exact=True)
    for name, is_odd in (("even", False), ("odd", True)):
        add(f"WebP, EXIF after a chunk of {name} size", webp_with_exif(image, 1, is_odd))
    add("WebP, EXIF 6", turned("WEBP", 6, lossless=True))
    refuse("WebP, cut", files["WebP"].data[:-100], "cannot be decoded")
    refuse("WebP, animated", animation("WEBP"), "is animated")

    write("TIFF", image, "TIFF")
    write("TIFF, LZW", image, "TIFF", compression="tiff_lzw")
    write("TIFF, JPEG", image, "TIFF", compression="jpeg", **lossy)
    write("TIFF, palette", palette, "TIFF")
    write("TIFF, 1 bit", two_levels, "TIFF", compression="group4")
    write("TIFF, RGBA", noisy, "TIFF")
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    add("TIFF, LAB", encode_image(lab, "TIFF"), tolerance=2.0)
    add("TIFF, 16 bits grey", encode_image(Image.fromarray(levels), "TIFF"), grey)
    add("TIFF, EXIF 6", turned("TIFF", 6))
    refuse("TIFF, CMYK", encode_image(image.convert("CMYK"), "TIFF"), "is CMYK")
    wide = encode_image(grey.convert("F"), "TIFF")
    refuse("TIFF, 32 bits", wide, "has more than 16 bits a channel")

    for name in ("BMP", "GIF", "ICO", "PPM", "PCX", "TGA", "DDS", "SGI", "QOI"):
        seen = palette if name == "GIF" else image
        options = {"sizes": [(WIDTH, HEIGHT)]} if name == "ICO" else {}
        write(name, seen, name, **options)
    write("BMP, palette", palette, "BMP")
    write("BMP, 1 bit", two_levels, "BMP")
    write("JPEG 2000", image, "JPEG2000")
    data = encode_image(palette, "GIF", transparency=3)
    add("GIF, one transparent", data, on_white(Image.open(io.BytesIO(data))))
    write("XBM", two_levels, "XBM")
    write("AVIF", image, "AVIF", quality=90, **lossy)
    write("AVIF with alpha", noisy, "AVIF", quality=90, **lossy)
    refuse("GIF, animated", animation("GIF"), "is animated")
    unknown = "is not a known image format"
    refuse("HEIF", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), unknown)
    refuse("EPS", encode_image(image, "EPS"), unknown)
    refuse("PDF", encode_image(image, "PDF"), unknown)
    refuse("SVG, HTML", b"<svg></svg>", "is a web page")
    refuse("empty file", b"", "is an empty file")
    return files
