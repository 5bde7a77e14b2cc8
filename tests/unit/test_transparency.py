"""Images that look the same are the same, whatever colours lie under transparent pixels.

Each reader gets a cut-out whose hidden pixels are black, and one whose are noise; both must be what
the image on white is.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.inference import caption_image
from examples.inference import shared as example
from megatron_kosmosg.construction.square_images import SquareImages
from megatron_kosmosg.data.image_headers import dali_form
from megatron_kosmosg.data.image_reading import over_white
from megatron_kosmosg.data.image_types import ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.kinds.record import Record
from megatron_kosmosg.data.samples import EntityImage
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.hf.pipeline_kosmosg import resize_and_crop
from megatron_kosmosg.inference.prompt_records import open_image_file
from megatron_kosmosg.inference.trained_model import build_prompt
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.toy import assets
from tests.support.data_helpers import encode_image

try:
    import nvidia.dali  # noqa: F401 - whether it is there

    BACKENDS = ["pillow", "dali"]
except ImportError:
    BACKENDS = ["pillow"]

SIDE = 24
TRANSFORM = ImageTransform(SIDE, "bicubic", (0.5,) * 3, (0.5,) * 3)
KINDS = ("RGBA", "LA", "palette", "key", "WEBP")


def cut_out(hidden: str, kind: str = "RGBA") -> bytes:
    """An image whose left half is transparent and, where the kind can, its middle half so."""
    rng = np.random.default_rng(3)
    pixels = np.repeat(rng.integers(0, 200, (SIDE, SIDE, 1), dtype=np.uint8), 3, axis=-1)
    if kind not in ("LA", "key"):
        pixels[..., 0] //= 2
    left = np.zeros((SIDE, SIDE), bool)
    left[:, : SIDE // 2] = True
    pixels[left] = 0
    if hidden == "noise" and kind != "key":
        pixels[left] = np.random.default_rng(5).integers(0, 256, (int(left.sum()), 1))
    alpha = np.where(left, 0, 255).astype(np.uint8)
    if kind in ("RGBA", "WEBP", "LA"):
        alpha[:, SIDE // 2] = 100
    out = io.BytesIO()
    image = Image.fromarray(np.dstack([pixels, alpha]))
    if kind == "RGBA":
        image.save(out, "PNG")
    elif kind == "LA":
        image.convert("LA").save(out, "PNG")
    elif kind == "WEBP":
        image.save(out, "WEBP", lossless=True, exact=True)
    elif kind == "palette":
        # Two entries of the palette say "nothing here"; the hidden ones differ in colour only.
        indexes = np.where(left, 0, 1 + pixels[..., 1] // 8).astype(np.uint8)
        palette = [(0, 0, 0) if hidden == "black" else (250, 10, 90)]
        palette += [(8 * i, 4 * i, 0) for i in range(32)]
        paletted = Image.fromarray(indexes, "P")
        paletted.putpalette(sum(map(list, palette), []))
        paletted.save(out, "PNG", transparency=bytes([0] + [255] * 32))
    else:
        # One colour counts as transparent, another one in each file.
        colour = (0, 0, 0) if hidden == "black" else (1, 2, 3)
        pixels[~left] = np.maximum(pixels[~left], 10)
        pixels[left] = colour
        Image.fromarray(pixels).save(out, "PNG", transparency=colour)
    return out.getvalue()


def on_white(kind: str) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3] by hand: 255 - (255 - colour) * alpha."""
    image = np.asarray(Image.open(io.BytesIO(cut_out("black", kind))).convert("RGBA"), np.float64)
    alpha = image[..., 3:] / 255
    return np.rint(255 - (255 - image[..., :3]) * alpha).astype(np.uint8)


def decode(backend: str, encoded: bytes | EntityImage) -> np.ndarray:
    """[SIDE, SIDE, 3] in levels."""
    pixels = ImageDecoder(backend).decode([encoded], TRANSFORM)[0]
    return ((pixels.numpy().transpose(1, 2, 0) * 0.5 + 0.5) * 255).round()


