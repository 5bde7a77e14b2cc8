"""Instructions that change one thing about a scene of one entity, and the scene they lead to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_kosmosg.toy.toy_captions import colour_word
from megatron_kosmosg.toy.world import (
    COARSE_WORDS,
    MIN_HUE_GAP,
    PATTERNS,
    SHAPES,
    Entity,
    Scene,
    coarse_index,
    hue_distance,
    is_heldout,
)

Edit = tuple[str, Scene]


def sample_edit(scene: Scene, rng: np.random.Generator) -> Edit:
    """An instruction such as "make it blue", and the scene after it.

    A training scene leads to a training scene; a held-out one may lead to either. A colour named
    by the instruction is drawn uniformly from the hues of its word.
    """
    if len(scene.entities) != 1:
        raise ValueError(f"{len(scene.entities)} entities: instructions say `it`, of one entity")
    before = scene.entities[0]
    while True:
        instruction, edited = EDITS[rng.integers(len(EDITS))](scene, rng)
        after = edited.entities[0]
        if _possible(after) and (_heldout(before) or not _heldout(after)):
            return instruction, edited


def _possible(entity: Entity) -> bool:
    return entity.pattern == "plain" or hue_distance(entity.hue_a, entity.hue_b) >= MIN_HUE_GAP


def _heldout(entity: Entity) -> bool:
    return is_heldout(entity.shape, entity.pattern, entity.hue_a)


def _other_colour(hue: float, rng: np.random.Generator) -> tuple[str, float]:
    """A coarse colour word that does not name `hue`, and a hue that it names."""
    index = (coarse_index(hue) + rng.integers(1, len(COARSE_WORDS))) % len(COARSE_WORDS)
    return COARSE_WORDS[index], float((60.0 * index + rng.uniform(-30.0, 30.0)) % 360.0)


def _with_entity(scene: Scene, entity: Entity) -> Scene:
    return replace(scene, entities=(entity,))


def _recolour(scene: Scene, rng: np.random.Generator) -> Edit:
    entity = scene.entities[0]
    word, hue = _other_colour(entity.hue_a, rng)
    return f"make it {word}", _with_entity(scene, replace(entity, hue_a=hue))


def _reshape(scene: Scene, rng: np.random.Generator) -> Edit:
    entity = scene.entities[0]
    shape = str(rng.choice([s for s in SHAPES if s != entity.shape]))
    return f"turn it into a {shape}", _with_entity(scene, replace(entity, shape=shape))


def _repattern(scene: Scene, rng: np.random.Generator) -> Edit:
    entity = scene.entities[0]
    if entity.pattern != "plain":
        return "make it plain", _with_entity(scene, replace(entity, pattern="plain"))
    pattern = str(rng.choice([p for p in PATTERNS if p != "plain"]))
    word = colour_word(entity.hue_b, "coarse", rng)
    return f"add {word} {pattern}", _with_entity(scene, replace(entity, pattern=pattern))


def _move(scene: Scene, rng: np.random.Generator) -> Edit:
    if scene.background_hue is None:
        raise ValueError("a white background has no colour to change")
    word, hue = _other_colour(scene.background_hue, rng)
    return f"put it on a {word} background", replace(scene, background_hue=hue)


EDITS: tuple[Callable[[Scene, np.random.Generator], Edit], ...] = (
    _recolour,
    _reshape,
    _repattern,
    _move,
)
