"""Images of held-out prompts, drawn by whichever rank holds the U-Net."""

from __future__ import annotations

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.models.sampler import sample_images
from megatron_kosmosg.score.keyed_noise import RandomKey


def generate_images(
    config: RunConfig,
    diffusion: FrozenDiffusion,
    condition: torch.Tensor,
    positions: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Images [n, 3, size, size] in [-1, 1], float32, with noise keyed by position [n].

    Args:
        condition: [n + 1, c, d], its last row the null condition.
    """
    key = RandomKey(config.training.seed, "held-out-pictures")
    shape = diffusion.latent_shape((size, size))
    return sample_images(
        diffusion,
        condition[:-1],
        condition[-1:],
        key.normal(positions, "initial_noise", shape).to(condition.device),
        num_inference_steps=config.logging.num_inference_steps,
        guidance_scale=config.logging.guidance_scale,
    )
