"""diffusers' networks and schedulers with the types that they have; its own annotations differ.

By those a config is a plain dict, `from_config` and `from_pretrained` may give tuples, and `to` has
lost its `self`. The casts for such reasons are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

Configured = TypeVar("Configured", bound=ConfigMixin)


class UNetConfig(Protocol):
    """What is read of a U-Net's config."""

    in_channels: int
    sample_size: int
    cross_attention_dim: int


class VaeConfig(Protocol):
    """What is read of a VAE's config."""

    block_out_channels: Sequence[int]
    scaling_factor: float
    shift_factor: float | None


class NoiseScheduleConfig(Protocol):
    """What is read of a noise scheduler's config."""

    num_train_timesteps: int
    prediction_type: str


def unet_config(unet: UNet2DConditionModel) -> UNetConfig:
    """What `unet` was built from."""
    return cast(UNetConfig, unet.config)


def vae_config(vae: AutoencoderKL) -> VaeConfig:
    """What `vae` was built from."""
    return cast(VaeConfig, vae.config)


def schedule_config(noise_scheduler: DDPMScheduler) -> NoiseScheduleConfig:
    """What `noise_scheduler` was built from."""
    return cast(NoiseScheduleConfig, noise_scheduler.config)


def from_config(kind: type[Configured], config: Any) -> Configured:
    """A network or scheduler of the class `kind`. config: of another one, or of `load_config`.

    diffusers gives a tuple for return_unused_kwargs=True alone.
    """
    return cast(Configured, kind.from_config(config))


def from_config_of_folder(kind: type[Configured], folder: Path) -> Configured:
    """A network of the sizes in `folder`/config.json, without the weights there."""
    return from_config(kind, kind.load_config(folder))


def load_noise_scheduler(folder: Path) -> DDPMScheduler:
    """The noise scheduler that `folder` describes."""
    return cast(DDPMScheduler, DDPMScheduler.from_pretrained(folder))


def move(network: torch.nn.Module, *place: torch.device, memory_format: Any = None) -> None:
    """Moves a network to a device, a memory format or both, in place."""
    cast(Any, network).to(*place, memory_format=memory_format)


def posterior(vae: AutoencoderKL, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
    """What the VAE's encoder gives for images: a tuple for return_dict=False alone."""
    return cast(Any, vae.encode(pixel_values)).latent_dist


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What the VAE's decoder gives for latents of any float dtype, not of FloatTensor's alone."""
    return cast(Any, vae.decode(cast(torch.FloatTensor, latents))).sample


def velocity(
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The schedule's v of latents and noise; timesteps of any integer dtype, not IntTensor's."""
    return noise_scheduler.get_velocity(latents, noise, cast(torch.IntTensor, timesteps))


def previous_latents(
    scheduler: DPMSolverMultistepScheduler,
    output: torch.Tensor,
    timestep: torch.Tensor,
    latents: torch.Tensor,
) -> torch.Tensor:
    """The latents one step of the solver nearer to an image, given the U-Net's output for these."""
    return cast(Any, scheduler.step(output, timestep, latents)).prev_sample
