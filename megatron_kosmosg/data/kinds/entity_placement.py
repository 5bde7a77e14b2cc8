"""Where the images of a caption's entities go (the authors' Open Images assembly).

Entities stand in the order in which their words end; the words run on to the next delimiter, in a
script written without spaces nowhere, and never into the next entity; one whose own words overlap
the entity before it is left out. An entity at the very start, words dropped, leaves an empty run of
text, which is simply no tokens (the authors' loader skips such samples).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from megatron_kosmosg.data.kinds.record import Rejected, text_field
from megatron_kosmosg.data.scripts import is_unspaced

DELIMITERS = " ,.!?;:)]}/"
"""Of ASCII; those of the authors' loader, and the slash of "cat/dog"."""
WORD_JOINERS = "\u2019\u2010\u2011\u200c\u200d"
"""Apostrophe, hyphens, and what joins or parts letters of Persian and Indian scripts."""


@dataclass(frozen=True)
class PlacedEntity:
    """One entity and the run of caption that leads to its image."""

    fields: dict[str, Any]
    text: str
    span: list[int]
    """[start, end) characters of the caption, extended to the delimiter."""
    with_words: str
    """Caption from the previous entity's end to this one's end."""
    without_words: str
    """The same up to this entity's start."""


def order_entities(caption: str, entities: list[Any]) -> tuple[list[PlacedEntity], str]:
    """The entities in prompt order, and the caption after the last of them.

    Raises Rejected for a span that lies outside the caption or does not hold the entity's text.
    """
    spans = sorted((_span(caption, entity) for entity in entities), key=lambda s: (s[1], s[0]))
    starts = sorted(start for start, _, _ in spans)
    placed: list[PlacedEntity] = []
    done = 0
    for start, end, entity in spans:
        if start < done:
            continue
        limit = next((other for other in starts if other >= end), len(caption))
        while end < limit and _runs_on(caption[end - 1], caption[end]):
            end += 1
        placed.append(
            PlacedEntity(
                entity,
                text_field(entity, "text"),
                [start, end],
                caption[done:end],
                caption[done:start],
            )
        )
        done = end
    return placed, caption[done:]


def _runs_on(last: str, following: str) -> bool:
    """Whether a word that has come to `last` goes on with `following`."""
    if following.isascii():
        return following not in DELIMITERS and not is_unspaced(last)
    category = unicodedata.category(following)
    if category[0] == "M" or category == "Lm":
        return True  # an accent or vowel sign, a mark that lengthens or repeats
    if is_unspaced(last) or is_unspaced(following):
        return False
    return category[0] in "LN" or following in WORD_JOINERS


def _span(caption: str, entity: Any) -> tuple[int, int, dict[str, Any]]:
    if not isinstance(entity, dict):
        raise Rejected("entity is not an object")
    text = text_field(entity, "text")
    span = entity.get("span")
    if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)):
        raise Rejected("entity span is not [start, end]", repr(span)[:80])
    start, end = span
    if not 0 <= start < end <= len(caption):
        raise Rejected("entity span outside the caption", f"{span} of {len(caption)}")
    if caption[start:end].lower() != text.lower():
        raise Rejected("entity span does not hold its text", f"{caption[start:end]!r}: {text!r}")
    return start, end, entity
