"""Toy-world metrics of pictures that were drawn during training, by the judge that reads both.

The truth is what the judge reads in the target picture, so no attributes need to travel with data.
"""

from __future__ import annotations

import torch

from megatron_kosmosg.toy.judging.toy_judge import compare, read_scenes, summarise

SAME_COLOUR = 0.25
"""Distance of RGB values in [-1, 1] below which two pixels show the same colour."""
MIDDLE, MIN_ROWS = 16, 8
"""Column between two entities, and rows of it that one entity alone covers at least; the outermost
points of two entities touch fewer."""


def count_entities(pictures: torch.Tensor) -> list[int]:
    """Entities in each true picture [n, 3, 32, 32]: one covers the middle column, two flank it."""
    background = pictures[:, :, 1, 1, None]
    covered = (pictures[:, :, :, MIDDLE] - background).norm(dim=1) >= SAME_COLOUR
    return [1 if rows >= MIN_ROWS else 2 for rows in covered.sum(dim=1).tolist()]


def judge_pictures(results: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Shares right and hue errors in degrees of `results` against `targets`, [n, 3, 32, 32]."""
    counts = count_entities(targets)
    seen, truth = read_scenes(results, counts), read_scenes(targets, counts)
    verdicts = [compare(*pair) for pair in zip(seen, truth, strict=True)]
    return {f"toy_{name}": value for name, value in summarise(verdicts).items()}
