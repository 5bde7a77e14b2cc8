"""From a condition to images: the reverse diffusion loop with classifier-free guidance.

DPM-Solver++ (arXiv 2211.01095) on the folder's own noise schedule, as the authors sample.
"""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler

from megatron_kosmosg.models.diffusers_types import from_config, previous_latents
from megatron_kosmosg.models.diffusion import FrozenDiffusion


@torch.no_grad()
def sample_images(
    diffusion: FrozenDiffusion,
    condition: torch.Tensor,
    null_condition: torch.Tensor,
    initial_noise: torch.Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Images [n, 3, height, width] in [-1, 1], float32.

    Args:
        condition: [n, c, d].
        null_condition: [1, c, d].
        initial_noise: [n, channels, h, w], N(0, 1).
        guidance_scale: 1 or less samples without guidance, at half the cost.
    """
    scheduler = from_config(DPMSolverMultistepScheduler, diffusion.noise_scheduler.config)
    scheduler.set_timesteps(num_inference_steps, device=condition.device)
    latents = initial_noise * scheduler.init_noise_sigma
    guided = guidance_scale > 1
    if guided:
        condition = torch.cat([null_condition.expand_as(condition), condition])
    for timestep in scheduler.timesteps:
        rows = torch.cat([latents, latents]) if guided else latents
        output = diffusion.predict(rows, timestep.expand(len(rows)), condition)
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents = previous_latents(scheduler, output, timestep, latents)
    return diffusion.decode(latents)
