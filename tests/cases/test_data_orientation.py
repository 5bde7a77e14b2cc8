"""Photos that a camera stored turned or mirrored (EXIF) are upright wherever they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.data_helpers import encode_image, write_jsonl
from tests.support.data_inputs import preprocess, webp_with_exif
from tests.support.model_view import difference, model_view

STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera does to the upright image before it notes this orientation."""
UPRIGHT = "upright"
LARGEST_DIFFERENCE = 6.0
"""Levels between a JPEG of the turned and one of the upright image; turned wrongly it is 40."""


def photo(image: Image.Image, orientation: int, image_format: str) -> bytes:
    """The upright image as a camera stores it."""
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = image.transpose(STORED_AS[orientation])
    if image_format == "WEBP":
        return webp_with_exif(stored, orientation, is_odd=False)
    return encode_image(stored, image_format, exif=exif, quality=95)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, commands, model) -> Path:
    """A dataset whose edits read and target one photo each: red above blue, green at the left."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.zeros((96, 64, 3), np.uint8)
    pixels[:48], pixels[48:], pixels[:, :8] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    image = Image.fromarray(pixels)
    files = {UPRIGHT: encode_image(image)} | {
        f"{name}-{orientation}": photo(image, orientation, name)
        for name in ("JPEG", "PNG", "WEBP")
        for orientation in STORED_AS
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    words = {"caption": "a house", "instruction": "make it red"}
    records = [{"key": name, "image": name, "target": name} | words for name in files]
    source = write_jsonl(folder / "edits.jsonl", records)
    return preprocess(commands, "edit", model, folder / "edits", source).must_succeed().prefix


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_prompts_and_targets_are_upright(photos, commands, model, backend):
    shown = model_view(commands, photos, model, backend)
    upright = shown[UPRIGHT]
    assert [
        key
        for key, sample in shown.items()
        if sample.num_bad
        or difference(sample.prompt[0], upright.prompt[0]) > LARGEST_DIFFERENCE
        or difference(sample.target, upright.target) > LARGEST_DIFFERENCE
    ] == []


def test_the_page_shows_what_is_stored_upright(photos, commands, model):
    shown = model_view(commands, photos, model, "pillow")
    upright = shown[UPRIGHT].stored[0]
    assert [
        key
        for key, sample in shown.items()
        if sample.stored[0].shape != upright.shape
        or difference(sample.stored[0], upright) > LARGEST_DIFFERENCE
    ] == []


def entity_records(folder: Path, orientation: int, masks: dict[str, bool]) -> Path:
    """Records with a photo of a red square at the left of a grey ground, and its mask.

    masks: {key: whether the mask is of the upright photo, not of its stored pixels}.
    """
    pixels = np.full((112, 84, 3), 128, np.uint8)
    pixels[28:84, 8:40] = (255, 0, 0)
    image = Image.fromarray(pixels)
    mask = Image.fromarray(((pixels[..., 0] == 255) * 255).astype(np.uint8))
    (folder / "photo.jpg").write_bytes(photo(image, orientation, "JPEG"))
    (folder / "target.png").write_bytes(encode_image(image))
    for key, is_upright in masks.items():
        turned = mask if is_upright else mask.transpose(STORED_AS[orientation])
        (folder / f"{key}.png").write_bytes(encode_image(turned))
    words = {"text": "dog", "span": [2, 5]}
    entities = {key: words | {"image": "photo.jpg", "mask": f"{key}.png"} for key in masks}
    # Something has to stand in for a sample that cannot be decoded.
    entities["spare"] = words | {"image": "target.png", "mask": None}
    common = {"caption": "a dog on a hill", "image": "target.png"}
    records = [common | {"key": key, "entities": [each]} for key, each in entities.items()]
    return write_jsonl(folder / "entities.jsonl", records)


def is_entity_kept(image: np.ndarray) -> bool:
    """Whether the red square is there, and of the grey around it only its edge."""
    pixels = image.astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:].max(-1) < 80)
    grey = (abs(pixels - 128) < 26).all(-1)
    return red.mean() > 0.12 and grey.mean() < 0.03


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_the_mask_of_the_stored_pixels_keeps_the_entity(tmp_path, commands, model, backend):
    source = entity_records(tmp_path, 3, {"stored": False})
    done = preprocess(
        commands, "compositional", model, tmp_path / "upside-down", source
    ).must_succeed()
    (image,) = model_view(commands, done.prefix, model, backend)["stored"].prompt
    assert is_entity_kept(image)


@pytest.mark.parametrize("key", ["stored", "upright"])
def test_either_mask_of_a_photo_on_its_side_is_usable_or_refused_by_name(
    tmp_path, commands, model, key
):
    source = entity_records(tmp_path, 8, {key: key == "upright"})
    done = preprocess(commands, "compositional", model, tmp_path / "sideways", source)
    if done.rejects:
        message = " ".join(str(value) for value in done.rejects[0].values()).lower()
        assert "exif" in message or "orientation" in message
        return
    for backend in ("pillow", "dali"):
        shown = model_view(commands, done.prefix, model, backend)[key]
        assert not shown.num_bad and is_entity_kept(shown.prompt[0]), backend
