"""Generates the prompts of a cell and lets the evaluator read the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_kosmosg.data.random_keys import torch_generator
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.models.sampler import sample_images
from megatron_kosmosg.toy.evaluation.scene_reader import SceneComparison, compare, read_scenes
from megatron_kosmosg.toy.world import Scene, render_batch

STREAM = "toy-evaluation"
ROWS_PER_PASS = 64
"""Images that are drawn at once."""


@dataclass(frozen=True)
class Sampling:
    """The settings of drawing; the same for every model that is compared."""

    num_inference_steps: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class GeneratedScenes:
    """Images of one cell and what the evaluator sees in them."""

    images: torch.Tensor
    """[n, 3, height, width] in [-1, 1]."""
    seen: list[Scene]

    def comparisons(self, truths: Sequence[Scene]) -> list[SceneComparison]:
        """The comparison of each image with its truth."""
        return [compare(seen, truth) for seen, truth in zip(self.seen, truths, strict=True)]


@torch.no_grad()
def generate_scenes(
    diffusion: FrozenDiffusion,
    condition: torch.Tensor,
    null_condition: torch.Tensor,
    num_entities: int,
    sampling: Sampling,
) -> GeneratedScenes:
    """Images of the conditions [n, c, d]; start noise depends on seed and row only."""
    shape = diffusion.latent_shape()
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch_generator(sampling.seed, STREAM, row, "noise"))
            for row in range(len(condition))
        ]
    )
    images = torch.cat(
        [
            sample_images(
                diffusion,
                condition[start : start + ROWS_PER_PASS],
                null_condition,
                noise[start : start + ROWS_PER_PASS],
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
            )
            for start in range(0, len(condition), ROWS_PER_PASS)
        ]
    )
    return GeneratedScenes(images, read_scenes(images, [num_entities] * len(images)))


def true_images(truths: Sequence[Scene]) -> GeneratedScenes:
    """The scenes as they should look: the evaluator's ceiling."""
    images = render_batch(truths)
    return GeneratedScenes(images, read_scenes(images, [len(scene.entities) for scene in truths]))
