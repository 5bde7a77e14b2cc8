"""Micro-batches of random numbers with the keys, dtypes and shapes of a stage's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.rehearsal.made_up_stream import MadeUpStream


class RandomStream(MadeUpStream):
    """Every micro-batch is the same one; images are dealt to its rows in turn."""

    def __init__(self, config: RunConfig, rows: int, length: int, images_per_row: float) -> None:
        super().__init__(config, length, round(rows * images_per_row))
        positions = list(range(rows))
        self._batch = super().collate(positions, length)
        self._fill(config)

    def collate(
        self, samples: list[int], pad_to: int, replacements: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        return dict(self._batch)

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        return dict(self._batch)

    def _fill(self, config: RunConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        batch, vocabulary = self._batch, config.model.vocab_size
        draw = {
            "tokens": lambda like: torch.randint(4, vocabulary, like.shape, generator=generator),
            "labels": lambda like: torch.randint(4, vocabulary, like.shape, generator=generator),
            "timesteps": lambda like: torch.randint(0, 1000, like.shape, generator=generator),
            "clip_tokens": lambda like: torch.randint(0, 50, like.shape, generator=generator),
            "target_weights": torch.ones_like,
            "loss_mask": torch.ones_like,
        }
        for name, tensor in batch.items():
            if name in draw:
                batch[name] = draw[name](tensor).to(tensor.dtype)
            elif name.endswith(("pixel_values", "noise")) or name == "target_moments":
                batch[name] = _noise(tensor, generator)
        self._place_images(config.model.resampler.num_latent_queries)

    def _place_images(self, queries: int) -> None:
        """Image i is in row i % rows, behind those that are there."""
        mask = self._batch["image_mask"]
        for image in range(self._images):
            place, row = divmod(image, len(mask))
            start = 2 + place * (queries + 2)
            if start + queries > mask.shape[1]:
                raise ValueError(f"{self._images} images do not fit in rows of {mask.shape[1]}")
            mask[row, start : start + queries] = True
        if "loss_mask" in self._batch:
            self._batch["loss_mask"].masked_fill_(mask, 0)


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.dtype is torch.uint8:
        return torch.randint(0, 256, like.shape, dtype=torch.uint8, generator=generator)
    return torch.rand(like.shape, generator=generator).to(like.dtype)
