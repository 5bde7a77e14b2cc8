"""Kind `caption`: an image and what it shows.

Stored parts: JSON {key, caption, ...}, tokens of the caption, image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_kosmosg.data.kinds.kind import (
    Captions,
    Conversion,
    Converted,
    PackedDocuments,
    Prompts,
    SampleKind,
    UsualSize,
)
from megatron_kosmosg.data.kinds.record import Record, extra_fields
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.stored_sample import IMAGE, TOKENS, PartSizes, RawSample, StoredPart

if TYPE_CHECKING:
    from megatron_kosmosg.data.random_keys import SampleKey

MAX_TOKENS = 128
"""Longest caption that `instruct` uses, in tokens without <s> (the authors' loader)."""
USUAL = UsualSize(length=40, images=0.0)


def convert(record: Record, use: Conversion) -> Converted:
    """Converts a record {"key", "image", "caption"}."""
    caption, ids = use.text_field(record.fields, "caption")
    image = use.image(record, record.fields, "image")
    info = {"key": record.key, "caption": caption}
    info |= extra_fields(record.fields, ("key", "caption", "image"))
    return Converted([StoredPart.json(info), StoredPart.tokens(ids), StoredPart(IMAGE, image)])


def target_image(raw: RawSample) -> memoryview:
    """The encoded image that `instruct` learns to draw."""
    return raw.parts[1].data


class CaptionPrompts:
    """Text-to-image prompts: <s> caption, the image as the target."""

    def __init__(self, sequence_format: SequenceFormat) -> None:
        self._format = sequence_format

    def length(self, sizes: PartSizes, key: SampleKey) -> int | None:
        """Tokens of the prompt; None when the caption is longer than MAX_TOKENS."""
        num_tokens = sizes[0][1]
        return None if num_tokens > MAX_TOKENS else 1 + num_tokens

    def __call__(self, raw: RawSample, key: SampleKey) -> Prompt:
        """The prompt of the caption; nothing is drawn at random."""
        (ids,) = raw.tokens()
        builder = SequenceBuilder(self._format).add_start().add_text(ids)
        return builder.prompt(target_image(raw), raw.info["caption"])


CAPTION = SampleKind(
    name="caption",
    record='{"key", "image", "caption"}',
    fields=("caption", "image"),
    convert=convert,
    formats=("jsonl", "tar", "parquet", "arrow", "tsv", "files"),
    part_modes=(TOKENS, IMAGE),
    # The image is stored last and read first.
    pretrain=PackedDocuments(images_per_row=20.0, reading_order=lambda modes: (1, 0)),
    align=Captions(tokens=0, words=lambda raw: raw.info["caption"], usual=USUAL),
    instruct=Prompts(lambda layout, data: CaptionPrompts(layout), target_image, USUAL),
)
