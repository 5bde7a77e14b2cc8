"""Pretrained models of their folders' sizes: configurations are read, weights are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusion_flops import CLIP_VIT_L_TEXT
from megatron_kosmosg.models.stable_diffusion_sizes import SD_V1_5_UNET, SD_V1_5_VAE
from megatron_kosmosg.stages import stage_facts

UNET, TEXT_ENCODER = "model.diffusion.path", "model.clip_text.path"
_LOADER = "from_pretrained"
_CLIP_HEAD = 64
_STABLE_DIFFUSION: dict[str, dict[str, Any]] = {
    "unet/config.json": {"_class_name": "UNet2DConditionModel", **SD_V1_5_UNET},
    "vae/config.json": {"_class_name": "AutoencoderKL", **SD_V1_5_VAE},
    "scheduler/scheduler_config.json": {
        "_class_name": "DDPMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    },
}
"""Version 1.5, by file."""


def answer_for_files() -> None:
    """Replaces `from_pretrained`, for the rest of this process."""
    readers: tuple[tuple[type, Callable], ...] = (
        (UNet2DConditionModel, _from_diffusers),
        (AutoencoderKL, _from_diffusers),
        (CLIPTextModel, _from_transformers),
    )
    for cls, read in readers:
        setattr(cls, _LOADER, classmethod(read))


def with_frozen_folders(config: RunConfig, folder: Path) -> RunConfig:
    """The config with folders of Stable Diffusion v1.5's sizes, written into `folder`, in place of
    those that its stage reads and that are not on this machine. The image tower's folder, which has
    only weights, is left out."""
    model, missing = config.model, missing_folders(config)
    model = replace(model, vision=replace(model.vision, path=None))
    if UNET in missing:
        for part, sizes in _STABLE_DIFFUSION.items():
            _write(folder / part, sizes)
        model = replace(model, diffusion=replace(model.diffusion, path=str(folder)))
    if TEXT_ENCODER in missing:
        shape = CLIP_VIT_L_TEXT
        sizes = {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.width,
            "intermediate_size": shape.ffn_width,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.width // _CLIP_HEAD,
            "max_position_embeddings": shape.positions,
            "projection_dim": shape.width,
        }
        _write(folder / "text_encoder/config.json", sizes)
        model = replace(model, clip_text=replace(model.clip_text, path=str(folder)))
    return replace(config, model=model)


def missing_folders(config: RunConfig) -> list[str]:
    """Keys of the frozen models that the stage reads and whose sizes are not on this machine."""
    facts, model = stage_facts(config.stage), config.model
    needed = {
        UNET: (facts.has_unet, model.diffusion.path, _STABLE_DIFFUSION),
        TEXT_ENCODER: (facts.has_text_encoder, model.clip_text.path, ("text_encoder/config.json",)),
    }
    return [
        key
        for key, (is_read, path, files) in needed.items()
        if is_read and (path is None or any(not (Path(path) / file).is_file() for file in files))
    ]


def _write(path: Path, sizes: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sizes), encoding="utf-8")


def _from_diffusers(cls: Any, folder: Path, *, torch_dtype: torch.dtype, **_: Any):
    return cls.from_config(cls.load_config(folder)).to(torch_dtype)


def _from_transformers(cls: Any, folder: Path, *, dtype: torch.dtype, **_: Any):
    return cls(CLIPTextConfig.from_pretrained(folder)).to(dtype)
