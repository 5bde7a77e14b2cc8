"""A converter per kind: record -> parts of a stored sample, in the order the kind's file states.

Plain text goes through text_batches.py, many documents at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_kosmosg.data.manifest import Kind
from megatron_kosmosg.data.parts import IMAGE, TOKENS, Part
from megatron_kosmosg.data.sentences import sentence_table
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.entities import order_entities
from megatron_kosmosg.preprocess.fields import extra_fields, list_field, text_field
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.pictures import PictureCheck
from megatron_kosmosg.preprocess.records import Record, Rejected

NOT_PACKED = np.zeros((0, 2), np.int32)


@dataclass(frozen=True)
class Converted:
    """One sample, ready to be written."""

    parts: list[Part]
    sentences: np.ndarray
    """Sentence table; empty for kinds that are not packed."""
    num_tokens: int
    """Text tokens; the readings of a caption with and without its entities both count."""
    left_out: tuple[str, ...] = ()
    """Why pictures were left out of a document that was kept; one reason each."""

    @property
    def num_images(self) -> int:
        """Pictures, masks included."""
        return sum(part.mode == IMAGE for part in self.parts)


class Conversion:
    """What all records of a shard are converted with."""

    def __init__(self, tokenizer: Tokenizer, options: Options | None = None) -> None:
        self.options = options or Options()
        self.pictures = PictureCheck(self.options)
        self._tokenizer = tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a run of text."""
        return self._tokenizer.encode_array(text)

    def text_field(self, fields: dict[str, Any], name: str) -> tuple[str, np.ndarray]:
        """A field's text and its ids, of which there is one at least. Raises Rejected."""
        text = text_field(fields, name)
        ids = self.encode(text)
        if not len(ids):
            # Zero-width characters, say: no blanks, but the tokenizer drops them.
            raise Rejected(f"{name} without tokens", repr(text)[:80])
        return text, ids

    def sentences(self, content: list[np.ndarray | None]) -> np.ndarray:
        """The sentence table of a sample that is packed."""
        return sentence_table(content, self._tokenizer)


Converter = Callable[[Record, Conversion], Converted]


def convert_caption(record: Record, use: Conversion) -> Converted:
    """{"key", "image", "caption"}."""
    caption, ids = use.text_field(record.fields, "caption")
    image = use.pictures.read(record, record.fields, "image")
    info = {"key": record.key, "caption": caption}
    info |= extra_fields(record.fields, ("key", "caption", "image"))
    parts = [Part.json(info), Part.tokens(ids), Part(IMAGE, image)]
    return Converted(parts, use.sentences([None, ids]), len(ids))


def convert_interleaved(record: Record, use: Conversion) -> Converted:
    """{"key", "content": [{"text"} | {"image"}, ...]}."""
    info = {"key": record.key} | extra_fields(record.fields, ("key", "content"))
    parts, content, left_out = [Part.json(info)], [], []
    num_images = 0
    for item in list_field(record.fields, "content"):
        if not isinstance(item, dict):
            raise Rejected("content item is neither text nor image", repr(item)[:80])
        # Parquet gives every item both fields, one of them null.
        given = [name for name in ("text", "image") if item.get(name) is not None]
        if len(given) != 1:
            raise Rejected("content item is neither text nor image", f"it has {given}")
        if given == ["text"]:
            ids = use.encode(text_field(item, "text"))
            parts.append(Part.tokens(ids))
            content.append(ids)
            continue
        if num_images == use.options.max_images:
            left_out.append("more than --max-images")
            continue
        try:
            image = use.pictures.read(record, item, "image")
        except Rejected as rejected:
            if not use.options.drop_bad_images:
                raise
            left_out.append(rejected.reason)
            continue
        num_images += 1
        parts.append(Part(IMAGE, image))
        content.append(None)
    if num_images < use.options.min_images:
        raise Rejected("document with too few images", str(num_images))
    if not any(part.mode == TOKENS and part.data for part in parts):
        raise Rejected("document without text")
    num_tokens = sum(len(ids) for ids in content if ids is not None)
    return Converted(parts, use.sentences(content), num_tokens, tuple(left_out))


def convert_edit(record: Record, use: Conversion) -> Converted:
    """{"key", "caption", "image", "instruction", "target"}."""
    fields = record.fields
    caption, caption_ids = use.text_field(fields, "caption")
    instruction, instruction_ids = use.text_field(fields, "instruction")
    images = [use.pictures.read(record, fields, name) for name in ("image", "target")]
    info = {"key": record.key, "caption": caption, "instruction": instruction}
    info |= extra_fields(fields, ("key", "caption", "instruction", "image", "target"))
    parts = [Part.json(info), Part.tokens(caption_ids), Part.tokens(instruction_ids)]
    parts += [Part(IMAGE, data) for data in images]
    return Converted(parts, NOT_PACKED, len(caption_ids) + len(instruction_ids))


def convert_compositional(record: Record, use: Conversion) -> Converted:
    """{"key", "caption", "image", "entities": [{"text", "span", "image", "mask"}, ...]}."""
    fields = record.fields
    caption, _ = use.text_field(fields, "caption")
    target = use.pictures.read(record, fields, "image")
    placed, tail = order_entities(caption, list_field(fields, "entities"))
    described: list[dict[str, Any]] = []
    parts = [Part(IMAGE, target)]
    for entity in placed:
        image = use.pictures.read(record, entity.fields, "image")
        mask = use.pictures.read_mask(record, entity.fields, "mask", image)
        for words in (entity.with_words, entity.without_words):
            parts.append(Part.tokens(use.encode(words)))
        parts.append(Part(IMAGE, image))
        if mask is not None:
            parts.append(Part(IMAGE, mask))
        kept = extra_fields(entity.fields, ("text", "span", "image", "mask"))
        described.append(
            {"text": entity.text, "span": entity.span, "has_mask": mask is not None} | kept
        )
    parts.append(Part.tokens(use.encode(tail)))
    info = {"key": record.key, "caption": caption, "entities": described}
    info |= extra_fields(fields, ("key", "caption", "entities", "image"))
    num_tokens = sum(len(part.data) // 4 for part in parts if part.mode == TOKENS)
    return Converted([Part.json(info), *parts], NOT_PACKED, num_tokens)


CONVERTERS: dict[Kind, Converter] = {
    "caption": convert_caption,
    "interleaved": convert_interleaved,
    "edit": convert_edit,
    "compositional": convert_compositional,
}
