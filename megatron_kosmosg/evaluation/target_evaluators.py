"""The evaluators `dino` and `clip`: how much a run's drawn images resemble their targets.

The same networks, pixels and cosines as in `kosmosg evaluate`, on the few images of the grid. The
network is on the device for as long as it computes, and not while the run trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.evaluation.evaluator import DrawnImages
from megatron_kosmosg.evaluation.networks import (
    IMAGE_RULES,
    Weights,
    find_clip,
    find_dino,
    open_network,
)


class DinoEvaluator:
    """An `Evaluator`."""

    def __init__(self, config: RunConfig) -> None:
        """registry.check_evaluators has found `evaluation.dino`."""
        self._path = Path(str(config.evaluation.dino))

    def run(self, images: DrawnImages) -> Iterator[tuple[str, float]]:
        """The mean cosine of results and targets. Raises ConfigError for other weights."""
        yield "similarity", _mean_cosine(images, find_dino, self._path)


class ClipEvaluator:
    """An `Evaluator`."""

    def __init__(self, config: RunConfig) -> None:
        """registry.check_evaluators has found `evaluation.clip`."""
        self._path = Path(str(config.evaluation.clip))

    def run(self, images: DrawnImages) -> Iterator[tuple[str, float]]:
        """The mean cosine of results and targets (CLIP-I). Raises ConfigError as above."""
        yield "similarity", _mean_cosine(images, find_clip, self._path)


def _mean_cosine(images: DrawnImages, find: Callable[[Path], Weights], path: Path) -> float:
    weights = find(path)
    rule = IMAGE_RULES[weights.network]
    network = open_network(weights, images.results.device)
    sides = [
        network.features(torch.stack([rule(_image(pixels)) for pixels in side])).double()
        for side in (images.results, images.targets)
    ]
    return float(F.cosine_similarity(sides[0], sides[1]).mean())


def _image(pixels: torch.Tensor) -> Image.Image:
    """RGB with 8 bits, as a file would hold it, of [3, height, width] in [-1, 1]."""
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