def construct(encoded: bytes) -> np.ndarray:
    record = Record("a", {"image": encoded}, Path())
    return np.asarray(SquareImages(Options()).square(record))


def generate(encoded: bytes, folder: Path) -> np.ndarray:
    """What tools/generate.py opens, and what its checkpoint's prompt holds."""
    (folder / "picture").write_bytes(encoded)
    opened = open_image_file(folder / "picture")
    tokenizer = Tokenizer(assets.path() / "sentencepiece.model")
    with Image.open(io.BytesIO(encoded)) as raw:
        prompt = build_prompt(["a", raw], SequenceFormat(tokenizer, 4))
    stored = Image.open(io.BytesIO(prompt.images[0]))
    assert stored.mode == opened.mode == "RGB"
    assert np.array_equal(np.asarray(stored), np.asarray(opened))
    return np.asarray(opened)


def from_pillow(function, encoded: bytes) -> np.ndarray:
    return np.asarray(function(Image.open(io.BytesIO(encoded))))


READERS = {
    **{f"training, {name}": partial(decode, name) for name in BACKENDS},
    "construction": construct,
    "pipeline": partial(from_pillow, partial(resize_and_crop, size=SIDE, name="image 1")),
    "captioning example": partial(from_pillow, caption_image.upright_rgb),
    "other examples": partial(from_pillow, example.upright_rgb),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", [*READERS, "generate"])
def test_hidden_pixels_are_white_in_every_reader(reader, kind, tmp_path):
    read = READERS.get(reader) or partial(generate, folder=tmp_path)
    black, noise = (cut_out(hidden, kind) for hidden in ("black", "noise"))
    assert black != noise
    first, second = read(black), read(noise)
    assert np.array_equal(first, second)
    assert np.abs(first.astype(int) - on_white(kind)).max() <= 1
    assert (first[:, : SIDE // 2] == 255).all() and (first[:, SIDE // 2 + 1 :] < 255).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_made_of_the_transparency_is_painted_once(backend):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    mask[:, SIDE // 2] = 100
    for hidden in ("black", "noise"):
        found = decode(backend, EntityImage(cut_out(hidden), encode_image(mask)))
        assert np.abs(found.astype(int) - on_white("RGBA")).max() <= 1
    mask[: SIDE // 2] = 0
    found = decode(backend, EntityImage(cut_out("noise"), encode_image(mask)))
    assert (found[: SIDE // 2] == 255).all()
    assert np.abs(found.astype(int) - on_white("RGBA"))[SIDE // 2 :].max() <= 1


def test_opaque_images_are_not_touched():
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for image_format in ("PNG", "JPEG", "WEBP"):
        encoded = encode_image(pixels, image_format)
        assert dali_form(encoded) is encoded
    for broken in (b"", b"no picture", encode_image(pixels)[:20]):
        assert dali_form(broken) is None
    opaque = np.dstack([pixels, np.full((SIDE, SIDE), 255, np.uint8)])
    assert np.array_equal(np.asarray(over_white(Image.fromarray(opaque))), pixels)
    for backend in BACKENDS:
        plain, with_alpha = (decode(backend, encode_image(each)) for each in (pixels, opaque))
        assert np.array_equal(plain, pixels) and np.array_equal(with_alpha, pixels)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a mask of"):
        over_white(Image.new("RGBA", (4, 4)), Image.new("L", (5, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_cut_out_costs_one_image(backend):
    images = [cut_out("black"), cut_out("black")[:-60], encode_image(np.zeros((9, 9, 3), np.uint8))]
    pixels, bad = ImageDecoder(backend).try_decode(images, TRANSFORM)
    assert [error.index for error in bad] == [1]
    assert torch.equal(pixels[0], ImageDecoder(backend).decode(images[:1], TRANSFORM)[0])
