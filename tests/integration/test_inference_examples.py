"""Every example of drawing with an exported folder runs on a tiny one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from safetensors.torch import save_file

from tests.support.tiny_models import TARGET_SIZE
from tests.support.tiny_pipeline import prompt_image, tiny_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples" / "inference"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported folder, images, another checkpoint and a LoRA."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("examples")
    pipeline = tiny_pipeline(folder)
    pipeline.save_pretrained(folder / "exported")
    for seed, name in enumerate(("dog", "hat", "pose")):
        prompt_image(seed, TARGET_SIZE, TARGET_SIZE).save(folder / f"{name}.png")
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = pipeline.unet.get_submodule(layer.removeprefix("unet.")).weight.shape[0]
    lora = {f"{layer}.lora_A.weight": torch.randn(2, width)}
    lora[f"{layer}.lora_B.weight"] = torch.randn(width, 2)
    save_file(lora, folder / "style.safetensors")
    torch.manual_seed(1)
    for name in ("unet", "vae"):
        part = getattr(pipeline, name)
        type(part).from_config(part.config).save_pretrained(folder / "other" / name)
    return folder


def run(folder: Path, monkeypatch, name: str, *arguments: str) -> Path:
    """Runs the example as a script; the image it wrote."""
    output = folder / f"{name}.png"
    common = ["--prompt", "<image> and <image>", "--image", "dog.png", "--image", "hat.png"]
    command = ["exported", *common, "--steps", "3", "--output", str(output), "--device", "cpu"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *command, *arguments])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.modules.pop("shared", None)
    return output


@pytest.mark.parametrize(
    ("name", "arguments", "images", "different"),
    [
        ("text_to_image", ["--num-images", "2"], 2, 2),
        ("controlnet", ["--control", "pose.png"], 1, 1),
        ("lora", ["--lora", "style.safetensors"], 4, 3),  # fused is as full strength
        ("image_to_image", ["--start", "pose.png"], 1, 1),
        ("other_checkpoint", ["--checkpoint", "other"], 2, 2),
        ("low_precision", ["--dtype", "bf16"], 1, 1),
        ("schedulers", [], 3, 2),  # Euler's steps are DDIM's
    ],
)
def test_it_draws(folder, monkeypatch, capsys, name, arguments, images, different) -> None:
    """`different`: at least so many of the images differ from each other."""
    output = run(folder, monkeypatch, name, *arguments)
    pixels = np.asarray(Image.open(output))
    assert pixels.shape == (TARGET_SIZE, images * TARGET_SIZE, 3)
    drawn = np.split(pixels, images, axis=1)
    assert len({prompt_image.tobytes() for prompt_image in drawn}) >= different
    assert f"{images} x {TARGET_SIZE}" in capsys.readouterr().out


def test_bad_input_is_said_without_a_traceback(folder, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(folder, monkeypatch, "text_to_image", "--prompt", "no placeholder")
    assert exit_.value.code == 2
    assert "0 <image> placeholders, but 2 images" in capsys.readouterr().err
