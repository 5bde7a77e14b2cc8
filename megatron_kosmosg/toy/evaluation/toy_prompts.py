"""Held-out prompts of the toy world, and the scene that each of them should give.

Every cell of the evaluation is a list of `ToyCase`s made from integer seeds: what the model is
shown (words, images, or both) and the truth the evaluator compares with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from megatron_kosmosg.toy.edits import sample_edit
from megatron_kosmosg.toy.toy_captions import background_phrase, caption, noun_phrase
from megatron_kosmosg.toy.world import Entity, Scene, render, sample_scene, subject_scene
from megatron_kosmosg.training.image_grid import to_image

Parts = list[str | Image.Image]


@dataclass(frozen=True)
class ToyCase:
    """One prompt and the scene that it asks for."""

    parts: Parts
    scene: Scene


def scenes(seed: int, count: int, num_entities: int) -> list[Scene]:
    """`count` held-out scenes."""
    return [sample_scene((seed, num_entities, i), num_entities, True) for i in range(count)]


def subject_image(entity: Entity, seed: int) -> Image.Image:
    """The entity alone on white, as a cut-out of its mask would show it."""
    return to_image(render(subject_scene(entity, None, (seed, 7))))


def words_only(scene: Scene, seed: int) -> Parts:
    """A prompt of words alone: `a red circle and a ... on a yellow background`, in coarse colour
    words."""
    return [caption(scene, "coarse", seed)]


def images_only(scene: Scene, seed: int) -> Parts:
    """A prompt whose entities are images: `a <image> and a <image> on a yellow
    background`."""
    return _interleave(scene, seed, with_words=False)


def words_and_images(scene: Scene, seed: int) -> Parts:
    """A prompt whose entities are words and images: `a red circle <image> ... on a yellow
    background`."""
    return _interleave(scene, seed, with_words=True)


def _interleave(scene: Scene, seed: int, with_words: bool) -> Parts:
    parts: Parts = []
    rng = np.random.default_rng((seed, 11))
    for i, entity in enumerate(scene.entities):
        article = "a" if i == 0 else "and a"
        words = f"{article} {noun_phrase(entity, 'coarse', rng)}" if with_words else article
        parts += [words, subject_image(entity, seed * 10 + i)]
    return [*parts, f"on a {background_phrase(scene)}"]


def background_image(scene: Scene, seed: int) -> Parts:
    """A prompt whose background is an image, too: `a <image> on a <image of the plain
    background>`."""
    background = to_image(render(Scene((), scene.background_hue)))
    return [*images_only(scene, seed)[:-1], "on a", background]


def swapped(scene: Scene) -> Scene:
    """The scene with its two subjects exchanged, each keeping the other's place."""
    left, right = scene.entities
    return replace(
        scene,
        entities=(
            replace(right, x=left.x, y=left.y, radius=left.radius),
            replace(left, x=right.x, y=right.y, radius=right.radius),
        ),
    )


def cases(
    seed: int, count: int, num_entities: int, parts: Callable[[Scene, int], Parts]
) -> list[ToyCase]:
    """`count` held-out cases whose prompts `parts(scene, seed)` writes."""
    drawn = scenes(seed, count, num_entities)
    return [ToyCase(parts(scene, seed * 1000 + i), scene) for i, scene in enumerate(drawn)]


def edit_cases(seed: int, count: int) -> list[ToyCase]:
    """Prompts such as `<image of one entity> make it blue`; the truth is the edited scene."""
    result = []
    for i, scene in enumerate(scenes(seed, count, 1)):
        rng = np.random.default_rng((seed, i, 13))
        instruction, edited = sample_edit(scene, rng)
        result.append(ToyCase([to_image(render(scene)), instruction], edited))
    return result
