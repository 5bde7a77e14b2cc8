"""What commands say of a dataset: which images are lost and why, on a page that opens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.commands import CommandFailed, Commands, Ran
from tests.support.data_helpers import encode_image, write_jsonl
from tests.support.data_inputs import preprocess

NUM_IMAGES, NUM_BAD = 40, 20


def photo(seed: int, width: int = 32, height: int = 24, image_format: str = "PNG") -> bytes:
    """As hard to compress as photos are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height))).astype(int)
    noisy = image + rng.integers(-12, 13, image.shape)
    return encode_image(noisy.clip(0, 255).astype(np.uint8), image_format)


def write_captions(commands: Commands, model: Path, folder: Path, num_bad: int) -> Path:
    """Prefix of a dataset of photos, of which the first `num_bad` cannot be decoded."""
    folder.mkdir()
    photos = [photo(seed) for seed in range(NUM_IMAGES)]
    for number, data in enumerate(photos):
        (folder / f"{number}.png").write_bytes(data)
    records = [{"image": f"{number}.png", "caption": "a house"} for number in range(NUM_IMAGES)]
    source = write_jsonl(folder / "captions.jsonl", records)
    prefix = preprocess(commands, "caption", model, folder / "photos", source).must_succeed().prefix
    stored = Path(f"{prefix}.bin").read_bytes()
    for data in photos[:num_bad]:
        stored = stored.replace(data, b"\0" * len(data))
    Path(f"{prefix}.bin").write_bytes(stored)
    return prefix


@pytest.fixture(scope="module")
def half_lost(tmp_path_factory, commands, model) -> Path:
    """A dataset of which half of the images cannot be decoded; no cache of it is called `named`."""
    folder = tmp_path_factory.mktemp("reports") / "half"
    return write_captions(commands, model, folder, NUM_BAD)


def cache_latents(commands: Commands, past: Path, prefix: Path, name: str, backend: str) -> Ran:
    """`cache_latents.py PREFIX --name NAME` with the small Stable Diffusion."""
    return commands.tool(
        "cache_latents",
        *(prefix, "--stable-diffusion", past / "models" / "stable-diffusion", "--name", name),
        *("--image-size", 16, "--image-backend", backend),
    )


def test_a_cache_without_half_of_the_images_says_so(commands, past, half_lost):
    done = cache_latents(commands, past, half_lost, "said", "pillow").must_succeed()
    assert re.search(rf"\b{NUM_BAD}\b[^\n]*cannot be decoded", done.out), done.out


def test_a_cache_of_another_decoder_is_another_cache(commands, past, half_lost):
    cache_latents(commands, past, half_lost, "decoders", "pillow").must_succeed()
    made_from = json.loads(Path(f"{half_lost}.decoders.json").read_text())["source"]
    done = cache_latents(commands, past, half_lost, "decoders", "dali")
    is_made_again = json.loads(Path(f"{half_lost}.decoders.json").read_text())["source"] != (
        made_from
    )
    assert is_made_again or (done.code == 2 and "decoder" in done.err)


def test_the_cause_is_said_of_an_image_that_cannot_be_decoded(commands, past, half_lost):
    done = cache_latents(commands, past, half_lost, "causes", "dali").must_succeed()
    assert "Critical error in pipeline:" not in done.text, done.text


def test_a_page_of_photos_is_small(tmp_path, commands, model):
    num_photos = 4
    for number in range(num_photos):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number, 600, 450, "JPEG"))
    records = [{"image": f"{number}.jpg", "caption": "a house"} for number in range(num_photos)]
    source = write_jsonl(tmp_path / "captions.jsonl", records)
    done = preprocess(commands, "caption", model, tmp_path / "photos", source).must_succeed()
    how = (done.prefix, "--tokenizer-model", model, "--samples", num_photos)
    commands.tool("inspect_data", *how).must_succeed()
    kilobytes = Path(f"{done.prefix}.html").stat().st_size / 1e3
    assert kilobytes / num_photos < 200


def settings_of(value: dict, path: str = "") -> list[str]:
    """A YAML's tree as `section.key=value` arguments."""
    found = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            found += settings_of(inner, f"{path}{name}.")
        else:
            found.append(f"{path}{name}={json.dumps(inner)}")
    return found


def test_own_photos_are_not_judged_as_scenes_of_the_toy_world(
    tmp_path, tmp_path_factory, commands, past
):
    prefix = write_captions(commands, past / "models" / "sentencepiece.model", tmp_path / "own", 0)
    tiny = yaml.safe_load((past / "base.yaml").read_text())
    tiny["data"].pop("max_bad_samples")
    names = {"blend": ("compositional", "edit", "caption"), "heldout": ("compositional",)}
    done = commands.train(
        *("--config", "toy_instruct", *settings_of(tiny)),
        *("data.target_image_size=32", "model.vision.path=null", "checkpoint.load=runs/align"),
        *(f"data.{part}.{name}.path={prefix}" for part in names for name in names[part]),
        *("training.train_iters=1", "training.eval_iters=1", "optimizer.lr_warmup_iters=1"),
        *("logging.num_images=2", "logging.num_inference_steps=1"),
        f"logging.output_dir={tmp_path / 'run'}",
        cwd=past,
    )
    done.must_succeed()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    if "heldout_loss" not in metrics:
        raise CommandFailed("no held-out images were judged")
    assert "toy_" not in metrics + done.text
