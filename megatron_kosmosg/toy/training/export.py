"""Trained parts -> folders in Hugging Face's layouts: fp16 safetensors, replaced as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel

from megatron_kosmosg.toy.training import checkpoint, decoder, vae

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def stable_diffusion(
    unet_weights: dict[str, Tensor],
    codec: AutoencoderKL,
    text_model: CLIPTextModel,
    tokenizer_folder: Path,
    folder: Path,
) -> None:
    """Writes unet/ vae/ scheduler/ text_encoder/ tokenizer/ model_index.json under `folder`."""
    with checkpoint.replaced_folder(folder) as temporary:
        unet = decoder.build(codec.config["latent_channels"], text_model.config.hidden_size)
        unet.load_state_dict(unet_weights)
        unet.half().save_pretrained(temporary / "unet")
        # A loaded autoencoder would write the path it came from into its config.
        shipped = vae.build()
        shipped.register_to_config(scaling_factor=codec.config["scaling_factor"])
        shipped.load_state_dict(codec.state_dict())
        shipped.half().save_pretrained(temporary / "vae")
        decoder.noise_scheduler().save_pretrained(temporary / "scheduler")
        text_model.half().save_pretrained(temporary / "text_encoder")
        shutil.copytree(tokenizer_folder, temporary / "tokenizer")
        index = json.dumps(MODEL_INDEX, indent=2) + "\n"
        (temporary / "model_index.json").write_text(index, encoding="utf-8")
