"""The denoising loss in float64 from diffusers' own parts, one image after another."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from megatron_kosmosg.data.random_keys import torch_generator


def denoising_errors(
    folder: Path, seed: int, condition: torch.Tensor, pixels: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error per image in the units of the prediction, timesteps), in float64.

    folder: a Stable Diffusion; condition: [b, c, d], differentiable; pixels: targets
    [b, 3, H, W]; positions: stream positions [b], which with the seed say what is drawn.
    """
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").double()
    vae = AutoencoderKL.from_pretrained(folder / "vae").double()
    for part in (unet, vae):
        part.eval().requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    errors, timesteps = [], []
    for row, position in enumerate(positions.tolist()):
        draw = {
            tag: torch_generator(seed, "instruct", position, tag)
            for tag in ("timestep", "posterior", "noise")
        }
        timestep = int(torch.rand((), generator=draw["timestep"]) * 1000)
        posterior = vae.encode(pixels[row : row + 1].double()).latent_dist
        shape = posterior.mean.shape[1:]
        noise_of = {t: torch.randn(shape, generator=draw[t]).double() for t in draw}
        latents = posterior.mean + posterior.std * noise_of["posterior"]
        latents = latents * vae.config.scaling_factor
        alpha = scheduler.alphas_cumprod[timestep].double()
        noise = noise_of["noise"]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        output = unet(
            noisy, torch.tensor([timestep]), encoder_hidden_states=condition[row : row + 1].double()
        ).sample
        target = {
            "epsilon": noise[None],
            "sample": latents,
            "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,
        }[scheduler.config.prediction_type]
        errors.append((output - target).square().mean())
        timesteps.append(timestep)
    return torch.stack(errors), torch.tensor(timesteps)
