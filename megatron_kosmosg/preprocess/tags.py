"""The authors' Open Images rows: comma-joined tags, and two crops for each.

Which tags become entities, and where their words stand, follows their loader: no bare colours,
whole words only, in the order of the caption, each looked for after the one before it. Their second
crop has a white background; the mask it was painted with is computed back, so that one image is
stored and the background is decided when the sample is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from megatron_kosmosg.data.image_reading import over_white
from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.data.scripts import find_words
from megatron_kosmosg.preprocess.image_check import encode_mask

COLOURS = frozenset(
    "yellow blue red green white black brown grey gray purple pink orange cyan silver gold "
    "golden".split()
)


def tag_entities(caption: str, tags: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """(number of the tag, {"text", "span"}) of each tag that the caption says, in the caption's
    order."""
    found = []
    for number, tag in enumerate(tags):
        if not tag or tag.lower() in COLOURS:
            continue
        first = find_words(tag, caption)
        if first is not None and sum(find_words(tag, other) is not None for other in tags) == 1:
            found.append((first.end(), number, tag))
    entities, done = [], 0
    for _, number, tag in sorted(found):
        place = find_words(tag, caption[done:])
        if place is not None:
            span = [done + place.start(), done + place.end()]
            entities.append((number, {"text": caption[slice(*span)], "span": span}))
            done = span[1]
    return entities


def mask_between(image: Image.Image, on_white: Image.Image) -> bytes:
    """PNG of the mask m for which m * image + (1 - m) * white comes closest to `on_white`."""
    if image.size != on_white.size:
        raise Rejected("crops of an entity differ in size", f"{image.size} and {on_white.size}")
    ink = 255.0 - np.asarray(over_white(image), np.float32)
    ink_on_white = 255.0 - np.asarray(over_white(on_white), np.float32)
    strength = np.square(ink).sum(-1)
    mask = (ink * ink_on_white).sum(-1) / np.maximum(strength, 1.0)
    # Where the image itself is white, both crops are: nothing tells, and nothing depends on it.
    mask[strength == 0] = 1.0
    rounded = np.rint(255.0 * np.clip(mask, 0.0, 1.0)).astype(np.uint8)
    return encode_mask(rounded)
