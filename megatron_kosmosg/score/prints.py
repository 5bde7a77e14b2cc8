"""Fingerprints of what decides the numbers of a score rank."""

from __future__ import annotations

import hashlib
import json

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusion import FrozenDiffusion


def diffusion_prints(config: RunConfig, diffusion: FrozenDiffusion) -> dict[str, str]:
    """The fingerprints of U-Net, VAE and noise schedule as loaded, and of the settings that they
    run with."""
    described = dict(diffusion.noise_scheduler.config).items()
    schedule = {name: value for name, value in described if not name.startswith("_")}
    return {
        "U-Net": _weights(diffusion.unet),
        "VAE": _weights(diffusion.vae),
        "noise schedule": _words(schedule),
        "dtype": str(diffusion.unet.dtype),
        "settings": _words([config.training.seed, config.data.target_image_size, config.stage]),
    }


def _weights(module: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=12, person=b"kosmosg-score")
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}|".encode())
        values = tensor.detach().to("cpu").contiguous()
        digest.update(memoryview(values.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _words(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
