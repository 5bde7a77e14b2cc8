"""How much of a subject can be read from the image tower by a linear map: ridge regression.

Fitted on crops of training combinations, measured on held-out ones, from tokens scaled to length
one, as the model reads them: from all of them side by side, or from their mean. Only the mean tells
towers apart: side by side, even random weights keep the colours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel

from megatron_kosmosg.toy.training import clip, pool
from megatron_kosmosg.toy.world import PATTERNS, SHAPES, Scene, sample_scene, subject_scene

RIDGE = 1e-5


@dataclass(frozen=True)
class LinearProbe:
    """Accuracies are shares; hue errors are degrees of the first colour."""

    shape: float
    pattern: float
    hue_mean: float
    hue_median: float


def crops(seed: int, count: int, heldout: bool) -> list[Scene]:
    """Subject crops, every second one on white."""
    scenes = [sample_scene((seed, i), 1, heldout) for i in range(count)]
    return [
        subject_scene(scene.entities[0], scene.background_hue if i % 2 else None, (seed, i))
        for i, scene in enumerate(scenes)
    ]


@torch.no_grad()
def features(tower: CLIPVisionModel, scenes: list[Scene], mean: bool) -> Tensor:
    """The inputs of the probe, float64: [n, tokens * width + 1] of all tokens, or [n, width + 1] of
    their mean."""
    parts = [F.normalize(clip.tokens(tower, p), dim=-1) for p in pool.images(scenes).split(128)]
    tokens = torch.cat(parts).double()
    flat = tokens.mean(1) if mean else tokens.flatten(1)
    return torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], 1)


def targets(scenes: list[Scene]) -> Tensor:
    """The outputs of the probe, float64 [n, 2 + shapes + patterns]: cos and sin of the hue, then
    one-hot rows."""
    entities = [scene.entities[0] for scene in scenes]
    angle = torch.tensor([e.hue_a for e in entities], dtype=torch.float64) * (math.pi / 180)
    shape = F.one_hot(torch.tensor([SHAPES.index(e.shape) for e in entities]), len(SHAPES))
    pattern = F.one_hot(torch.tensor([PATTERNS.index(e.pattern) for e in entities]), len(PATTERNS))
    return torch.cat([angle.cos()[:, None], angle.sin()[:, None], shape, pattern], 1)


def probe(
    tower: CLIPVisionModel, mean: bool, count: int = 4000, heldout: int = 600, seed: int = 5
) -> LinearProbe:
    """How well ridge regression reads a subject from the tower's tokens, or from their mean."""
    train, test = crops(seed, count, False), crops(seed + 1, heldout, True)
    inputs, outputs = features(tower, train, mean), targets(train)
    gram = inputs.T @ inputs / count
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, inputs.T @ outputs / count)
    found, truth = features(tower, test, mean) @ weights, targets(test)
    hue = torch.atan2(found[:, 1], found[:, 0]) - torch.atan2(truth[:, 1], truth[:, 0])
    error = torch.atan2(hue.sin(), hue.cos()).abs() * (180 / math.pi)
    last = 2 + len(SHAPES)

    def right(columns: slice) -> float:
        same = found[:, columns].argmax(1) == truth[:, columns].argmax(1)
        return same.double().mean().item()

    return LinearProbe(
        right(slice(2, last)), right(slice(last, None)), error.mean().item(), error.median().item()
    )
