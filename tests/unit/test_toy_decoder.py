"""The shipped toy Stable Diffusion, opened by stock diffusers, draws held-out captions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors import safe_open

from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.evaluation.scene_reader import (
    SceneComparison,
    compare,
    read_scenes,
    summarise,
)
from megatron_kosmosg.toy.toy_captions import ALL_WORDS, caption
from megatron_kosmosg.toy.world import Scene, coarse_index, hue_distance, sample_scene

FOLDER = assets.path() / "stable-diffusion"
NUM_PROMPTS = 32


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline, captions: list[str]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipeline(captions, generator=generator, **options).images
    return images * 2.0 - 1.0


def judged(seen: list[Scene], truths: list[Scene]) -> list[SceneComparison]:
    return [compare(*pair) for pair in zip(seen, truths, strict=True)]


@pytest.mark.parametrize(("number", "threshold"), [(1, 0.95), (2, 0.9)])
def test_heldout_captions_are_drawn_right(pipeline, number, threshold):
    truths = [sample_scene((61, number, i), number, True) for i in range(NUM_PROMPTS)]
    images = draw(pipeline, [caption(scene, "coarse", i) for i, scene in enumerate(truths)])
    assert images.shape == (NUM_PROMPTS, 3, 32, 32)
    seen = read_scenes(images, [number] * NUM_PROMPTS)
    found = summarise(judged(seen, truths))
    assert found["all"] >= threshold and found["background_word"] >= threshold, found
    control = summarise(judged(seen, truths[1:] + truths[:1]))
    assert control["all"] < 0.2 and control["hue_median"] > 45.0, control


def test_fine_words_are_drawn_finer_than_coarse_ones(pipeline):
    truths = [sample_scene((62, i), 1, True) for i in range(NUM_PROMPTS)]
    errors = {}
    for words in ("coarse", "fine"):
        images = draw(pipeline, [caption(scene, words, i) for i, scene in enumerate(truths)])
        seen = read_scenes(images, [1] * NUM_PROMPTS)
        errors[words] = summarise(judged(seen, truths))["hue_mean"]
    assert errors["fine"] < 0.75 * errors["coarse"] < 15.0, errors


def test_second_colours_belong_to_their_own_entity(pipeline):
    drawn = (sample_scene((63, i), 2, True) for i in range(400))
    truths = [s for s in drawn if all(e.pattern != "plain" for e in s.entities)][:NUM_PROMPTS]
    images = draw(pipeline, [caption(scene, "coarse", i) for i, scene in enumerate(truths)])
    seen = read_scenes(images, [2] * len(truths))
    right = [
        coarse_index(there.hue_b) == coarse_index(true.hue_b)
        or hue_distance(there.hue_b, true.hue_b) < 30.0
        for image, truth in zip(seen, truths, strict=True)
        for there, true in zip(image.entities, truth.entities, strict=True)
    ]
    assert sum(right) / len(right) >= 0.9


def test_every_toy_word_is_one_token(pipeline):
    for word in ALL_WORDS:
        assert len(pipeline.tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def stored_types(path: Path) -> set[str]:
    with safe_open(path, "pt") as tensors:
        return {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}


def test_all_weights_are_half_precision_and_small():
    trained = assets.path() / "kosmosg"  # an export with a test of its own
    files = [f for f in assets.path().rglob("*") if f.is_file() and trained not in f.parents]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    assert {kind for path in weights for kind in stored_types(path)} == {"F16"}
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
