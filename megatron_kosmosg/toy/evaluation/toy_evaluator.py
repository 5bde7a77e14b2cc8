"""The evaluator `toy`: toy-world metrics of drawn images, by the scene reader, which reads both.

The truth is what it reads in the target image, so no attributes need to travel with data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.evaluation.evaluator import GeneratedImages
from megatron_kosmosg.toy.evaluation.scene_reader import compare, read_scenes, summarise
from megatron_kosmosg.toy.world import IMAGE_SIZE

logger = logging.getLogger(__name__)

SAME_COLOUR = 0.25
"""Distance of RGB values in [-1, 1] below which two pixels show the same colour."""
FLAT_SHARE = 0.9
"""Of the pixels along a scene's edges that show its background; few entities touch an edge."""
MIDDLE, MIN_ROWS = 16, 8
"""Column between two entities, and rows of it that one entity alone covers at least; the outermost
points of two entities touch fewer."""


def count_entities(images: torch.Tensor) -> list[int]:
    """Entities in each true image [n, 3, 32, 32]: one covers the middle column, two flank it."""
    background = images[:, :, 1, 1, None]
    covered = (images[:, :, :, MIDDLE] - background).norm(dim=1) >= SAME_COLOUR
    return [1 if rows >= MIN_ROWS else 2 for rows in covered.sum(dim=1).tolist()]


def are_scenes(images: torch.Tensor) -> bool:
    """Whether all true images can be of the toy world: 32 x 32, on a background of one colour
    that has a hue. Photos are not."""
    if tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        return False
    background = images[:, :, 1, 1]
    edges = (images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1])
    distance = (torch.cat(edges, -1) - background[..., None]).norm(dim=1)
    chroma = background.amax(1) - background.amin(1)
    flat = (distance < SAME_COLOUR).float().mean(dim=1)
    return bool((flat >= FLAT_SHARE).all() and (chroma >= SAME_COLOUR).all())


class ToyEvaluator:
    """Measures scenes of the toy world alone; of other images it has nothing to say."""

    def __init__(self, config: RunConfig) -> None:
        """Opens nothing, because the toy world has no settings."""

    def run(self, images: GeneratedImages) -> Iterator[tuple[str, float]]:
        """Shares right and hue errors in degrees of the results against the targets."""
        if not are_scenes(images.targets):
            logger.warning(
                "evaluation.grid: the held-out images are no scenes of the toy world, so the "
                "evaluator toy measures nothing; evaluation.grid=[] leaves it out"
            )
            return
        counts = count_entities(images.targets)
        seen, truth = read_scenes(images.results, counts), read_scenes(images.targets, counts)
        comparisons = [compare(*pair) for pair in zip(seen, truth, strict=True)]
        yield from summarise(comparisons).items()
