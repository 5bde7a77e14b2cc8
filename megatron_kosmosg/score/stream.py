"""The samples whose targets the score compares conditions with, for every rank that reads some of
their parts."""

from __future__ import annotations

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.instruct_stream import InstructStream, Reads
from megatron_kosmosg.data.random_keys import StreamName
from megatron_kosmosg.data.samples import Split
from megatron_kosmosg.data.streams import instruct_stream
from megatron_kosmosg.models.diffusion import FrozenDiffusion, load_vae, vae_fingerprint
from megatron_kosmosg.score.keyed_noise import KeyedNoise, ScoreNoise


def open_stream(
    config: RunConfig,
    device: torch.device,
    split: Split,
    reads: Reads,
    decodes_prompts: bool,
    diffusion: FrozenDiffusion | None = None,
) -> InstructStream:
    """The samples of `split`, with what the score draws for them: noise for `diffusion`, and in
    training which conditions are dropped. Cached latents must be those of this run's VAE."""
    vae = None
    if config.data.latent_cache is not None and split == "train" and reads != "prompts":
        vae = vae_fingerprint(load_vae(config.model.diffusion.path, torch.float32))
    noise = ScoreNoise(config.score, config.training.seed)
    stream = StreamName(config.stage, split).noise_key
    size = config.data.target_image_size

    def noise_source(positions: torch.Tensor) -> KeyedNoise:
        found: KeyedNoise = {}
        if reads != "targets" and split == "train":
            found |= noise.condition_drop(positions, stream)
        if diffusion is not None:
            shape = diffusion.latent_shape((size, size))
            found |= noise.noise(positions, stream, shape, diffusion.num_timesteps)
        return found

    return instruct_stream(config, split, device.index, vae, reads, decodes_prompts, noise_source)
