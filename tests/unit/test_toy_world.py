"""The toy world: reproducible scenes, true colours, and the rule of what is held out."""

from __future__ import annotations

import colorsys
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_kosmosg.toy.edits import sample_edit
from megatron_kosmosg.toy.toy_captions import ALL_WORDS, caption, caption_parts, join_parts
from megatron_kosmosg.toy.world import (
    COARSE_WORDS,
    FINE_WORDS,
    PATTERNS,
    SHAPES,
    Entity,
    Scene,
    coarse_index,
    entity_masks,
    fine_index,
    hue_distance,
    is_heldout,
    render,
    render_batch,
    sample_scene,
    subject_scene,
)


def combinations(scene: Scene) -> list[tuple[str, str, int]]:
    return [(e.shape, e.pattern, coarse_index(e.hue_a)) for e in scene.entities]


def test_a_seed_decides_the_scene_and_its_pixels():
    for number in (1, 2):
        first = sample_scene((3, number), number, False)
        assert first == sample_scene((3, number), number, False)
        assert first != sample_scene((4, number), number, False)
        assert Scene.from_json(first.to_json()) == first
        assert torch.equal(render(first), render(first))
    pair = [sample_scene(1, 1, False), sample_scene(2, 2, True)]
    assert torch.equal(render_batch(pair)[1], render(pair[1]))


@pytest.mark.parametrize("heldout", [False, True])
def test_heldout_combinations_never_occur_in_training_scenes(heldout):
    seen = Counter()
    for i in range(400):
        seen.update(combinations(sample_scene((5, i), 1 + i % 2, heldout)))
    rule = {
        (shape, pattern, colour)
        for s, shape in enumerate(SHAPES)
        for p, pattern in enumerate(PATTERNS)
        for colour in range(6)
        if (7 * s + 3 * p + 5 * colour + (s * p) % 3) % 8 == 0
    }
    assert 7 <= len(rule) <= 11
    assert all((combination in rule) == heldout for combination in seen)
    assert set(seen) == rule if heldout else len(seen) == 72 - len(rule)


def test_colours_are_those_of_the_hues():
    entity = Entity("circle", "plain", 215.0, 0.0, 16.0, 16.0, 9.0)
    image = (render(Scene((entity,), 47.0)) + 1) / 2
    centre = colorsys.hsv_to_rgb(215 / 360, 0.9, 0.95)
    corner = colorsys.hsv_to_rgb(47 / 360, 0.3, 0.97)
    np.testing.assert_allclose(image[:, 16, 16], centre, atol=1e-5)
    np.testing.assert_allclose(image[:, 0, 0], corner, atol=1e-5)
    assert torch.equal(render(Scene((entity,), None))[:, 0, 0], torch.ones(3))


def test_areas_are_those_of_the_shapes():
    radius = 10.0
    areas = {
        "circle": np.pi,
        "square": (2 * 0.85) ** 2,
        "triangle": 0.5 * 1.8 * (2 * 0.55 * 1.8),
        "cross": 2 * (2 * 0.72) - 0.72**2,
    }
    entities = [Entity(shape, "dots", 0.0, 90.0, 16.0, 16.0, radius) for shape in SHAPES]
    for shape, mask in zip(SHAPES, entity_masks(entities), strict=True):
        assert mask.sum().item() == pytest.approx(areas[shape] * radius**2, rel=0.03)


def test_the_subject_keeps_its_look_and_fills_the_image():
    entity = sample_scene(8, 2, False).entities[1]
    alone = subject_scene(entity, None, 3).entities[0]
    assert (alone.shape, alone.pattern, alone.hue_a, alone.hue_b) == (
        *(entity.shape, entity.pattern, entity.hue_a, entity.hue_b),
    )
    assert alone.radius > entity.radius + 3


def test_words_name_the_hue_and_spans_hold_their_words():
    for hue in np.random.default_rng(0).uniform(0, 360, 200):
        assert hue_distance(hue, 60 * coarse_index(hue)) <= 30
        assert hue_distance(hue, 20 * fine_index(hue) - 20) <= 10
        assert fine_index(hue) // 3 == coarse_index(hue)
    assert (len(COARSE_WORDS), len(FINE_WORDS)) == (6, 18)
    scene = Scene(
        (
            Entity("circle", "dots", 5.0, 240.0, 8.0, 16.0, 6.0),
            Entity("square", "plain", 130.0, 0.0, 24.0, 16.0, 6.0),
        ),
        70.0,
    )
    text = caption(scene, "coarse")
    assert text == "a red circle with blue dots and a green square on a yellow background"
    text, spans = join_parts(caption_parts(scene, "fine", 1), 2)
    assert [text[a:b] for a, b in spans] == caption_parts(scene, "fine", 1)
    assert set(text.split()) <= set(ALL_WORDS)


@pytest.mark.parametrize("heldout", [False, True])
def test_an_edit_changes_one_thing_and_says_which(heldout):
    verbs = Counter()
    for i in range(300):
        scene = sample_scene((9, i), 1, heldout)
        text, edited = sample_edit(scene, np.random.default_rng(i))
        assert set(text.split()) <= set(ALL_WORDS)
        verbs[text.split()[0]] += 1
        before, after = scene.entities[0], edited.entities[0]
        assert (before.x, before.y, before.radius) == (after.x, after.y, after.radius)
        changed = {
            "colour": before.hue_a != after.hue_a,
            "shape": before.shape != after.shape,
            "pattern": before.pattern != after.pattern,
            "background": scene.background_hue != edited.background_hue,
        }
        assert sum(changed.values()) == 1, (text, changed)
        last = text.split()[-1]
        if changed["colour"]:
            assert last == COARSE_WORDS[coarse_index(after.hue_a)]
        elif changed["background"]:
            assert text.split()[-2] == COARSE_WORDS[coarse_index(edited.background_hue)]
        else:
            assert last in (after.shape, after.pattern)
        if after.pattern != "plain":
            assert hue_distance(after.hue_a, after.hue_b) >= 60
        assert heldout or not is_heldout(after.shape, after.pattern, after.hue_a)
    assert set(verbs) == {"make", "turn", "add", "put"}
