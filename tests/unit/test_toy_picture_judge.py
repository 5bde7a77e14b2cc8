"""The judge of pictures drawn in training: counts entities, and sees equal and unequal pictures."""

from __future__ import annotations

import pytest
import torch

from megatron_kosmosg.toy.judging.toy_picture_judge import count_entities, judge_pictures
from megatron_kosmosg.toy.world import render_batch, sample_scene

SCENES = [sample_scene((5, i), 1 + i % 2, heldout=i % 3 == 0) for i in range(1000)]


@pytest.fixture(scope="module")
def true_pictures() -> torch.Tensor:
    return render_batch(SCENES)


def test_entities_are_counted_on_true_pictures(true_pictures):
    assert count_entities(true_pictures) == [len(scene.entities) for scene in SCENES]


def test_true_pictures_are_right_and_exchanged_ones_are_not(true_pictures):
    pictures = true_pictures[:200]
    right = judge_pictures(pictures, pictures)
    assert right["toy_all"] == 1.0 and right["toy_hue_mean"] == 0.0
    wrong = judge_pictures(torch.roll(pictures, 2, dims=0), pictures)
    assert wrong["toy_all"] < 0.2 and wrong["toy_hue_median"] > 45
