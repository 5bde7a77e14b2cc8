"""Start images, ControlNets and LoRAs of `kosmosg demo`, without the page."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.demo.controlnets import control_image_of, named_folders, opened
from megatron_kosmosg.demo.requests import generation_request, page_values
from megatron_kosmosg.demo.studio import Studio
from megatron_kosmosg.inference import model_source
from megatron_kosmosg.inference.image_files import read_settings
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.open_model import open_controlnet
from megatron_kosmosg.inference.prompt_records import PromptError
from megatron_kosmosg.toy import assets
from tests.support.demo_requests import PAGE_VALUES, PROMPT, open_toy, pixels, silent, write_subject
from tests.support.unet_additions import write_additions


@pytest.fixture(scope="module")
def studio() -> Studio:
    return open_toy()


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Path:
    return write_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def additions(studio, tmp_path_factory) -> Path:
    """A random ControlNet (`net/`) and a random LoRA (`lora/`) of the toy's U-Net."""
    return write_additions(studio.image_generator.pipeline, tmp_path_factory.mktemp("additions"))


@pytest.fixture(scope="module")
def extended(additions) -> Studio:
    """The toy with both; the LoRA by its folder, at half its strength."""
    folders = named_folders([f"my canny={additions / 'net'}"])
    nets = opened(folders, lambda folder: open_controlnet(folder, torch.float32))
    return open_toy(((additions / "lora", 0.5),), nets)


def drawn(studio: Studio, folder: Path, prompt: str = "a red circle", **values) -> np.ndarray:
    """The first image."""
    request = generation_request(prompt, [], PAGE_VALUES | {"num_images": 1} | values)
    return pixels(studio.generate(request, folder, silent, threading.Event())[0]).astype(int)


def test_a_start_image_is_kept_the_more_the_less_strength(studio, subject, tmp_path):
    start = tmp_path / "start.png"
    with Image.open(subject) as image:
        image.resize((96, 64)).save(start)
        kept = np.asarray(image.resize((48, 32)).crop((8, 0, 40, 32))).astype(int)
    far = np.abs(drawn(studio, tmp_path) - kept).mean()
    near, middle = (
        np.abs(drawn(studio, tmp_path, start_image=start, strength=strength) - kept).mean()
        for strength in (0.25, 0.75)
    )
    assert near < middle < far and near < 0.6 * far


def test_steps_of_a_start_image_are_a_share(studio, subject, tmp_path):
    recorded = []
    request = generation_request(
        PROMPT, [subject], PAGE_VALUES | {"start_image": subject, "strength": 0.5}
    )
    made = studio.generate(
        request, tmp_path, lambda share, words: recorded.append(share), threading.Event()
    )
    assert recorded == [0.5, 1.0]
    assert not np.array_equal(pixels(made[0]), pixels(made[1])), "seeds count up"
    settings = read_settings(made[1])
    assert settings["strength"] == 0.5 and page_values(settings)["strength"] == 0.5
    with pytest.raises(PromptError, match="strength 0.05 of 4 steps is none"):
        drawn(studio, tmp_path, start_image=subject, strength=0.05)


def test_what_controlnet_and_lora_do_is_said_and_done_again(extended, studio, subject, tmp_path):
    plain, with_additions = drawn(studio, tmp_path / "a"), drawn(extended, tmp_path / "b")
    without = drawn(extended, tmp_path / "c", lora_scale=0)
    assert np.array_equal(without, plain) and not np.array_equal(with_additions, plain)
    values = {"controlnet": "my canny", "control_image": subject, "lora_scale": 0}
    controlled = drawn(extended, tmp_path / "d", **values, control_scale=0.7)
    settings = read_settings(tmp_path / "d" / "image-0.png")
    assert not np.array_equal(controlled, plain)
    assert np.array_equal(drawn(extended, tmp_path / "e", **values, control_scale=0), plain)
    both = drawn(extended, tmp_path / "f", **values, start_image=subject, strength=0.5)
    assert both.shape == plain.shape and not np.array_equal(both, controlled)

    assert extended.lora_names == ["lora"] and extended.controlnet_names == ["my canny"]
    recorded = {"controlnet": "my canny", "control_scale": 0.7, "lora_scale": 0.0}
    assert extended.additions(settings) == recorded and extended.missing_additions(settings) == []
    again = drawn(extended, tmp_path / "g", control_image=subject, **recorded)
    assert np.array_equal(again, controlled)
    assert studio.additions(settings)["controlnet"] == "none"
    assert studio.missing_additions(settings) == ["ControlNet", "LoRA"]
    for damaged in ({"controlnet": 5}, {"controlnet": ["x", "y"]}, {"loras": {"a": 1}}):
        with pytest.raises(PromptError, match="damaged"):
            extended.additions(damaged)


def test_a_controlnet_and_its_image_belong_together(extended, subject, tmp_path):
    for values, message in (
        ({"control_image": subject}, "choose a ControlNet"),
        ({"controlnet": "my canny"}, "needs a control image"),
        ({"controlnet": "../x", "control_image": subject}, "there is no ControlNet '../x' here"),
        ({"control_scale": 9}, "control_scale is a number from 0 to 2"),
        ({"lora_scale": None}, "lora_scale is a number"),
        ({"strength": float("nan")}, "strength is a number from 0.05 to 1"),
    ):
        with pytest.raises(PromptError, match=message):
            drawn(extended, tmp_path, **values)


def test_controlnets_have_names(additions, tmp_path):
    net = str(additions / "net")
    assert named_folders([net, f"b={net}"]) == {"net": Path(net), "b": Path(net)}
    odd = tmp_path / "a=b"
    odd.symlink_to(net)
    assert named_folders([str(odd)]) == {"net": odd}
    for values, message in (
        ([f"={net}"], "give NAME=FOLDER"),
        (["a="], "give NAME=FOLDER"),
        ([f"a={net}", f"a={net}"], "the name a is taken"),
        ([f"none={net}"], "the name none is taken"),
        ([f"a={tmp_path}/missing"], "no config.json there"),
    ):
        with pytest.raises(ConfigError, match=message):
            named_folders(values)
    assert "edges" in control_image_of("control_v11p_sd15_Canny")
    assert control_image_of("mine") == "the image that it was trained on"


def test_a_folder_of_one_lora_is_its_file(additions, tmp_path):
    (file,) = (additions / "lora").iterdir()
    found = find_model(assets.path() / "kosmosg", loras=((additions / "lora", 1.0),))
    assert found.loras == ((file, 1.0),)
    for path, message in ((tmp_path, "0 .safetensors files"), (tmp_path / "x", "no such file")):
        with pytest.raises(ConfigError, match=message):
            find_model(assets.path() / "kosmosg", loras=((path, 1.0),))


def test_a_lora_without_peft_says_what_to_install(additions, monkeypatch):
    monkeypatch.setattr(model_source, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--lora needs peft: pip install .*\[diffusers\]"):
        find_model(assets.path() / "kosmosg", loras=((additions / "lora", 1.0),))
