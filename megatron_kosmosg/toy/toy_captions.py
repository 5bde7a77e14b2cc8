"""Captions of toy scenes, and the words they are made of.

A colour is named by a coarse word (60 degrees wide) or a fine one (20 degrees), the background
always by a coarse one, so that words never say all that the image shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_kosmosg.toy.world import (
    COARSE_WORDS,
    FINE_WORDS,
    PATTERNS,
    SHAPES,
    Entity,
    Scene,
    coarse_index,
    fine_index,
)

WORD_CHOICES = ("coarse", "fine", "mix")
GLUE_WORDS = ("a", "with", "and", "on", "background", "in", "the")
INSTRUCTION_WORDS = (
    *("make", "it", "turn", "into", "put", "add", "remove", "change", "to", "this", "that", "of"),
    *("paint", "color", "picture", "photo", "garden", "draw", "show", "is", "there", "are", "here"),
)
CAPTION_WORDS = (*GLUE_WORDS, *SHAPES, *PATTERNS, *COARSE_WORDS, *FINE_WORDS)
ALL_WORDS = (*CAPTION_WORDS, *INSTRUCTION_WORDS)


def colour_word(hue: float, words: str, rng: np.random.Generator) -> str:
    """The word for a hue; "mix" tosses a coin between the coarse and the fine one."""
    if words not in WORD_CHOICES:
        raise ValueError(f"words={words!r}: choose one of {WORD_CHOICES}")
    if words == "coarse" or (words == "mix" and rng.random() < 0.5):
        return COARSE_WORDS[coarse_index(hue)]
    return FINE_WORDS[fine_index(hue)]


def noun_phrase(entity: Entity, words: str, rng: np.random.Generator) -> str:
    """The entity without its article: "crimson circle with navy dots"."""
    phrase = f"{colour_word(entity.hue_a, words, rng)} {entity.shape}"
    if entity.pattern == "plain":
        return phrase
    return f"{phrase} with {colour_word(entity.hue_b, words, rng)} {entity.pattern}"


def background_phrase(scene: Scene) -> str:
    """The background without its article: "yellow background"."""
    if scene.background_hue is None:
        raise ValueError("a white background has no colour word")
    return f"{COARSE_WORDS[coarse_index(scene.background_hue)]} background"


def caption_parts(scene: Scene, words: str, seed: int | Sequence[int]) -> list[str]:
    """The phrases of the caption: one per entity, then the background's if it has a hue."""
    rng = np.random.default_rng(seed)
    parts = [noun_phrase(entity, words, rng) for entity in scene.entities]
    if scene.background_hue is not None:
        parts.append(background_phrase(scene))
    return parts


def join_parts(parts: Sequence[str], num_entities: int) -> tuple[str, list[tuple[int, int]]]:
    """The caption and, for each part, its [start, end) character offsets."""
    text, spans = "", []
    for i, part in enumerate(parts):
        if i >= num_entities:
            text += " on a "
        elif i > 0:
            text += " and a "
        else:
            text += "a "
        spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def caption(scene: Scene, words: str = "mix", seed: int | Sequence[int] = 0) -> str:
    """A caption of the scene, for example "a crimson circle with navy dots and a lime square on a
    yellow background"."""
    return join_parts(caption_parts(scene, words, seed), len(scene.entities))[0]
