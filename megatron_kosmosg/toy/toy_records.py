"""One record of each kind from a random generator: words, images, and the truth about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from megatron_kosmosg.toy.edits import sample_edit
from megatron_kosmosg.toy.toy_captions import caption, caption_parts, join_parts, noun_phrase
from megatron_kosmosg.toy.world import Entity, Scene, sample_scene, subject_scene

BACKGROUND_ENTITY_SHARE = 1 / 3
"""Compositional records whose background is an entity, too."""
INTERLEAVED_ITEMS = ("subject", "subject", "subject", "scene", "inline")
SENTENCES = ("caption", "subject", "instruction")

ToyRecord = tuple[dict[str, Any], dict[str, Any]]
"""A record, and what only a held-out record tells besides."""


class Images(Protocol):
    """Where the images of records go; both calls return the name to write into the record."""

    def add(self, scene: Scene) -> str: ...

    def add_mask(self, entity: Entity) -> str: ...


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _scene(rng: np.random.Generator, heldout: bool, num_entities: int | None = None) -> Scene:
    return sample_scene(_seed(rng), num_entities or int(rng.integers(1, 3)), heldout)


def _subject(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    """A large image of one entity, white around it half the time, and its words."""
    entity = scene.entities[rng.integers(len(scene.entities))]
    background = scene.background_hue if rng.random() < 0.5 else None
    return subject_scene(entity, background, _seed(rng)), noun_phrase(entity, "mix", rng)


def text(rng: np.random.Generator, heldout: bool, images: Images) -> ToyRecord:
    """A record {"text"}."""
    return {"text": document(rng, heldout)}, {}


def document(rng: np.random.Generator, heldout: bool) -> str:
    """A few sentences about scenes, each ended by " ."."""
    return " ".join(_sentence(rng, heldout) for _ in range(rng.integers(3, 8)))


def _sentence(rng: np.random.Generator, heldout: bool) -> str:
    kind = rng.choice(SENTENCES, p=(0.4, 0.4, 0.2))
    if kind == "caption":
        words = caption(_scene(rng, heldout), "mix", _seed(rng))
        start = rng.choice(("", "", "here is ", "this is ", "draw "))
    elif kind == "subject":
        words = _subject(rng, _scene(rng, heldout, 1))[1]
        start = rng.choice(("a ", "this is a ", "there is a ", "a picture of a ", "a photo of a "))
    else:
        words, _ = sample_edit(_scene(rng, heldout, 1), rng)
        start = ""
    return f"{start}{words} ."


def captioned(rng: np.random.Generator, heldout: bool, images: Images) -> ToyRecord:
    """A record {"image", "caption"}."""
    scene = _scene(rng, heldout)
    words = caption(scene, "mix", _seed(rng))
    return {"image": images.add(scene), "caption": words}, {"scene": scene.to_json()}


def interleaved(rng: np.random.Generator, heldout: bool, images: Images) -> ToyRecord:
    """A record {"content"}: images, each followed by the words that name it."""
    content: list[dict[str, str]] = []
    shown: list[Scene] = []

    def add_image(scene: Scene) -> None:
        shown.append(scene)
        content.append({"image": images.add(scene)})

    def add_text(words: str) -> None:
        content.append({"text": words})

    for _ in range(rng.integers(3, 6)):
        item = rng.choice(INTERLEAVED_ITEMS)
        if item == "subject":
            image, words = _subject(rng, _scene(rng, heldout, 1))
            add_image(image)
            add_text(f"a {words} .")
        elif item == "scene":
            scene = _scene(rng, heldout)
            add_image(scene)
            add_text(f"{caption(scene, 'mix', _seed(rng))} .")
        else:
            _inline(rng, _scene(rng, heldout), add_image, add_text)
    return {"content": content}, {"scenes": [scene.to_json() for scene in shown]}


def _inline(
    rng: np.random.Generator,
    scene: Scene,
    add_image: Callable[[Scene], None],
    add_text: Callable[[str], None],
) -> None:
    """A caption with each entity's image just before its words."""
    whole, spans = join_parts(caption_parts(scene, "mix", _seed(rng)), len(scene.entities))
    start = 0
    for entity, span in zip(scene.entities, spans, strict=False):
        add_text(whole[start : span[0]].strip())
        background = scene.background_hue if rng.random() < 0.5 else None
        add_image(subject_scene(entity, background, _seed(rng)))
        start = span[0]
    add_text(f"{whole[start:]} .")


def compositional(rng: np.random.Generator, heldout: bool, images: Images) -> ToyRecord:
    """A record {"caption", "image", "entities"}; every entity has an image of its own."""
    scene = _scene(rng, heldout)
    parts = caption_parts(scene, "mix", _seed(rng))
    joined, spans = join_parts(parts, len(scene.entities))
    entities = []
    for entity, words, span in zip(scene.entities, parts, spans, strict=False):
        alone = subject_scene(entity, scene.background_hue, _seed(rng))
        files = {"image": images.add(alone), "mask": images.add_mask(alone.entities[0])}
        entities.append({"text": words, "span": list(span)} | files)
    if rng.random() < BACKGROUND_ENTITY_SHARE:
        files = {"image": images.add(Scene((), scene.background_hue)), "mask": None}
        entities.append({"text": parts[-1], "span": list(spans[-1])} | files)
    record = {"caption": joined, "image": images.add(scene), "entities": entities}
    return record, {"scene": scene.to_json()}


def edit(rng: np.random.Generator, heldout: bool, images: Images) -> ToyRecord:
    """A record {"caption", "image", "instruction", "target"}."""
    scene = _scene(rng, heldout, 1)
    instruction, edited = sample_edit(scene, rng)
    record = {
        "caption": caption(scene, "mix", _seed(rng)),
        "image": images.add(scene),
        "instruction": instruction,
        "target": images.add(edited),
    }
    return record, {"scene": edited.to_json()}


WRITERS: dict[str, Callable[[np.random.Generator, bool, Images], ToyRecord]] = {
    "text": text,
    "caption": captioned,
    "interleaved": interleaved,
    "compositional": compositional,
    "edit": edit,
}
