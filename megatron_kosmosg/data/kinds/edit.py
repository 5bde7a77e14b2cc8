"""Kind `edit`: an image, an instruction, and the image after it (InstructPix2Pix).

Stored parts: JSON {key, caption, instruction, ...}, tokens of the caption, tokens of the
instruction, image before, image after. Where the image before has no caption, its text is
empty and its tokens are none: the prompt is the one of a dropped caption.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_kosmosg.data.kinds.kind import (
    Conversion,
    Converted,
    Prompts,
    SampleKind,
    UsualSize,
)
from megatron_kosmosg.data.kinds.record import Record, extra_fields, is_filled
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.stored_sample import IMAGE, TOKENS, PartSizes, RawSample, StoredPart

if TYPE_CHECKING:
    from megatron_kosmosg.data.random_keys import SampleKey


def convert(record: Record, use: Conversion) -> Converted:
    """Converts a record {"key", "caption", "image", "instruction", "target"}."""
    fields = record.fields
    caption, caption_ids = "", use.encode("")
    if is_filled(fields.get("caption")):
        caption, caption_ids = use.text_field(fields, "caption")
    instruction, instruction_ids = use.text_field(fields, "instruction")
    images = [use.image(record, fields, name) for name in ("image", "target")]
    info = {"key": record.key, "caption": caption, "instruction": instruction}
    info |= extra_fields(fields, ("key", "caption", "instruction", "image", "target"))
    parts = [
        StoredPart.json(info),
        StoredPart.tokens(caption_ids),
        StoredPart.tokens(instruction_ids),
    ]
    parts += [StoredPart(IMAGE, data) for data in images]
    return Converted(parts, () if caption else ("captions: the record has none",))


def target_image(raw: RawSample) -> memoryview:
    """The encoded image that `instruct` learns to draw."""
    return raw.parts[3].data


class EditPrompts:
    """Makes prompts <s> [caption] image instruction; the edited image is the target."""

    def __init__(self, sequence_format: SequenceFormat, caption_drop_prob: float) -> None:
        self._format = sequence_format
        self._caption_drop_prob = caption_drop_prob

    def length(self, sizes: PartSizes, key: SampleKey) -> int:
        """Length of the prompt in tokens."""
        (_, caption), (_, instruction), *_ = sizes
        caption_length = 0 if self._drops_caption(key) else caption
        return 1 + caption_length + self._format.image_length + instruction

    def __call__(self, raw: RawSample, key: SampleKey) -> Prompt:
        """The prompt; one coin decides whether the caption of the first image is said."""
        caption, instruction = raw.tokens()
        before = raw.parts[2].tobytes()
        builder = SequenceBuilder(self._format).add_start()
        if not self._drops_caption(key):
            builder.add_text(caption)
        builder.add_image(before).add_text(instruction)
        return builder.prompt(target_image(raw), raw.info["instruction"])

    def _drops_caption(self, key: SampleKey) -> bool:
        return key.coin("caption drop", self._caption_drop_prob)


EDIT = SampleKind(
    name="edit",
    record='{"key", "image", "instruction", "target", "caption" (may be left out)}',
    fields=("caption", "image", "instruction", "target"),
    convert=convert,
    formats=("jsonl", "tar", "parquet", "arrow", "tsv", "folder"),
    part_modes=(TOKENS, TOKENS, IMAGE, IMAGE),
    instruct=Prompts(
        maker=lambda layout, data: EditPrompts(layout, data.caption_drop_prob),
        target=target_image,
        usual=UsualSize(length=100, images=1.0),
    ),
)
