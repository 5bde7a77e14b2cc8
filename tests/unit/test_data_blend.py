"""Mixtures follow their weights at every prefix."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.order import SampleOrder


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 2, "b": 2, "c": 1},
        {"text": 0.5, "caption": 0.5, "interleaved": 0.2},
        {"a": 1},
        {"a": 0.97, "b": 0.03},
        {"a": 7, "b": 5, "c": 3, "d": 2, "e": 1, "f": 1},
        {"a": 0.401, "b": 0.333, "c": 0.1, "d": 0.166},
    ],
)
def test_every_prefix_is_within_one_sample_of_the_weights(weights):
    blend = Blend(weights)
    total = sum(weights.values())
    counts = dict.fromkeys(weights, 0)
    for position in range(2 * blend.period + 3):
        blended = blend[position]
        assert blended.ordinal == counts[blended.name], "ordinals count the draws before"
        counts[blended.name] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - weight / total * (position + 1)) < 1


def test_many_draws_at_once_are_the_single_ones():
    blend = Blend({"a": 3, "b": 2, "c": 0.5})
    positions = np.array([0, 5, 4, 10**9, 77, 77])
    which, ordinals = blend.take(positions)
    singles = [blend[p] for p in positions.tolist()]
    assert [blend.names[i] for i in which] == [blended.name for blended in singles]
    assert ordinals.tolist() == [blended.ordinal for blended in singles]
    order = SampleOrder("a", 7, 1, "stage")
    ordinals = np.array([3, 6, 7, 20, 0, 700])
    assert order.take(ordinals).tolist() == [order[o] for o in ordinals.tolist()]


def test_random_weights_stay_within_one_sample():
    rng = np.random.default_rng(0)
    for _ in range(30):
        weights = {str(i): int(w) for i, w in enumerate(rng.integers(1, 40, rng.integers(2, 8)))}
        blend = Blend(weights)
        drawn = [blend[p].name for p in range(blend.period)]
        steps = np.arange(1, blend.period + 1)
        for name, weight in weights.items():
            counts = np.cumsum([d == name for d in drawn])
            assert np.abs(counts - weight / sum(weights.values()) * steps).max() < 1


def test_paper_mixture_of_a_global_batch():
    blend = Blend({"text": 0.5, "caption": 0.5, "interleaved": 0.2})
    names = [blend[p].name for p in range(576)]
    counts = [names.count(name) for name in ("text", "caption", "interleaved")]
    assert counts == [240, 240, 96]


def test_far_positions_need_no_walk():
    blend = Blend({"a": 3, "b": 1})
    assert blend[4 * 10**12].ordinal in (3 * 10**12, 10**12)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 1, "b": -1}, {"a": float("nan")}])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"data\.blend"):
        Blend(weights)


def test_too_fine_weights_are_refused():
    with pytest.raises(ValueError, match="fewer digits"):
        Blend({"a": 0.123456789, "b": 1})
