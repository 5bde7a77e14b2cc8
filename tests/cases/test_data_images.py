"""Image files of all kinds: what preprocessing accepts, both decoders give as the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.support.data_helpers import encode_image, write_jsonl
from tests.support.data_inputs import Preprocessed, preprocess, webp_with_exif
from tests.support.model_view import Shown, difference, model_view, model_views

WIDTH, HEIGHT = 96, 72
LARGEST_DIFFERENCE = 0.5
"""Mean over an image, in levels of 255."""


def colours() -> Image.Image:
    """Every hue, smoothly."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [x * 255 / WIDTH, y * 255 / HEIGHT, (x + y) * 255 / (WIDTH + HEIGHT)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def disc() -> Image.Image:
    """255 inside a circle, else 0."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside = (x - WIDTH / 2) ** 2 + (y - HEIGHT / 2) ** 2 < 28**2
    return Image.fromarray((inside * 255).astype(np.uint8))


def cut_out(is_black_outside: bool = False) -> Image.Image:
    """RGBA, transparent outside of the disc."""
    image = colours()
    if is_black_outside:
        image = Image.composite(image, Image.new("RGB", image.size), disc())
    image.putalpha(disc())
    return image


def palette(num_colours: int = 64) -> Image.Image:
    return colours().quantize(num_colours)


def lab() -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.profileToProfile(colours(), *profiles, outputMode="LAB")


def two_levels() -> Image.Image:
    return disc().convert("1")


def grey() -> Image.Image:
    return colours().convert("L")


FORMATS: dict[str, tuple[Callable[[], Image.Image], str, dict]] = {
    "jpeg.jpg": (colours, "JPEG", {"quality": 92}),
    "jpeg_progressive.jpg": (colours, "JPEG", {"quality": 92, "progressive": True}),
    "jpeg_grey.jpg": (grey, "JPEG", {"quality": 92}),
    "jpeg_444.jpg": (colours, "JPEG", {"quality": 92, "subsampling": 0}),
    "jpeg_rgb.jpg": (colours, "JPEG", {"quality": 92, "keep_rgb": True}),
    "mpo.jpg": (colours, "MPO", {"save_all": True, "append_images": [Image.new("RGB", (80, 60))]}),
    "webp_called.jpg": (colours, "WEBP", {"quality": 90}),
    "png_called.jpg": (colours, "PNG", {}),
    "png.png": (colours, "PNG", {}),
    "png_rgba_black_outside.png": (lambda: cut_out(is_black_outside=True), "PNG", {}),
    "png_rgba.png": (cut_out, "PNG", {}),
    "png_grey_alpha.png": (lambda: cut_out().convert("LA"), "PNG", {}),
    "png_grey.png": (grey, "PNG", {}),
    "png_1bit.png": (two_levels, "PNG", {}),
    "png_palette.png": (palette, "PNG", {}),
    "png_palette_transparent.png": (palette, "PNG", {"transparency": 3}),
    "png_palette_2bit.png": (lambda: palette(4), "PNG", {"bits": 2}),
    "png_rgb_transparent.png": (colours, "PNG", {"transparency": (0, 0, 0)}),
    "png_grey_transparent.png": (grey, "PNG", {"transparency": 0}),
    "gif.gif": (colours, "GIF", {}),
    "gif_transparent.gif": (palette, "GIF", {"transparency": 3}),
    "webp.webp": (colours, "WEBP", {}),
    "webp_lossless_alpha.webp": (cut_out, "WEBP", {"lossless": True}),
    "bmp.bmp": (colours, "BMP", {}),
    "bmp_palette.bmp": (palette, "BMP", {}),
    "bmp_rgba.bmp": (cut_out, "BMP", {}),
    "bmp_1bit.bmp": (two_levels, "BMP", {}),
    "tiff.tif": (colours, "TIFF", {}),
    "tiff_lzw.tif": (colours, "TIFF", {"compression": "tiff_lzw"}),
    "tiff_jpeg.tif": (colours, "TIFF", {"compression": "jpeg"}),
    "tiff_ycbcr.tif": (lambda: colours().convert("YCbCr"), "TIFF", {}),
    "tiff_palette.tif": (palette, "TIFF", {}),
    "tiff_1bit.tif": (two_levels, "TIFF", {"compression": "group4"}),
    "tiff_rgba.tif": (cut_out, "TIFF", {}),
    "tiff_lab.tif": (lab, "TIFF", {}),
    "jpeg2000.jp2": (colours, "JPEG2000", {}),
    "ico.ico": (colours, "ICO", {}),
    "ppm.ppm": (colours, "PPM", {}),
    "pcx.pcx": (colours, "PCX", {}),
    "tga.tga": (colours, "TGA", {}),
    "eps.eps": (colours, "EPS", {}),
    "dds.dds": (colours, "DDS", {}),
    "pdf.pdf": (colours, "PDF", {}),
    "sgi.sgi": (colours, "SGI", {}),
    "xbm.xbm": (two_levels, "XBM", {}),
    "qoi.qoi": (colours, "QOI", {}),
    "jpeg_and_zeros.jpg": (colours, "JPEG", {"quality": 92}),
}
"""{file name: (image, Pillow's writer, its options)}. AVIF has a test of its own."""


def preprocess_captions(commands, model: Path, folder: Path, files: dict) -> Preprocessed:
    """A dataset of kind caption of these files; their names are the keys."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    records = [{"key": name, "image": name, "caption": "a house"} for name in files]
    source = write_jsonl(folder / "captions.jsonl", records)
    return preprocess(commands, "caption", model, folder / "captions", source)


@pytest.fixture(scope="module")
def files_of_all_formats(tmp_path_factory, commands, model):
    """What was stored of one file of each format, and {backend: what it shows of them}."""
    files = {
        name: encode_image(make(), image_format, **options)
        for name, (make, image_format, options) in FORMATS.items()
    }
    files["jpeg_and_zeros.jpg"] += b"\0" * 4000
    folder = tmp_path_factory.mktemp("formats")
    done = preprocess_captions(commands, model, folder, files).must_succeed()
    return done, model_views(commands, done.prefix, model)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_refused_or_gives_the_same_pixels_everywhere(files_of_all_formats, name):
    done, shown = files_of_all_formats
    if name not in {reject["key"] for reject in done.rejects}:
        assert_same_pixels(shown, name)


def test_avif_is_refused_or_gives_the_same_pixels_everywhere(tmp_path, commands, model):
    files = {"a.avif": encode_image(colours(), "AVIF"), "b.png": encode_image(colours())}
    done = preprocess_captions(commands, model, tmp_path, files)
    if not done.rejects:
        assert_same_pixels(model_views(commands, done.prefix, model), "a.avif")


def assert_same_pixels(shown: dict[str, dict[str, Shown]], name: str) -> None:
    by_pillow, by_dali = (shown[backend][name] for backend in ("pillow", "dali"))
    assert (by_pillow.num_bad, by_dali.num_bad) == (0, 0)
    assert difference(by_pillow.target, by_dali.target) <= LARGEST_DIFFERENCE


def test_webp_with_exif_is_decoded_whatever_its_chunks_measure(tmp_path, commands, model):
    files = {
        f"{name}-{'odd' if is_odd else 'even'}.webp": webp_with_exif(image, 1, is_odd)
        for is_odd in (False, True)
        for name, image in (("colours", colours()), ("cut-out", cut_out()))
    }
    done = preprocess_captions(commands, model, tmp_path, files).must_succeed()
    shown = model_view(commands, done.prefix, model, "dali")
    assert [name for name in files if shown[name].num_bad] == []


def test_a_png_without_its_end_is_refused_as_truncated(tmp_path, commands, model):
    whole = encode_image(colours())
    files = {"whole.png": whole, "short.png": whole[:-20]}
    done = preprocess_captions(commands, model, tmp_path, files).must_succeed()
    found = [(reject["key"], reject["reason"]) for reject in done.rejects]
    assert found == [("short.png", "image is truncated")]
