"""The image tower: stock CLIP ViT, post-norm on every token, tokens scaled to length one.

The tower is replicated over tensor-parallel ranks. All but its last block is frozen, so splitting
it would pay collectives in every block to save little memory (0.3 of 1.9 billion parameters, nearly
all without gradients or optimizer state). Replicas compute identical gradients for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig, VisionConfig
from megatron_kosmosg.config.untrusted_folders import check_model_config
from megatron_kosmosg.models.no_images import no_images
from megatron_kosmosg.models.read_frozen import reading_frozen


class VisionEncoder(nn.Module):
    """Turns images [n, 3, H, W] into features [n, p+1, h_v], the class token first."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(tower_config(config.model.vision))
        self._begun: _Begun | None = None

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The features [n, p+1, h_v] of normalised pixel_values [n, 3, H, W]; n may be 0."""
        tower = self.tower
        if len(pixel_values) == 0:
            shape = (0, tower.embeddings.num_positions, tower.config.hidden_size)
            return no_images(pixel_values.new_empty(shape), self.parameters())
        if self._begun is not None and self.has_begun(pixel_values):
            hidden, blocks = self._begun.hidden, self._begun.blocks_to_come
            self._begun = None
        else:
            hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
            blocks = list(tower.encoder.layers)
        for block in blocks:
            hidden = block(hidden, None)
        return F.normalize(tower.post_layernorm(hidden), dim=-1)

    def frozen_blocks(self) -> list[nn.Module]:
        """The blocks before the first one with a parameter that trains; none where what stands
        before the blocks trains."""
        frozen: list[nn.Module] = []
        if any(_trains(part) for part in (self.tower.embeddings, self.tower.pre_layrnorm)):
            return frozen
        for block in self.tower.encoder.layers:
            if _trains(block):
                break
            frozen.append(block)
        return frozen

    def has_begun(self, pixel_values: torch.Tensor) -> bool:
        """Whether what `begin` computed for these images is kept."""
        return self._begun is not None and self._begun.pixel_values is pixel_values

    def begin(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes the frozen blocks for pixel_values [n, 3, H, W], n > 0, and keeps their output,
        in the place of any that was kept before. Returns the images in the tower's precision:
        `forward` has to get this very tensor, to go on from there."""
        tower, frozen = self.tower, self.frozen_blocks()
        images = pixel_values.to(tower.embeddings.patch_embedding.weight.dtype)
        hidden = tower.pre_layrnorm(tower.embeddings(images))
        for block in frozen:
            hidden = block(hidden, None)
        self._begun = _Begun(images, hidden, list(tower.encoder.layers)[len(frozen) :])
        return images

    def trainable_modules(self, num_layers: int) -> list[nn.Module]:
        """The last `num_layers` blocks and the post-norm."""
        blocks = list(self.tower.encoder.layers)
        return [*blocks[len(blocks) - num_layers :], self.tower.post_layernorm]


@dataclass(frozen=True)
class _Begun:
    """A forward pass up to the first block that trains."""

    pixel_values: torch.Tensor
    hidden: torch.Tensor
    """[n, p+1, h_v], without a graph."""
    blocks_to_come: list[nn.Module]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def tower_config(vision: VisionConfig) -> CLIPVisionConfig:
    """The Hugging Face config of the tower; quick_gelu and eps 1e-5 as in OpenAI's ViT-L/14."""
    return CLIPVisionConfig(
        num_hidden_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        attention_dropout=0.0,
    )


def load_tower(encoder: VisionEncoder, vision: VisionConfig) -> None:
    """Fill the tower from the Hugging Face folder `model.vision.path`.

    Raises ConfigError when the folder's sizes, activation or epsilon are not the config's.
    """
    folder = Path(vision.path or "")
    if vision.path is None or not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.vision.path={vision.path!r} has no config.json; give the folder of a Hugging "
            "Face CLIPVisionModel"
        )
    check_model_config(folder / "config.json")
    with reading_frozen(f"model.vision.path={vision.path}"):
        loaded = CLIPVisionModel.from_pretrained(folder, torch_dtype=torch.float32)
    configured, stored = encoder.tower.config, loaded.config
    names = {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_act": None,
        "layer_norm_eps": None,
    }
    for name, setting in names.items():
        value, required = getattr(stored, name), getattr(configured, name)
        if value != required:
            remedy = f"set model.vision.{setting}={value}" if setting else "give another tower"
            raise ConfigError(
                f"The tower in model.vision.path={vision.path!r} has {name}={value}, the config "
                f"needs {required}; {remedy}"
            )
    encoder.tower.load_state_dict(loaded.state_dict(), strict=True)
