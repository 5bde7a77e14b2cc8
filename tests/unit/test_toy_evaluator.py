"""The evaluator `toy`: counts entities, and sees equal and unequal images."""

from __future__ import annotations

import pytest
import torch

from megatron_kosmosg.config.schema import EvaluationConfig, RunConfig
from megatron_kosmosg.evaluation.evaluator import GeneratedImages, measure
from megatron_kosmosg.evaluation.registry import build_evaluators
from megatron_kosmosg.toy.evaluation.toy_evaluator import count_entities
from megatron_kosmosg.toy.world import render_batch, sample_scene

SCENES = [sample_scene((5, i), 1 + i % 2, heldout=i % 3 == 0) for i in range(1000)]


@pytest.fixture(scope="module")
def true_images() -> torch.Tensor:
    return render_batch(SCENES)


def test_entities_are_counted_on_true_images(true_images):
    assert count_entities(true_images) == [len(scene.entities) for scene in SCENES]


def judged(results: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    evaluators = build_evaluators(RunConfig(evaluation=EvaluationConfig(grid=["toy"])))
    return measure(evaluators, GeneratedImages(results, targets))


def test_true_images_are_right_and_exchanged_ones_are_not(true_images):
    images = true_images[:200]
    right = judged(images, images)
    assert right["toy_all"] == 1.0 and right["toy_hue_mean"] == 0.0
    wrong = judged(torch.roll(images, 2, dims=0), images)
    assert wrong["toy_all"] < 0.2 and wrong["toy_hue_median"] > 45


def test_other_images_are_not_measured(true_images, caplog):
    photos = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert judged(true_images[:4], photos) == {}
    assert "evaluation.grid" in caplog.text
    larger = torch.nn.functional.interpolate(true_images[:4], scale_factor=2)
    assert judged(larger, larger) == {}
    on_white = true_images[:4].clone()
    on_white[:, :, :2], on_white[:, :, -2:], on_white[..., :2], on_white[..., -2:] = 1, 1, 1, 1
    assert judged(on_white, on_white) == {}
