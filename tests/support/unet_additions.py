"""A ControlNet and a LoRA with random weights, of the shapes of a U-Net."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def write_additions(pipeline: Any, folder: Path) -> Path:
    """`folder`/net and `folder`/lora, as diffusers saves them, of the U-Net of `pipeline`."""
    generator = torch.Generator().manual_seed(2)
    unet = pipeline.unet
    # It halves the control image once less than it has channels, down to the size of the latents.
    channels = (4,) * pipeline.vae_scale_factor.bit_length()
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    controlnet.save_pretrained(folder / "net")
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(adapted)
    layers = {name: torch.randn(value.shape, generator=generator) for name, value in layers.items()}
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)
    return folder
