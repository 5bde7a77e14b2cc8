"""Pretrained models of their folders' sizes: configurations are read, weights are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


def answer_for_files() -> None:
    """Replaces `from_pretrained`, for the rest of this process."""
    for cls in (UNet2DConditionModel, AutoencoderKL):
        cls.from_pretrained = classmethod(_from_diffusers)
    CLIPTextModel.from_pretrained = classmethod(_from_transformers)


def _from_diffusers(cls: Any, folder: Path, *, torch_dtype: torch.dtype, **_: Any):
    return cls.from_config(cls.load_config(folder)).to(torch_dtype)


def _from_transformers(cls: Any, folder: Path, *, dtype: torch.dtype, **_: Any):
    return cls(CLIPTextConfig.from_pretrained(folder)).to(dtype)
