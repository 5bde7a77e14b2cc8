"""A converter per kind: record -> parts of a stored sample, in the order the kind's file states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_kosmosg.data.manifest import Kind
from megatron_kosmosg.data.preprocess.entities import order_entities
from megatron_kosmosg.data.preprocess.fields import (
    extra_fields,
    image_field,
    list_field,
    mask_field,
    text_field,
)
from megatron_kosmosg.data.preprocess.records import Record, Rejected
from megatron_kosmosg.data.sentences import sentence_table
from megatron_kosmosg.data.store import IMAGE, TOKENS, Part
from megatron_kosmosg.data.tokenizer import Tokenizer

NOT_PACKED = np.zeros((0, 2), np.int32)


@dataclass(frozen=True)
class Converted:
    """One sample, ready to be written."""

    parts: list[Part]
    sentences: np.ndarray
    """Sentence table; empty for kinds that are not packed."""
    num_tokens: int
    """Text tokens; the readings of a caption with and without its entities both count."""

    @property
    def num_images(self) -> int:
        """Pictures, masks included."""
        return sum(part.mode == IMAGE for part in self.parts)


Converter = Callable[[Record, Tokenizer], Converted]


def convert_text(record: Record, tokenizer: Tokenizer) -> Converted:
    """{"text"}."""
    ids = tokenizer.encode_array(text_field(record.fields, "text"))
    if not len(ids):
        raise Rejected("text without tokens")
    return Converted(
        [Part.tokens(np.append(ids, tokenizer.eos_id))],
        sentence_table([ids], tokenizer),
        len(ids),
    )


def convert_caption(record: Record, tokenizer: Tokenizer) -> Converted:
    """{"key", "image", "caption"}."""
    caption = text_field(record.fields, "caption")
    image = image_field(record, record.fields, "image")
    ids = tokenizer.encode_array(caption)
    info = {"key": record.key, "caption": caption}
    info |= extra_fields(record.fields, ("key", "caption", "image"))
    parts = [Part.json(info), Part.tokens(ids), Part(IMAGE, image)]
    return Converted(parts, sentence_table([None, ids], tokenizer), len(ids))


def convert_interleaved(record: Record, tokenizer: Tokenizer) -> Converted:
    """{"key", "content": [{"text"} | {"image"}, ...]}."""
    info = {"key": record.key} | extra_fields(record.fields, ("key", "content"))
    parts, content = [Part.json(info)], []
    for item in list_field(record.fields, "content"):
        if not isinstance(item, dict) or len(item.keys() & {"text", "image"}) != 1:
            raise Rejected("content item is neither text nor image")
        if "text" in item:
            ids = tokenizer.encode_array(text_field(item, "text"))
            parts.append(Part.tokens(ids))
            content.append(ids)
        else:
            parts.append(Part(IMAGE, image_field(record, item, "image")))
            content.append(None)
    if not any(part.mode == TOKENS and part.data for part in parts):
        raise Rejected("document without text")
    num_tokens = sum(len(ids) for ids in content if ids is not None)
    return Converted(parts, sentence_table(content, tokenizer), num_tokens)


def convert_edit(record: Record, tokenizer: Tokenizer) -> Converted:
    """{"key", "caption", "image", "instruction", "target"}."""
    fields = record.fields
    texts = {name: text_field(fields, name) for name in ("caption", "instruction")}
    images = [image_field(record, fields, name) for name in ("image", "target")]
    ids = [tokenizer.encode_array(text) for text in texts.values()]
    info = {"key": record.key} | texts
    info |= extra_fields(fields, ("key", "caption", "instruction", "image", "target"))
    parts = [Part.json(info), *map(Part.tokens, ids), *(Part(IMAGE, data) for data in images)]
    return Converted(parts, NOT_PACKED, sum(map(len, ids)))


def convert_compositional(record: Record, tokenizer: Tokenizer) -> Converted:
    """{"key", "caption", "image", "entities": [{"text", "span", "image", "mask"}, ...]}."""
    fields = record.fields
    caption = text_field(fields, "caption")
    target = image_field(record, fields, "image")
    placed, tail = order_entities(caption, list_field(fields, "entities"))
    described: list[dict[str, Any]] = []
    parts = [Part(IMAGE, target)]
    for entity in placed:
        image = image_field(record, entity.fields, "image")
        mask = mask_field(record, entity.fields, "mask", image)
        for words in (entity.with_words, entity.without_words):
            parts.append(Part.tokens(tokenizer.encode_array(words)))
        parts.append(Part(IMAGE, image))
        if mask is not None:
            parts.append(Part(IMAGE, mask))
        kept = extra_fields(entity.fields, ("text", "span", "image", "mask"))
        described.append(
            {"text": entity.text, "span": entity.span, "has_mask": mask is not None} | kept
        )
    parts.append(Part.tokens(tokenizer.encode_array(tail)))
    info = {"key": record.key, "caption": caption, "entities": described}
    info |= extra_fields(fields, ("key", "caption", "entities", "image"))
    num_tokens = sum(len(part.data) // 4 for part in parts if part.mode == TOKENS)
    return Converted([Part.json(info), *parts], NOT_PACKED, num_tokens)


CONVERTERS: dict[Kind, Converter] = {
    "text": convert_text,
    "caption": convert_caption,
    "interleaved": convert_interleaved,
    "edit": convert_edit,
    "compositional": convert_compositional,
}
