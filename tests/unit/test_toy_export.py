"""The trained toy model that comes with the package draws held-out prompts of images and words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.open_model import open_pipeline
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.evaluation.scene_reader import compare, read_scenes, summarise
from megatron_kosmosg.toy.evaluation.toy_prompts import ToyCase, cases, images_only

FOLDER = assets.path() / "kosmosg"
NUM_PROMPTS = 16


@pytest.fixture(scope="module")
def pipeline() -> KosmosGPipeline:
    torch.set_num_threads(1)
    pipeline = open_pipeline(find_model(FOLDER), torch.float32, torch.device("cpu"))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: KosmosGPipeline, found: list[ToyCase]) -> torch.Tensor:
    """[n, 3, 32, 32] in [-1, 1]."""
    images = pipeline(
        [case.parts for case in found],
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=8,
        guidance_scale=2.0,
        output_type="pt",
    ).images
    return images * 2.0 - 1.0


@pytest.mark.parametrize("number", [1, 2])
def test_subjects_of_prompt_images_are_drawn(pipeline, number):
    found = cases(71, NUM_PROMPTS, number, images_only)
    seen = read_scenes(draw(pipeline, found), [number] * NUM_PROMPTS)
    truths = [case.scene for case in found]
    right = summarise([compare(*pair) for pair in zip(seen, truths, strict=True)])
    assert right["shape"] >= 0.9 and right["pattern"] >= 0.9 and right["all"] >= 0.75, right
    others = truths[1:] + truths[:1]
    control = summarise([compare(*pair) for pair in zip(seen, others, strict=True)])
    assert control["all"] < 0.3, control


def test_it_is_small_and_holds_no_code():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_500_000
    assert not [file for file in files if file.suffix in (".py", ".bin", ".pt")]


def test_it_draws_with_the_frozen_parts_beside_it():
    """The same bytes, which a repository keeps once."""
    for part in ("unet", "vae"):
        name = Path(part, "diffusion_pytorch_model.safetensors")
        written, shipped = FOLDER / name, assets.path() / "stable-diffusion" / name
        assert written.read_bytes() == shipped.read_bytes()
