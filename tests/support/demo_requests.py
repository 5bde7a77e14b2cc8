"""What the tests of `kosmosg demo` without its page ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_kosmosg.demo.controlnets import NamedControlNet
from megatron_kosmosg.demo.studio import Studio
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.open_model import open_generator
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.evaluation.toy_prompts import subject_image
from megatron_kosmosg.toy.world import sample_scene

PAGE_VALUES = {
    "negative_prompt": "",
    "guidance": 2.0,
    "steps": 4,
    "scheduler": "dpm++",
    "seed": 3,
    "num_images": 2,
    "height": 0,
    "width": 0,
}
PROMPT = "a <image> on a yellow background"


def open_toy(
    loras: tuple[tuple[Path, float], ...] = (),
    controlnets: dict[str, NamedControlNet] | None = None,
) -> Studio:
    """The shipped toy."""
    torch.set_num_threads(1)
    source = find_model(assets.path() / "kosmosg", loras=loras)
    image_generator = open_generator(source, "saved", torch.float32, torch.device("cpu"))
    return Studio(image_generator, source, "fp32", controlnets)


def write_subject(folder: Path) -> Path:
    path = folder / "subject.png"
    subject_image(sample_scene(8, 1, True).entities[0], 8).save(path)
    return path


def silent(share: float, words: str) -> None:
    pass


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)
