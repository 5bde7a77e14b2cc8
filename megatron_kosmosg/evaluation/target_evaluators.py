"""The evaluators `dino` and `clip`: how much a run's drawn images resemble their targets, and how
well they follow the words of their prompts.

The same networks, pixels and cosines as in `kosmosg evaluate`, on a few images. The network is on
the device for as long as it computes, and not while the run trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.evaluation.evaluator import GeneratedImages
from megatron_kosmosg.evaluation.networks import (
    IMAGE_RULES,
    ClipNetwork,
    DinoNetwork,
    ImageNetwork,
    find_clip,
    find_dino,
)
from megatron_kosmosg.evaluation.preprocessing import PixelRule

BATCH = 32
"""Images that a network sees at once."""


class DinoEvaluator:
    """The `Evaluator` of DINO's similarity to the targets."""

    def __init__(self, config: RunConfig) -> None:
        """Opens the network. registry.check_evaluators has found `evaluation.dino` before."""
        self._path = Path(str(config.evaluation.dino))

    def run(self, images: GeneratedImages) -> Iterator[tuple[str, float]]:
        """The mean cosine of results and targets. Raises ConfigError for other weights."""
        network = DinoNetwork(find_dino(self._path), images.results.device)
        sides = [
            _features(network, IMAGE_RULES["dino"], pixels)
            for pixels in (images.results, images.targets)
        ]
        yield "similarity", float(F.cosine_similarity(sides[0], sides[1]).mean())


class ClipEvaluator:
    """The `Evaluator` of CLIP's similarity to the targets and to the words."""

    def __init__(self, config: RunConfig) -> None:
        """Opens the network. registry.check_evaluators has found `evaluation.clip` before."""
        self._path = Path(str(config.evaluation.clip))

    def run(self, images: GeneratedImages) -> Iterator[tuple[str, float]]:
        """The mean cosine of results and targets (CLIP-I), and of results and the prompts' words
        (CLIP-T) over those that CLIP can read whole. Raises ConfigError as above."""
        network = ClipNetwork(find_clip(self._path), images.results.device)
        results, targets = (
            _features(network, IMAGE_RULES["clip"], pixels)
            for pixels in (images.results, images.targets)
        )
        yield "similarity", float(F.cosine_similarity(results, targets).mean())
        texts = {i: text for i, text in enumerate(images.texts) if text and network.reads(text)}
        if texts:
            words = network.text_features(list(texts.values())).double()
            found = F.cosine_similarity(results[list(texts)], words)
            yield "text_similarity", float(found.mean())


def _features(network: ImageNetwork, rule: PixelRule, images: torch.Tensor) -> torch.Tensor:
    """The features of images [n, 3, height, width] in [-1, 1], float64 [n, d]."""
    blocks = [
        network.features(torch.stack([rule(_image(pixels)) for pixels in block]))
        for block in images.split(BATCH)
    ]
    return torch.cat(blocks).double()


def _image(pixels: torch.Tensor) -> Image.Image:
    """RGB with 8 bits, as a file would hold it, of [3, height, width] in [-1, 1]."""
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
