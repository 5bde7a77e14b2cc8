"""Stands for the sample streams of the real stages: rows that depend on their position alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from megatron_kosmosg.data.streams import Reads
from tests.support.tiny_models import random_batch

LONGEST = 15
_PROMPT = ("tokens", "image_mask", "padding_mask", "pixel_values")
_PADDING = {"tokens": 1, "padding_mask": True}
"""What fills a row up, where it is not zero."""


class TinyStream:
    """Rows of 11 to 15 positions (pretrain: all 15), every second one with an image."""

    def __init__(
        self, stage: str, split: str = "train", reads: Reads = "all", packs: bool = False
    ) -> None:
        self._stage, self._reads, self._packs = stage, reads, packs
        self._offset = {"train": 1000, "heldout": 500000}[split]

    def __getitem__(self, position: int) -> int:
        return position

    def fingerprints(self) -> dict[str, str]:
        return {"tiny": "rows"}

    def lengths(self, positions: Sequence[int]) -> np.ndarray:
        if self._stage == "pretrain":
            return np.full(len(positions), LONGEST)
        return np.array([11 + position * 7 % 5 for position in positions])

    def pad_to(self, samples: list[int], global_positions: Sequence[int]) -> int:
        """The loss of `align` depends on the length: all micro-batches of an update get one."""
        return max(self.lengths(global_positions if self._stage == "align" else samples))

    def collate(self, samples: list[int], pad_to: int) -> dict[str, torch.Tensor]:
        rows = [self._row(position, pad_to) for position in samples]
        batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        if self._stage == "instruct":
            batch["stream_positions"] = torch.tensor(samples)
            batch["replacements"] = torch.zeros_like(batch["stream_positions"])
        batch["bad_samples"] = torch.tensor(0)
        if self._packs:
            batch["packed"] = (~batch["padding_mask"]).flatten().nonzero().flatten()
        if self._reads == "prompts":
            batch = {key: value for key, value in batch.items() if not key.startswith("target_")}
        if self._reads == "targets":
            batch = {key: value for key, value in batch.items() if key not in _PROMPT}
        return batch

    def _row(self, position: int, pad_to: int) -> dict[str, torch.Tensor]:
        (length,) = self.lengths([position])
        pair = random_batch(self._stage, 2, int(length), seed=self._offset + position)
        index = position % 2  # the first row of the pair has the image
        row = {key: value[index : index + 1] for key, value in pair.items()}
        return {
            key: F.pad(value, (0, pad_to - length), value=_PADDING.get(key, 0))
            if key in ("tokens", "image_mask", "padding_mask", "labels", "loss_mask")
            else value
            for key, value in row.items()
        }
