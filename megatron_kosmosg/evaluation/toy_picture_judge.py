"""Toy-world metrics of pictures that were drawn during training, by the judge that reads both.

The truth is what the judge reads in the target picture, so no attributes need to travel with data.
"""

from __future__ import annotations

import torch

from megatron_kosmosg.evaluation.toy_judge import compare, read_scenes, summarise

SAME_COLOUR = 0.25
"""Distance of RGB values in [-1, 1] below which two pixels show the same colour."""


def count_entities(pictures: torch.Tensor) -> list[int]:
    """Entities in each true picture [n, 3, 32, 32]: alone, one covers the centre; two leave it."""
    corner, centre = pictures[:, :, 1, 1], pictures[:, :, 16, 16]
    is_background = (corner - centre).norm(dim=1) < SAME_COLOUR
    return [2 if background else 1 for background in is_background.tolist()]


def judge_pictures(results: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Shares right and hue errors in degrees of `results` against `targets`, [n, 3, 32, 32]."""
    counts = count_entities(targets)
    seen, truth = read_scenes(results, counts), read_scenes(targets, counts)
    verdicts = [compare(*pair) for pair in zip(seen, truth, strict=True)]
    return {f"toy_{name}": value for name, value in summarise(verdicts).items()}
