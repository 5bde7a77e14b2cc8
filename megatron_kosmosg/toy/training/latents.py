"""What the decoder learns to draw: scenes of training combinations and their latent posteriors.

The autoencoder runs once per scene; files of 2048 posteriors in fp16 lie in RUN/latents.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from megatron_kosmosg.toy.training import checkpoint, pool, vae
from megatron_kosmosg.toy.world import Scene, render_batch, sample_scene

PER_FILE = 2048


def scenes_of(seed: int, file: int) -> list[Scene]:
    """The scenes of one file: two of three hold two entities."""
    return [sample_scene((seed, file, i), 2 if i % 3 else 1, False) for i in range(PER_FILE)]


class Posteriors:
    """Scenes, their scaled latent posteriors, and which of them hold one and two entities."""

    def __init__(self, scenes: list[Scene], mean: Tensor, std: Tensor) -> None:
        self.scenes, self.mean, self.std = scenes, mean, std
        counts = torch.tensor([len(scene.entities) for scene in scenes])
        self.rows = {number: (counts == number).nonzero().flatten() for number in (1, 2)}

    def sample(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Latents drawn from the posteriors of some rows, float32 [len(rows), channels, 8, 8]."""
        mean = self.mean[rows].float()
        return mean + self.std[rows].float() * torch.randn(mean.shape, generator=generator)


def posteriors(run: Path, codec: AutoencoderKL, files: int, seed: int) -> Posteriors:
    """All files of RUN/latents; those that are missing are made first."""
    progress = pool.StepProgress("latents", files, 1)
    scenes: list[Scene] = []
    parts = []
    for file in range(files):
        drawn = scenes_of(seed, file)
        path = run / "latents" / f"{seed}-{PER_FILE}-{file:03d}.pt"
        part = checkpoint.load(path)
        if part is None:
            part = encode(codec, drawn)
            checkpoint.save(path, part)
            progress.update(file + 1, std=part["mean"].float().std().item())
        scenes += drawn
        parts.append(part)
    mean, std = (torch.cat([part[key] for part in parts]) for key in ("mean", "std"))
    return Posteriors(scenes, mean, std)


@torch.no_grad()
def encode(codec: AutoencoderKL, scenes: list[Scene]) -> dict[str, Tensor]:
    """The scaled posteriors of the scenes: {"mean", "std"}, float16 [n, channels, 8, 8]."""
    found = [
        vae.posterior(codec, render_batch(scenes[start : start + pool.CHUNK]))
        for start in range(0, len(scenes), pool.CHUNK)
    ]
    scale = codec.config["scaling_factor"]
    return {
        "mean": torch.cat([each.mean * scale for each in found]).half(),
        "std": torch.cat([each.std * scale for each in found]).half(),
    }
