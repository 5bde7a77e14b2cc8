"""The example programs see images as training does, and work where they are told to."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.utils import dynamic_modules_utils
from PIL import Image

from tests.support.commands import REPOSITORY, CommandFailed
from tests.support.public import KosmosGPipeline
from tests.support.tiny_pipeline import prompt_image

EXAMPLES = REPOSITORY / "examples" / "inference"


def run_example(monkeypatch, name: str, *arguments: object) -> None:
    """The program in this process, so that its modules can be watched. Raises CommandFailed."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise CommandFailed(f"{name} ended with {end.code}") from end
    finally:
        sys.modules.pop("shared", None)


def pixels_seen(call: Callable[[], object]) -> torch.Tensor:
    """[n, 3, h, w]: what the image tower reads during the call."""
    seen = []

    def look(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:
            seen.append(inputs[0].detach().clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        call()
    finally:
        handle.remove()
    if not seen:
        raise CommandFailed("no image was read")
    return seen[0]


@pytest.fixture
def caption(monkeypatch, exported) -> Callable[[Path], torch.Tensor]:
    """What the image tower reads of a file that caption_image.py is given."""

    def pixels(path: Path) -> torch.Tensor:
        arguments = ("--model", exported, "--image", path, "--max-new-tokens", 1)
        return pixels_seen(lambda: run_example(monkeypatch, "caption_image", *arguments))

    return pixels


def test_a_photo_is_captioned_upright(caption, tmp_path):
    upright = prompt_image(5, 30, 60)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    found = [caption(tmp_path / f"{name}.png") for name in ("upright", "photo")]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_cut_out_is_captioned_as_on_white(caption, tmp_path):
    image = prompt_image(3).convert("RGBA")
    image.putalpha(Image.new("L", image.size))
    image.paste(prompt_image(4, 20, 20), (10, 5))
    image.save(tmp_path / "cut-out.png")
    white = Image.new("RGBA", image.size, "WHITE")
    white.alpha_composite(image)
    white.convert("RGB").save(tmp_path / "white.png")
    found = [caption(tmp_path / f"{name}.png") for name in ("cut-out", "white")]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(640, 412), (412, 640)])
def test_a_captioned_image_is_cropped_as_in_training(caption, exported, tmp_path, size):
    # 15 of the 43 resized pixels are cut off: of 7.5 on a side, training rounds to 8.
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    pipeline = KosmosGPipeline.from_pretrained(exported)
    trained = pixels_seen(lambda: pipeline.encode_prompt([image]))
    torch.testing.assert_close(caption(tmp_path / "image.png"), trained, rtol=0, atol=0.05)


def test_the_controlnet_goes_to_the_device(monkeypatch, exported, tmp_path):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    prompt_image(1, 16, 16).save(tmp_path / "pose.png")
    moved, move = [], ControlNetModel.to

    def to(self, *where, **more):
        moved.extend(str(value) for value in (*where, *more.values()))
        return move(self, *where, **more)

    monkeypatch.setattr(ControlNetModel, "to", to)
    arguments = ("--control", tmp_path / "pose.png", "--steps", 1, "--device", "cpu")
    output = ("--output", tmp_path / "out.png", "--prompt", "a dog")
    run_example(monkeypatch, "controlnet", exported, *arguments, *output)
    assert "cpu" in moved
