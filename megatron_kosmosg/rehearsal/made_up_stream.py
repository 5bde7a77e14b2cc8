"""Batches with the keys, dtypes and sizes of the stages' own, and nothing in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.workload import latent_shape
from megatron_kosmosg.rehearsal.fake_numbers import Numbers


class MadeUpStream:
    """A data set of a stage: every micro-batch has rows of `length` and `images` prompt images."""

    def __init__(
        self,
        config: RunConfig,
        length: int,
        images: int,
        *,
        reads: str = "all",
        decodes: bool = True,
    ) -> None:
        """Makes batches of always the same sizes.

        Args:
            length: tokens of a row.
            images: images of a micro-batch.
            reads: `prompts` leaves the targets out, `targets` leaves out all but these.
            decodes: False on ranks without the image tower.
        """
        self._config, self._length, self._images = config, length, images
        self._reads, self._decodes = reads, decodes

    def __getitem__(self, position: int) -> int:
        return position

    def fingerprints(self) -> dict[str, str]:
        return {}

    def lengths(self, positions: Sequence[int]) -> np.ndarray:
        return np.full(len(positions), self._length)

    def pad_to(self, samples: list[int], global_positions: Sequence[int]) -> int:
        return self._length

    def collate(
        self, samples: list[int], pad_to: int, replacements: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """No image is bad, so there are no `replacements`."""
        rows, stage = len(samples), self._config.stage
        batch = {"bad_samples": torch.zeros((), dtype=torch.int64)}
        if self._reads != "targets":
            batch |= self._prompts(rows, pad_to)
        if stage == "pretrain":
            batch["stream_positions"] = _positions(samples)
            batch["replacements"] = torch.zeros(self._images, dtype=torch.int64)
            batch["labels"] = torch.zeros(rows, pad_to, dtype=torch.int64)
            batch["loss_mask"] = torch.zeros(rows, pad_to)
        if stage == "align":
            queries = self._config.model.aligner.num_queries
            batch["clip_tokens"] = torch.zeros(rows, queries, dtype=torch.int64)
        if stage == "instruct":
            batch["stream_positions"] = _positions(samples)
            batch["condition_drop"] = torch.zeros(rows, dtype=torch.bool)
            batch["replacements"] = torch.zeros(rows, dtype=torch.int64)
            if self._reads != "prompts":
                batch |= self._targets(rows)
        return batch

    def _prompts(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        side = self._config.model.vision.image_size
        images = self._images if self._decodes else 0
        packed = {}
        if self._config.data.pack_prompts:
            packed["packed"] = torch.zeros(rows * length, dtype=torch.int64)
        return packed | {
            "tokens": torch.zeros(rows, length, dtype=torch.int64),
            "image_mask": torch.zeros(rows, length, dtype=torch.bool),
            "padding_mask": torch.zeros(rows, length, dtype=torch.bool),
            "pixel_values": torch.zeros(images, 3, side, side, dtype=torch.uint8),
        }

    def _targets(self, rows: int) -> dict[str, torch.Tensor]:
        side = self._config.data.target_image_size
        latents = latent_shape(self._config)
        batch = {
            "target_weights": torch.zeros(rows),
            "timesteps": torch.zeros(rows, dtype=torch.int64),
            "posterior_noise": torch.zeros(rows, *latents),
            "noise": torch.zeros(rows, *latents),
        }
        if self._config.data.latent_cache is None:
            pixels = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
            return batch | {"target_pixel_values": pixels}
        return batch | {"target_moments": torch.zeros(rows, 2, *latents, dtype=torch.float16)}


def _positions(samples: list[int]) -> torch.Tensor:
    """Stream positions of the rows, int64 [rows]. By these numbers pipeline stages tell each other
    of which rows they speak."""
    positions = torch.tensor(samples)
    Numbers().set_list(positions, list(samples))
    return positions
