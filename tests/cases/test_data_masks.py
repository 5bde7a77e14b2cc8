"""Masks as segmentation programs write them: the entity is kept, or the record refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.support.data_helpers import encode_image, write_jsonl
from tests.support.data_inputs import Preprocessed, preprocess
from tests.support.model_view import model_views

INSIDE = np.zeros((64, 64), np.uint8)
INSIDE[16:48, 16:48] = 1
"""Where the entity is."""


def masks() -> dict[str, Image.Image]:
    """The same mask in the forms that programs give it."""
    full = Image.fromarray(INSIDE * 255)
    palette = Image.fromarray(INSIDE).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    return {
        "0 and 255": full,
        "0 and 1": Image.fromarray(INSIDE),
        "class 38": Image.fromarray(INSIDE * 38),
        "one bit": full.convert("1"),
        "palette": palette,
        "three equal channels": full.convert("RGB"),
        "opaque alpha": full.convert("LA"),
        "16 bits": Image.fromarray(INSIDE.astype(np.uint16) * 65535),
    }


@pytest.fixture(scope="module")
def by_mask(tmp_path_factory, commands, model) -> tuple[Preprocessed, dict[str, dict]]:
    """What was stored of a red entity on grey with each of the masks, and how it is shown."""
    folder = tmp_path_factory.mktemp("masks")
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[INSIDE > 0] = (255, 0, 0)
    (folder / "image.png").write_bytes(encode_image(pixels))
    records = []
    for name, mask in masks().items():
        (folder / f"{name}.png").write_bytes(encode_image(mask))
        entity = {"text": "dog", "span": [2, 5], "image": "image.png", "mask": f"{name}.png"}
        records.append({"key": name, "caption": "a dog on a hill", "image": "image.png"})
        records[-1]["entities"] = [entity]
    source = write_jsonl(folder / "entities.jsonl", records)
    done = preprocess(commands, "compositional", model, folder / "entities", source)
    return done, model_views(commands, done.must_succeed().prefix, model)


def reason(by_mask: tuple[Preprocessed, dict], name: str) -> str | None:
    """Why the record with this mask was refused."""
    return {str(reject["key"]): reject["reason"] for reject in by_mask[0].rejects}.get(name)


def is_shown_on_white(by_mask: tuple[Preprocessed, dict], name: str) -> bool:
    """Whether both backends show the entity, and white around it."""
    images = [shown[name].prompt[0].astype(int) for shown in by_mask[1].values()]
    return all(
        abs(image[28, 28] - (255, 0, 0)).max() < 10 and abs(image[2, 2] - 255).max() < 10
        for image in images
    )


@pytest.mark.parametrize("name", masks())
def test_no_mask_erases_the_entity(by_mask, name):
    assert reason(by_mask, name) is not None or is_shown_on_white(by_mask, name)


@pytest.mark.parametrize("name", ["0 and 255", "one bit"])
def test_masks_as_documented_are_taken(by_mask, name):
    assert reason(by_mask, name) is None


@pytest.mark.parametrize("name", ["three equal channels", "opaque alpha", "16 bits"])
def test_masks_that_can_mean_one_thing_only_are_taken(by_mask, name):
    assert reason(by_mask, name) is None


def test_a_palette_is_not_said_to_have_several_channels(by_mask):
    assert reason(by_mask, "palette") != "mask has more than one channel"
