"""The samples whose targets the score compares conditions with, for every rank that reads some of
their parts."""

from __future__ import annotations

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.instruct_stream import InstructStream, Reads
from megatron_kosmosg.data.streams import instruct_stream
from megatron_kosmosg.models.diffusion import load_vae, vae_fingerprint


def open_stream(
    config: RunConfig, device: torch.device, split: str, reads: Reads, decodes_prompts: bool
) -> InstructStream:
    """The samples of `split`; cached moments must be those of this run's VAE."""
    vae = None
    if config.data.latent_cache is not None and split == "train" and reads != "prompts":
        vae = vae_fingerprint(load_vae(config.model.diffusion.path, torch.float32))
    return instruct_stream(config, split, device.index, vae, reads, decodes_prompts)
