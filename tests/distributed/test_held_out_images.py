"""The grid of held-out prompts is the same image on every layout, drawn by one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.evaluation.evaluator import GeneratedImages
from megatron_kosmosg.evaluation.registry import EVALUATORS
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.stages.held_out_images import held_out_images
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.training.wrapping import wrap_model
from tests.support.ranks import run_ranks
from tests.support.run_case import records, run_stage
from tests.support.tiny_models import (
    random_batch,
    replace_section,
    tiny_config,
    write_stable_diffusion,
)

LENGTH = 13
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}


class Prompts:
    """Stands for the stream: positions are all that `collate` needs."""

    def __getitem__(self, position: int) -> int:
        return position

    def pad_to(self, samples: list[int], global_positions: list[int]) -> int:
        return LENGTH

    def collate(self, samples: list[int], pad_to: int) -> dict:
        batch = random_batch("instruct", len(samples), pad_to, seed=3)
        return batch | {"replacements": torch.zeros(len(samples), dtype=torch.long)}


def grid(config: RunConfig) -> np.ndarray | None:
    """The grid's pixels on the rank that draws."""
    context = platform.initialize(config)
    try:
        stage = InstructStage(config, context)
        chunks = wrap_model(stage.build_model(context), config)
        for chunk in chunks:
            chunk.eval()
        drawn = held_out_images(config, context, stage._generate, Prompts(), chunks)
        return np.asarray(drawn.images["held_out_prompts"]) if drawn.images else None
    finally:
        platform.teardown()


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


def config_of(stable_diffusion: Path, **parallel) -> RunConfig:
    config = tiny_config("instruct", stable_diffusion, stable_diffusion, **parallel)
    return replace_section(config, "logging", num_images=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def alone(stable_diffusion) -> np.ndarray:
    return run_ranks(1, grid, config_of(stable_diffusion))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_same_grid_once(layout, alone, stable_diffusion):
    results = run_ranks(2, grid, config_of(stable_diffusion, **LAYOUTS[layout]))
    (drawn,) = [result for result in results if result is not None]
    assert drawn.std() > 10
    assert np.abs(drawn.astype(int) - alone).max() <= 2


def test_half_precision_draws_nearly_the_same(alone, stable_diffusion):
    """The model's outputs are half precision here, the sampler's latents are not."""
    config = replace_section(config_of(stable_diffusion), "training", precision="bf16")
    (drawn,) = run_ranks(1, grid, config)
    assert np.abs(drawn.astype(int) - alone).mean() < 3


class Grid:
    """An evaluator that says what it was given."""

    def __init__(self, config: RunConfig) -> None:
        self._iterations = config.training.train_iters

    def run(self, images: GeneratedImages) -> Iterator[tuple[str, float]]:
        yield "rows", float(len(images.results))
        yield "of_iterations", float(self._iterations)
        yield "same_shape", float(images.results.shape == images.targets.shape)
        yield "difference", (images.results - images.targets).abs().mean().item()


def train_with_grid(config: RunConfig) -> None:
    EVALUATORS["grid"] = f"{__name__}:Grid"
    run_stage(config)


def measured_run(stable_diffusion: Path, folder: Path, **settings) -> RunConfig:
    """The config of a few updates whose drawn images are measured by `Grid`."""
    config = replace_section(config_of(stable_diffusion), "evaluation", grid=["grid"], **settings)
    config = replace_section(config, "data", heldout={"tiny": BlendEntry("tiny")}, num_workers=1)
    config = replace_section(config, "training", train_iters=5, eval_iters=1)
    config = replace_section(config, "optimizer", lr_warmup_iters=1)
    return replace_section(
        config, "logging", output_dir=str(folder), num_images=2, tensorboard=False
    )


def test_an_evaluator_is_run_on_the_images_that_a_training_draws(stable_diffusion, tmp_path):
    """On two ranks, of which one draws; the numbers stand in the run's metrics, under its name."""
    config = replace_section(measured_run(stable_diffusion, tmp_path), "training", train_iters=2)
    run_ranks(2, train_with_grid, config)
    (measured,) = [line for line in records(config) if "heldout_loss" in line]
    assert measured["heldout_grid_rows"] == 2 and measured["heldout_grid_of_iterations"] == 2
    assert measured["heldout_grid_same_shape"] == 1 and measured["heldout_grid_difference"] > 0


@pytest.mark.parametrize("num_images", [2, 0])
def test_a_fixed_subset_is_measured_every_so_often(stable_diffusion, tmp_path, num_images):
    """More prompts than the grid shows, drawn in several passes, the same each time; not by an
    evaluation that lies between."""
    config = measured_run(stable_diffusion, tmp_path, every=2, num_prompts=5)
    config = replace_section(config, "training", eval_interval=1)
    config = replace_section(config, "logging", num_images=num_images)
    run_ranks(2, train_with_grid, config)
    held_out = [line for line in records(config) if "heldout_loss" in line]
    assert [line["iteration"] for line in held_out] == [1, 2, 3, 4, 5]
    rows = [line.get("heldout_grid_rows") for line in held_out]
    assert rows == [None, 5, None, 5, 5]
    assert all(line["heldout_grid_same_shape"] == 1 for line in held_out[1::2])
