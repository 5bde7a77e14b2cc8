"""Files of the networks that score images, with random weights under the published names.

They have the form of what is published, and show that an evaluation works where nothing may be
downloaded. Their scores mean nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from megatron_kosmosg.evaluation.dino import DinoViTS16
from megatron_kosmosg.toy import assets


def write_dino(path: Path, seed: int = 1) -> Path:
    """A file of ViT-S/16's size, whose features differ from image to image."""
    torch.manual_seed(seed)
    model = DinoViTS16()
    for name, values in model.named_parameters():
        if values.dim() > 1:
            nn.init.normal_(values, std=0.05)
        elif "norm" in name and name.endswith("weight"):
            nn.init.uniform_(values, 0.5, 1.5)
        else:
            nn.init.normal_(values, std=0.02)
    torch.save(model.state_dict(), path)
    return path


def write_clip(folder: Path, seed: int = 3) -> Path:
    """A tiny model that sees what B/32 sees, with the toy's tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    shutil.copytree(assets.path() / "stable-diffusion" / "tokenizer", folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    torch.manual_seed(seed)
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config=text
        | dict(
            vocab_size=vocabulary,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        ),
        vision_config=text | dict(image_size=224, patch_size=32),
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder
