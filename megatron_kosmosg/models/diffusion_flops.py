"""FLOPs and parameters of the frozen Stable Diffusion parts, counted on their real classes.

The modules are built from their folder's config without memory (meta device). Where no folder is
given, or it is not on this machine, Stable Diffusion v1.5's sizes stand in for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.foreign_files import read_json
from megatron_kosmosg.models.diffusers_types import from_config_of_folder, unet_config, vae_config
from megatron_kosmosg.models.stable_diffusion_sizes import SD_V1_5_UNET, SD_V1_5_VAE


class DiffusionFlops(NamedTuple):
    """FLOPs of the frozen networks for one image."""

    forward: int
    """Of the U-Net."""
    backward: int
    """Of the U-Net, to the condition alone."""
    encode: int
    """Of the VAE's encoder."""


@dataclass(frozen=True)
class TextShape:
    """The sizes of a CLIP text encoder, on which its FLOPs depend."""

    num_layers: int
    width: int
    ffn_width: int
    positions: int
    vocab_size: int

    @property
    def num_parameters(self) -> int:
        """Embeddings, layers with biases and two norms each, final norm."""
        layer = 4 * self.width**2 + 2 * self.width * self.ffn_width
        layer += 9 * self.width + self.ffn_width  # biases of q k v o and fc2, two norms, fc1's
        embeddings = (self.vocab_size + self.positions) * self.width
        return embeddings + self.num_layers * layer + 2 * self.width


CLIP_VIT_L_TEXT = TextShape(12, 768, 3072, 77, 49408)


def clip_text_shape(path: str | None) -> TextShape:
    """The text encoder in `path`/text_encoder; ViT-L/14's where there is none."""
    config_file = Path(path or "") / "text_encoder" / "config.json"
    if path is None or not config_file.is_file():
        return CLIP_VIT_L_TEXT
    try:
        sizes = read_json(config_file)
        return TextShape(
            num_layers=int(sizes["num_hidden_layers"]),
            width=int(sizes["hidden_size"]),
            ffn_width=int(sizes["intermediate_size"]),
            positions=int(sizes["max_position_embeddings"]),
            vocab_size=int(sizes["vocab_size"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{config_file} is no text encoder's: {error!r}") from error


def score_flops(
    path: str | None, image_size: int, condition_length: int, *, with_vae: bool
) -> float:
    """FLOPs per image of what pulls a gradient out of the frozen U-Net.

    U-Net forward, its backward to the condition alone, and the VAE encoder unless cached.
    """
    counted = diffusion_flops(path, image_size, condition_length)
    return counted.forward + counted.backward + (counted.encode if with_vae else 0)


def unet_and_vae(path: str | None) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """The two modules on the meta device, frozen."""
    folder = Path(path or "")
    with torch.device("meta"):
        if path is not None and (folder / "unet" / "config.json").is_file():
            unet = from_config_of_folder(UNet2DConditionModel, folder / "unet")
            vae = from_config_of_folder(AutoencoderKL, folder / "vae")
        else:
            unet = UNet2DConditionModel(**SD_V1_5_UNET)
            vae = AutoencoderKL(**SD_V1_5_VAE)
    return unet.eval().requires_grad_(False), vae.eval().requires_grad_(False)


@cache
def diffusion_parameters(path: str | None) -> dict[str, int]:
    """Parameters of U-Net and VAE, counted on the meta device, once per process."""
    unet, vae = unet_and_vae(path)
    return {
        "unet": sum(p.numel() for p in unet.parameters()),
        "vae": sum(p.numel() for p in vae.parameters()),
    }


@cache
def diffusion_flops(path: str | None, image_size: int, condition_length: int) -> DiffusionFlops:
    """Counted on the meta device, once per process."""
    unet, vae = unet_and_vae(path)
    sizes = unet_config(unet)
    latent_size = image_size // 2 ** (len(vae_config(vae).block_out_channels) - 1)
    latents = torch.empty(1, sizes.in_channels, latent_size, latent_size, device="meta")
    condition = torch.empty(
        1, condition_length, sizes.cross_attention_dim, device="meta", requires_grad=True
    )
    timesteps = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        prediction = unet(latents, timesteps, condition).sample
        forward = counter.get_total_flops()
        prediction.sum().backward()
    backward = counter.get_total_flops() - forward
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(torch.empty(1, 3, image_size, image_size, device="meta"))
    return DiffusionFlops(forward, backward, counter.get_total_flops())
