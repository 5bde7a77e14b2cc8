"""Kind `caption`: a picture and what it shows.

Stored parts: JSON {key, caption, ...}, tokens of the caption, picture.
"""

from __future__ import annotations

from megatron_kosmosg.data.keyed import Draws
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import RawSample

MAX_TOKENS = 128
"""Longest caption that `instruct` uses, in tokens without <s> (the authors' loader)."""


def document(raw: RawSample, sequence_format: SequenceFormat) -> SequenceBuilder:
    """<s> picture caption </s>, for `pretrain`."""
    builder = SequenceBuilder(sequence_format).add_start()
    return builder.add_image(raw.images()[0]).add_text(raw.tokens()[0]).add_end()


class CaptionPrompts:
    """Text-to-image prompts: <s> caption, the picture as the target."""

    def __init__(self, sequence_format: SequenceFormat) -> None:
        self._format = sequence_format

    def __call__(self, raw: RawSample, draws: Draws) -> Prompt | None:
        """The prompt, or None when the caption is longer than MAX_TOKENS; draws nothing."""
        (ids,) = raw.tokens()
        if len(ids) > MAX_TOKENS:
            return None
        builder = SequenceBuilder(self._format).add_start().add_text(ids)
        return builder.prompt(raw.images()[0], raw.info["caption"])
