"""Trains the toy AutoencoderKL: 32x32 images <-> 8x8 latents of unit deviation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from megatron_kosmosg.toy.training import checkpoint, pool

LATENT_CHANNELS = 12
KL_WEIGHT = 3e-5


def build() -> AutoencoderKL:
    """An untrained autoencoder with a spatial factor of 4."""
    blocks: dict[str, Any] = {  # Any: diffusers annotates a single block
        "block_out_channels": (24, 48, 48),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(
        **blocks,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
    )


def posterior(model: AutoencoderKL, pixels: Tensor) -> DiagonalGaussianDistribution:
    """The distribution of the latents of images [n, 3, 32, 32] in [-1, 1]."""
    found: Any = model.encode(pixels)  # Any: annotated as a tuple, too (return_dict=False)
    return found.latent_dist


def loss_of(model: AutoencoderKL, pixels: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scalars: squared error per pixel value, and KL per latent value."""
    distribution = posterior(model, pixels)
    latents = distribution.sample(generator=noise)
    decode: Any = model.decode  # Any: annotated for FloatTensor, and as a tuple, too
    error = (decode(latents).sample - pixels).square().mean()
    return error, distribution.kl().mean() / latents[0].numel()


def train(run: Path, steps: int, batch_size: int, learning_rate: float, seed: int) -> AutoencoderKL:
    """The trained autoencoder in fp32; continues from RUN/vae.pt and leaves its result there."""
    torch.manual_seed(seed)
    untrained: Any = build()  # Any: no annotation of `to` takes a memory format alone
    model: AutoencoderKL = untrained.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    average = checkpoint.Average(model, 0.998)
    start = 0
    if (state := checkpoint.load(run / "vae.pt")) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, start = state["average"], state["step"]
    drawn = pool.with_subjects(seed, pool.scenes(seed, 12000, 0.6), 3)
    images = pool.images(drawn)
    progress = pool.StepProgress("vae", steps, 100, start)
    for step in range(start, steps):
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(images), (batch_size,), generator=noise)
        pixels = pool.from_bytes(images[rows]).contiguous(memory_format=torch.channels_last)
        ramp = min(1.0, (step + 1) / 100)
        decay = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * ramp * max(decay, 0.01)
        error, divergence = loss_of(model, pixels, noise)
        (error + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model, step)
        progress.update(step + 1, mse=error.item(), kl=divergence.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"average": average.weights, "step": step + 1}
            checkpoint.save(run / "vae.pt", state)
    return finish(average.weights, images[:2048])


@torch.no_grad()
def finish(weights: dict[str, Tensor], images: Tensor) -> AutoencoderKL:
    """The autoencoder with these weights, its scaling factor set so that latents have unit std."""
    model = build()
    model.load_state_dict(weights)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat(
        [
            posterior(model, pool.from_bytes(part)).sample(generator=generator)
            for part in images.split(128)
        ]
    )
    model.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return model.requires_grad_(False)
