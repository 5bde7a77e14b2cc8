"""The evaluator `toy`: toy-world metrics of drawn images, by the judge that reads both.

The truth is what the judge reads in the target picture, so no attributes need to travel with data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.evaluation.evaluator import DrawnImages
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


class ToyEvaluator:
    """Needs images of 32 x 32 pixels."""

    def __init__(self, config: RunConfig) -> None:
        """The toy world has no settings."""

    def run(self, images: DrawnImages) -> Iterator[tuple[str, float]]:
        """Shares right and hue errors in degrees of the results against the targets."""
        counts = count_entities(images.targets)
        seen, truth = read_scenes(images.results, counts), read_scenes(images.targets, counts)
        verdicts = [compare(*pair) for pair in zip(seen, truth, strict=True)]
        yield from summarise(verdicts).items()
