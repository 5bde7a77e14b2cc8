"""Images as users have them, in prompts of the pipeline: what looks the same is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.public import KosmosGPipeline
from tests.support.tiny_pipeline import prompt_image

CLOSE = 1e-5
"""Largest difference between equal embeddings; other images are some 0.1 and more apart."""


@pytest.fixture(scope="module")
def pipeline(exported) -> KosmosGPipeline:
    return KosmosGPipeline.from_pretrained(exported)


def condition(pipeline, prompt, **arguments) -> torch.Tensor:
    """What the U-Net is told."""
    return pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, **arguments)[0]


def difference(pipeline, first: Image.Image, second: Image.Image) -> float:
    """Between what two images become."""
    pair = [condition(pipeline, [image]) for image in (first, second)]
    return float((pair[0] - pair[1]).abs().max())


def test_other_images_are_far_apart(pipeline):
    assert difference(pipeline, prompt_image(1), prompt_image(2)) > 1000 * CLOSE


def cut_out(hidden: int) -> Image.Image:
    """A red square on nothing; `hidden` is the level under transparent pixels."""
    image = Image.new("RGBA", (40, 40), (hidden, hidden, hidden, 0))
    image.paste(Image.new("RGBA", (20, 20), (200, 30, 30, 255)), (10, 10))
    return image


@pytest.mark.parametrize("hidden", [0, 255, 90])
def test_a_cut_out_is_what_it_is_on_white(pipeline, hidden):
    white = Image.new("RGBA", (40, 40), "WHITE")
    white.alpha_composite(cut_out(hidden))
    assert difference(pipeline, cut_out(hidden), white.convert("RGB")) <= CLOSE


def test_a_photo_on_its_side_is_read_upright(pipeline, tmp_path):
    upright = prompt_image(5, 30, 60)
    exif = Image.Exif()
    exif[0x112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    assert difference(pipeline, Image.open(tmp_path / "photo.png"), upright) <= CLOSE


def test_16_bit_grey_is_what_its_8_bit_copy_is(pipeline, tmp_path):
    levels = np.linspace(0, 255, 40 * 40).round().astype(np.uint8).reshape(40, 40)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    opened = Image.open(tmp_path / "grey.png")
    assert difference(pipeline, opened, Image.fromarray(levels)) <= CLOSE


DOG = prompt_image(1)


def path(folder: Path) -> str:
    DOG.save(folder / "dog.png")
    return str(folder / "dog.png")


def array(folder: Path) -> np.ndarray:
    return np.asarray(DOG)


def tensor(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(DOG).copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (path, ("dog.png", "path", "str")),
        (array, ("ndarray", "array of")),
        (tensor, ("Tensor",)),
    ],
)
def test_an_image_in_another_form_is_taken_or_named(pipeline, tmp_path, form, names):
    expected = condition(pipeline, "a <image>", images=DOG)
    try:
        found = condition(pipeline, "a <image>", images=form(tmp_path))
    except (TypeError, ValueError, RuntimeError) as error:
        assert any(name in str(error) for name in names), error
        assert "ambiguous" not in str(error)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)
